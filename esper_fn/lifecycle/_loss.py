"""Averages of the training loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int32, Scalar
from esper_fn.lifecycle._state import FAST_STEPS, SLOW_STEPS


@record
class LossTrack(NamedTuple):
    """Averages of the training loss."""

    fast: Float32[Array, ""]
    slow: Float32[Array, ""]
    square: Float32[Array, ""]
    """Average squared deviation of the loss from `slow`."""
    num_steps: Int32[Array, ""]


def loss_track() -> LossTrack:
    """The averages before the first loss."""
    zero = jnp.zeros((), jnp.float32)
    return LossTrack(fast=zero, slow=zero, square=zero, num_steps=jnp.zeros((), jnp.int32))


def average(old: Array, new: Array, num_before: Array, memory_steps: float) -> Array:
    """Exponential average over about `memory_steps`, a plain mean until that many were seen.

    `old + (new - old) / min(num_before + 1, memory_steps)`: unbiased from the first step.
    """
    count = jnp.minimum(num_before.astype(jnp.float32) + 1.0, float(memory_steps))
    return old + (new - old) / count


SPIKE_DEVIATIONS = 4.0


def track_loss(track: LossTrack, loss: Scalar) -> tuple[LossTrack, Bool[Array, ""]]:
    """Averages one loss in; a non-finite one is left out and counts as a spike.

    A loss whose square is not finite is left out too. Of any other spike the averages see only the
    edge of the band; the band widens with it, so the averages follow a loss that stays high.

    Args:
      track: the averages before.
      loss: of this step.

    Returns:
      The averages after, and whether the loss lay more than `SPIKE_DEVIATIONS` standard
      deviations above its slow average.
    """
    loss = loss.astype(jnp.float32)
    is_finite = jnp.isfinite(jnp.square(loss))
    known = track.num_steps > FAST_STEPS
    # Never zero: a band without width would keep a loss that was constant from ever rising.
    band = SPIKE_DEVIATIONS * jnp.sqrt(track.square) + 1e-6 * jnp.abs(track.slow) + 1e-12
    is_spike = ~is_finite | (known & (loss > track.slow + band))
    clipped = jnp.where(is_finite & is_spike, track.slow + band, loss)
    count = track.num_steps
    updated = LossTrack(
        fast=average(track.fast, clipped, count, FAST_STEPS),
        slow=average(track.slow, clipped, count, SLOW_STEPS),
        square=average(track.square, jnp.square(clipped - track.slow), count, SLOW_STEPS),
        num_steps=count + 1,
    )
    after = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, track)
    return after, is_spike


def loss_variation(track: LossTrack) -> Scalar:
    """`|fast - slow| / |slow|`; infinite until both averages differ in what they remember."""
    variation = jnp.abs(track.fast - track.slow) / (jnp.abs(track.slow) + 1e-12)
    return jnp.where(track.num_steps > FAST_STEPS, variation, jnp.inf)
