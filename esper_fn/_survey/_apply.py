"""From the measurements of a survey to the rows of the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._layout import Layout
from esper_fn._sites import Moments
from esper_fn._survey._directions import SiteDirections, store_directions
from esper_fn._survey._potential import potentials_by_site
from esper_fn._typing import Array, Bool, Float32, Int32, Scalar
from esper_fn.lifecycle._loss import average
from esper_fn.lifecycle._stages import Stage
from esper_fn.lifecycle._state import NONE, SeedState

_MEMORY_SURVEYS = 4.0
"""Surveys over which a contribution is averaged."""


class SurveyInfo(NamedTuple):
    """What a survey measured."""

    loss: Float32[Array, ""]
    raw_potential: Float32[Array, "S"]
    potential: Float32[Array, "S"]
    ablated: Int32[Array, "V"]
    """Seeds whose contribution was measured, or `NONE`."""
    contribution: Float32[Array, "V"]
    """Loss without the seed minus loss with it; 0 where `ablated` is `NONE`."""


class Ablations(NamedTuple):
    """Losses without single adapters."""

    seed: Int32[Array, "V"]
    is_measured: Bool[Array, "V"]
    """Whether a row counts."""
    loss: Float32[Array, "V"]


def apply_survey(
    layout: Layout,
    seeds: SeedState,
    directions: SiteDirections | None,
    moments: Sequence[Moments],
    loss: Scalar,
    ablations: Ablations,
) -> tuple[SeedState, SiteDirections | None, SurveyInfo]:
    """Averages a survey's measurements into the rows.

    What is not finite measures nothing. Where the loss is finite only without an adapter, that
    counts as an error of its seed.

    Args:
      layout: the static layout.
      seeds: rows as they were surveyed.
      directions: those stored so far; None where none are.
      moments: of each site.
      loss: on held-out data.
      ablations: the loss without some of the adapters.
    """
    scores = potentials_by_site(moments)
    raw = jnp.concatenate([score.raw for score in scores])
    white = jnp.concatenate([score.whitened for score in scores])
    is_reached = jnp.concatenate([moment.num_rows.reshape(-1) for moment in moments]) > 0
    is_measured = is_reached & jnp.isfinite(white) & jnp.isfinite(loss)
    seeds, contribution, is_known = _apply_ablations(seeds, loss, ablations)
    if directions is not None:
        is_eligible = is_measured & (seeds.stage == Stage.DORMANT)
        directions = store_directions(layout, directions, moments, is_eligible, white)
    seeds = seeds._replace(
        potential=jnp.where(is_measured, white, seeds.potential),
        num_potentials=seeds.num_potentials + is_measured.astype(jnp.int32),
    )
    info = SurveyInfo(
        loss=loss,
        raw_potential=raw,
        potential=white,
        ablated=jnp.where(is_known, ablations.seed, NONE).astype(jnp.int32),
        contribution=jnp.where(is_known, contribution, 0.0),
    )
    return seeds, directions, info


def _apply_ablations(
    seeds: SeedState, loss: Scalar, ablations: Ablations
) -> tuple[SeedState, Float32[Array, "V"], Bool[Array, "V"]]:
    chosen, is_chosen, missing = ablations
    num_seeds = seeds.stage.shape[0]
    worth = missing - loss
    is_known = is_chosen & jnp.isfinite(worth)
    # What may be rounding says nothing for or against an adapter.
    rounding = 4 * jnp.finfo(jnp.float32).eps * jnp.abs(loss)
    worth = jnp.where(jnp.abs(worth) <= rounding, 0.0, worth)
    rows = jnp.where(is_known, chosen, num_seeds)
    # Only where the loss is finite without it has the adapter broken it, not the batch or the host.
    is_broken = is_chosen & jnp.isfinite(missing) & ~jnp.isfinite(loss)
    failed = jnp.where(is_broken, chosen, num_seeds)
    count = seeds.num_contributions[chosen]
    averaged = average(seeds.contribution[chosen], worth, count, _MEMORY_SURVEYS)
    averaged = jnp.where(count > 0, averaged, worth)
    after = seeds._replace(
        contribution=seeds.contribution.at[rows].set(averaged, mode="drop"),
        num_contributions=seeds.num_contributions.at[rows].add(1, mode="drop"),
        error_count=seeds.error_count.at[failed].add(1, mode="drop"),
    )
    return after, worth, is_known
