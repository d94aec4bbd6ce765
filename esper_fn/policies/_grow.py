"""The default rule: grow at once where the survey says, and go on while it pays."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._arguments import check_numbers
from esper_fn._control import cond
from esper_fn._layout import Layout
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.lifecycle import OWNS_ADAPTER, is_in
from esper_fn.policies._base import Observation, Policy, Requests, rule
from esper_fn.policies._propose import (
    Score,
    blueprint_of_group,
    check,
    propose,
    score_index,
)


class _Grow(NamedTuple):
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
    """Asks at once for all good places that there is room for, and again while it pays.

    The first request comes in the first step. If a survey came before it (`make_step` and `fit`
    begin with one), it names the seeds by their surveyed potential, as far as that is at least
    `min_share` of the largest one; else every seed, one of each layer in turn.
    After that it asks every `every` steps, where potentials still reach that bound, unless the mean
    contribution of all living adapters that surveys have measured is zero or less. A seed whose
    last adapter was worth less than nothing is asked again only if it promises more than any did at
    first. How much it gets is for the banks, and for `budget` or `quota` behind it, to say.

    Args:
      every: steps between two requests.
      count: seeds a request; None for as many as there are.
      min_share: share of the largest potential, in [0, 1], that a place must promise.
      score: see `periodic`.
      blueprint: see `periodic`.
    """
    check(score, 1 if count is None else count, every=every)
    check_numbers(min_share=min_share)
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must be between 0 and 1, got {min_share!r}")

    def init(layout: Layout) -> _Grow:
        blueprint_of_group(layout, blueprint)
        return _Grow(
            score=score_index(score),
            every=jnp.int32(every),
            min_share=jnp.float32(min_share),
            reference=jnp.float32(0),
            last=jnp.int32(-1),
        )

    def decide(
        layout: Layout, state: _Grow, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Grow, Requests]:
        is_first = state.last < 0
        is_due = is_first | ((seen.step - state.last >= state.every) & _pays(seen))
        is_blind = (state.score == score_index("potential")) & ~jnp.any(
            seen.seeds.num_potentials > 0
        )
        reads_potential = (state.score == score_index("potential")) & ~is_blind
        best = jnp.max(jnp.where(seen.seeds.num_potentials > 0, seen.seeds.potential, 0.0))
        reference = jnp.where(is_first | (state.reference <= 0), best, state.reference)
        asked = cond(
            is_due,
            lambda same: propose(
                layout,
                seen,
                same,
                score=jnp.where(is_blind, score_index("even"), state.score),
                blueprint=blueprint,
                count=layout.num_seeds if count is None else count,
                key=key,
                floor=jnp.where(reads_potential, state.min_share * reference, -jnp.inf),
                # The last adapter there was measured and worth less than nothing.
                is_barred=(seen.seeds.contribution < 0) & (seen.seeds.potential <= reference),
            ),
            lambda same: same,
            requests,
        )
        last = jnp.where(is_due, seen.step, state.last)
        return state._replace(last=last, reference=reference), asked

    return rule("grow", init, decide)


def _pays(seen: Observation) -> Bool[Array, ""]:
    """Whether living adapters are worth something on average, or none was measured yet."""
    seeds = seen.seeds
    is_known = is_in(seeds.stage, OWNS_ADAPTER) & (seeds.contribution != 0)
    return (jnp.sum(jnp.where(is_known, seeds.contribution, 0.0)) > 0) | ~jnp.any(is_known)
