"""The default rule: grow at once where the survey promises most, and go on while it pays."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._arguments import check_numbers
from esper_fn._layout import Layout
from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.lifecycle import OWNS_ADAPTER, is_in
from esper_fn.lifecycle._commands import Requests
from esper_fn.policies._base import Observation, Policy, rule
from esper_fn.policies._select import (
    Score,
    blueprint_by_group,
    check_arguments,
    request_best,
    score_index,
)


@record
class GrowState(NamedTuple):
    """State of `grow`."""

    score: Int32[Array, ""]
    every: Int32[Array, ""]
    min_share: Float32[Array, ""]
    reference: Float32[Array, ""]
    """The largest potential when the first request was made."""
    last: Int32[Array, ""]
    """Step of the last request; -1 before the first."""


def grow(
    *,
    every: int = 100,
    count: int | None = None,
    min_share: float = 1 / 3,
    score: Score = "potential",
    blueprint: str | None = None,
) -> Policy:
    """Asks at once for every seed that promises enough, and again while growth pays.

    The first request comes in the first step. After a survey (`make_step` and `fit` begin with one)
    it names the seeds whose potential is at least `min_share` of the largest. Without a survey it
    names every seed, one of each layer in turn.

    Later requests come every `every` steps and name the seeds whose potential still reaches that
    bound. There is none while the mean contribution of all living adapters that surveys have
    measured is zero or less. A seed whose last adapter had a negative contribution is named again
    only if its potential is larger than any at the first request. The number of adapters is up to
    the banks' capacity, and to `budget` or `max_total` behind this rule.

    Args:
      every: steps between two requests.
      count: seeds in one request; None for as many as there are.
      min_share: share of the largest potential, in [0, 1], that a seed must promise.
      score: see `periodic`.
      blueprint: see `periodic`.

    Returns:
      The policy.

    Raises:
      ValueError: an argument is out of its range.
    """
    check_arguments(score, 1 if count is None else count, every=every)
    check_numbers(min_share=min_share)
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must be between 0 and 1, got {min_share!r}")

    def init(layout: Layout) -> GrowState:
        blueprint_by_group(layout, blueprint)
        return GrowState(
            score=score_index(score),
            every=jnp.int32(every),
            min_share=jnp.float32(min_share),
            reference=jnp.float32(0),
            last=jnp.int32(-1),
        )

    return rule("grow", init, partial(_decide, blueprint, count))


def _decide(
    blueprint: str | None,
    count: int | None,
    layout: Layout,
    state: GrowState,
    observation: Observation,
    requests: Requests,
    key: Key,
) -> tuple[GrowState, Requests]:
    seeds = observation.seeds
    is_first = state.last < 0
    is_due = is_first | ((observation.step - state.last >= state.every) & _pays(observation))
    is_by_potential = state.score == score_index("potential")
    has_survey = jnp.any(seeds.num_potentials > 0)
    best = jnp.max(jnp.where(seeds.num_potentials > 0, seeds.potential, 0.0))
    reference = jnp.where(is_first | (state.reference <= 0), best, state.reference)
    after = request_best(
        is_due,
        layout,
        observation,
        requests,
        score=jnp.where(is_by_potential & ~has_survey, score_index("even"), state.score),
        blueprint=blueprint,
        count=layout.num_seeds if count is None else count,
        key=key,
        floor=jnp.where(is_by_potential & has_survey, state.min_share * reference, -jnp.inf),
        # The last adapter of the seed had a negative contribution.
        is_barred=(seeds.contribution < 0) & (seeds.potential <= reference),
    )
    last = jnp.where(is_due, observation.step, state.last)
    return state._replace(last=last, reference=reference), after


def _pays(observation: Observation) -> Bool[Array, ""]:
    """Whether the mean contribution of living adapters is positive, or none was measured yet."""
    seeds = observation.seeds
    is_known = is_in(seeds.stage, OWNS_ADAPTER) & (seeds.contribution != 0)
    return (jnp.sum(jnp.where(is_known, seeds.contribution, 0.0)) > 0) | ~jnp.any(is_known)
