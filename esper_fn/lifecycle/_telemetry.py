"""From the sums of one step to the averages in the seeds' rows."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._typing import Array, Bool, Float32
from esper_fn.lifecycle._loss import average
from esper_fn.lifecycle._state import FAST_STEPS, SLOW_STEPS, SeedState, Telemetry
from esper_kernels import Statistics


class SeedEvidence(NamedTuple):
    """What one step shows of each seed."""

    has_error: Bool[Array, "S"]
    gradient_ratio: Float32[Array, "S"]
    """Gradient norm over its average before this step; 1 where there is none yet."""


MAX_GRADIENT_RATIO = 30.0
"""A step counts for at most so many times the average gradient norm, so that a single spike does
not make the next hundred steps look small."""


MAX_GRADIENT_SCALE = 1e6
"""`|dy| / |x|` of a chunk that is zero or almost."""


def _ratio(numerator: Array, denominator: Array | float) -> Array:
    return numerator / jnp.maximum(denominator, 1.0)


def update_telemetry(
    seeds: SeedState,
    statistics: Statistics,
    is_spike: Bool[Array, ""],
    has_broken: Bool[Array, "S"],
) -> tuple[SeedState, SeedEvidence]:
    """The rows with one step's statistics averaged in.

    A seed whose site was not reached, or whose measurement is not finite, keeps its averages.

    Args:
      seeds: before.
      statistics: sums over the step, from the taps.
      is_spike: whether the loss left its band.
      has_broken: seeds whose adapter's parameters would have become non-finite.

    Returns:
      The rows after, and what this step alone showed.
    """
    before = seeds.telemetry
    telemetry, is_seen = _averaged(before, statistics)
    gradient, usual = jnp.sqrt(statistics.gradient_square), before.gradient_norm
    is_usual_known = is_seen & (before.num_steps > 0) & (usual > 0)
    ratio = gradient / jnp.maximum(usual, 1e-30)
    has_error = (statistics.num_errors > 0) | has_broken
    calm = jnp.where(is_spike, 0.0, 1.0)
    seeds = seeds._replace(
        telemetry=telemetry,
        stability=average(seeds.stability, calm, seeds.steps_in_stage, SLOW_STEPS),
        error_count=seeds.error_count + has_error.astype(jnp.int32),
    )
    return seeds, SeedEvidence(
        has_error=has_error, gradient_ratio=jnp.where(is_usual_known, ratio, 1.0)
    )


def _averaged(before: Telemetry, statistics: Statistics) -> tuple[Telemetry, Bool[Array, "S"]]:
    """The averages after a step, and which seeds it measured."""
    mean = _ratio(statistics.total, statistics.num_values)
    spread = _ratio(statistics.square, statistics.num_values)
    gradient = jnp.sqrt(statistics.gradient_square)
    size = jnp.sqrt(jnp.maximum(statistics.square, 0.0))
    share = jnp.sqrt(statistics.output_square / jnp.maximum(statistics.square, 1e-30))
    utility = statistics.utility
    usual = before.gradient_norm
    counted = jnp.where(usual > 0, jnp.minimum(gradient, MAX_GRADIENT_RATIO * usual), gradient)
    scale = gradient / jnp.maximum(size, gradient / MAX_GRADIENT_SCALE + 1e-30)
    dead = _ratio(statistics.num_dead, statistics.num_features)
    is_seen = (statistics.num_values > 0) & jnp.isfinite(spread) & jnp.isfinite(gradient)
    is_live = is_seen & (statistics.num_live > 0) & jnp.isfinite(utility) & jnp.isfinite(share)

    def of_chunk(old: Array, new: Array) -> Array:
        return jnp.where(is_seen, average(old, new, before.num_steps, FAST_STEPS), old)

    def of_adapter(old: Array, new: Array, memory_steps: float = FAST_STEPS) -> Array:
        return jnp.where(is_live, average(old, new, before.num_live_steps, memory_steps), old)

    after = Telemetry(
        mean=of_chunk(before.mean, mean),
        variance=of_chunk(before.variance, jnp.maximum(spread - jnp.square(mean), 0.0)),
        dead_fraction=of_chunk(before.dead_fraction, dead),
        output_share=of_adapter(before.output_share, share),
        utility=of_adapter(before.utility, utility),
        utility_slow=of_adapter(before.utility_slow, utility, SLOW_STEPS),
        gradient_norm=of_chunk(usual, counted),
        gradient_scale=of_chunk(before.gradient_scale, scale),
        num_steps=before.num_steps + is_seen.astype(jnp.int32),
        num_live_steps=before.num_live_steps + is_live.astype(jnp.int32),
    )
    return after, is_seen
