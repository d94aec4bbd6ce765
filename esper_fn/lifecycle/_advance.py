"""Moving seeds along the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._control import cond
from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int8, Int32, Scalar, UInt8
from esper_fn.lifecycle._gates import EDGES, OPTIONS, TESTS, Cause, Edge, Gate, Settings, Signals
from esper_fn.lifecycle._stages import ENDS_WITH_EMBARGO, ON_ITS_WAY, TRANSITIONS, Stage
from esper_fn.lifecycle._state import FAST_STEPS, NONE, SLOW_STEPS, SeedState, is_in


class Move(NamedTuple):
    """Where each seed goes in this step; `target == NONE` for those that stay."""

    target: Int8[Array, "S"]
    cause: Int8[Array, "S"]


def stay(num_seeds: int) -> Move:
    """Nobody moves."""
    return Move(
        target=jnp.full((num_seeds,), NONE, jnp.int8),
        cause=jnp.full((num_seeds,), Cause.NONE, jnp.int8),
    )


def follow(
    move: Move, seeds: SeedState, signals: Signals, limits: Settings, edges: Sequence[Edge]
) -> Move:
    """Adds to `move` the first open edge of every seed that does not move yet.

    Args:
      move: what was decided before; it stands.
      seeds: the rows the gates read.
      signals: this step's measurements.
      limits: thresholds.
      edges: in order of precedence.

    Returns:
      The completed `Move`.
    """
    found = cond(
        jnp.any(is_in(seeds.stage, [edge.source for edge in edges])),
        lambda: _first_open(seeds, signals, limits, edges),
        lambda: jnp.full(seeds.stage.shape, _NO_EDGE, jnp.uint8),
    )
    is_taken = (move.target == NONE) & (found != _NO_EDGE)
    return Move(
        target=jnp.where(is_taken, (found % _CAUSE).astype(jnp.int8), move.target),
        cause=jnp.where(is_taken, (found // _CAUSE).astype(jnp.int8), move.cause),
    )


_CAUSE = 16
_NO_EDGE = 255


def _first_open(
    seeds: SeedState, signals: Signals, limits: Settings, edges: Sequence[Edge]
) -> UInt8[Array, "S"]:
    """`target + _CAUSE * cause` of each seed's first open edge, or `_NO_EDGE`.

    One small number a seed, so that the table is walked once: as two arrays the compiler would walk
    it for each of them, and again wherever they are used.
    """
    opened = _opened(seeds, signals, limits, edges)
    found = jnp.full(seeds.stage.shape, _NO_EDGE, jnp.uint8)
    for edge in reversed(edges):
        is_open = seeds.stage == edge.source
        for gate in edge.gates:
            is_open = is_open & opened[gate]
        found = jnp.where(is_open, jnp.uint8(edge.target + _CAUSE * edge.cause), found)
    return found


def _opened(
    seeds: SeedState, signals: Signals, limits: Settings, edges: Sequence[Edge]
) -> dict[Gate, Bool[Array, "S"]]:
    """Which seeds each of the edges' gates is open for."""
    gates = dict.fromkeys(gate for edge in edges for gate in edge.gates)
    return {gate: TESTS[gate](seeds, signals, limits) for gate in gates}


def waiting_for(seeds: SeedState, signals: Signals, limits: Settings) -> Int8[Array, "S"]:
    """What keeps each seed: a pause, or the first closed gate on its way forward, or nothing."""
    first = {edge.source: edge for edge in reversed(EDGES)}
    forward = [edge for edge in EDGES if edge == first[edge.source] or OPTIONS & set(edge.gates)]

    def first_closed() -> Int8[Array, "S"]:
        opened = _opened(seeds, signals, limits, forward)
        gate_code = jnp.full(seeds.stage.shape, Gate.OPEN, jnp.int8)
        for edge in forward:
            is_here = seeds.stage == edge.source
            for gate in OPTIONS & set(edge.gates):
                is_here = is_here & opened[gate]
            for gate in reversed(edge.gates):
                is_closed = is_here & ~opened[gate]
                gate_code = jnp.where(is_closed, jnp.int8(gate), gate_code)
        return jnp.where(seeds.is_paused, jnp.int8(Gate.PAUSED), gate_code)

    told: Int8[Array, "S"] = cond(
        jnp.any(seeds.is_paused | is_in(seeds.stage, list(first))),
        first_closed,
        lambda: jnp.full(seeds.stage.shape, Gate.OPEN, jnp.int8),
    )
    return told


def is_legal(source: Int8[Array, "..."], target: Int8[Array, "..."]) -> Bool[Array, "..."]:
    """`TRANSITIONS[source, target]`, False for a `target` that is no stage.

    >>> bool(is_legal(jnp.int8(Stage.TRAINING), jnp.int8(Stage.FOSSILIZED)))
    False
    """
    successors = jnp.asarray((TRANSITIONS << np.arange(len(Stage))).sum(1).astype(np.int32))
    known = (target >= 0) & (target < len(Stage))
    shift = jnp.where(known, target, jnp.int8(0)).astype(jnp.int32)
    return known & ((successors[source.astype(jnp.int32)] >> shift) & 1 == 1)


def enter(seeds: SeedState, move: Move, limits: Settings) -> SeedState:
    """Carries out a `Move`, which must be legal, and counts the step for those that stay.

    Alpha is kept by every transition between acting stages, set to 0 by every other one. Slots
    and blueprints are the layout's business and are left as they are.
    """
    moves = move.target != NONE
    stage = jnp.where(moves, move.target, seeds.stage)
    ticks = jnp.where(seeds.is_paused, 0, 1).astype(jnp.int32)
    keeps_alpha = (stage >= Stage.GRAFTING) & (stage <= Stage.FOSSILIZED)
    begins = moves & ~keeps_alpha
    is_new_life = moves & (stage == Stage.GERMINATED)
    telemetry = seeds.telemetry

    def fresh(value: Array) -> Array:
        return jnp.where(is_new_life, jnp.zeros((), value.dtype), value)

    return seeds._replace(
        stage=stage,
        parent=jnp.where(moves, seeds.stage, seeds.parent),
        steps_in_stage=jnp.where(moves, 0, seeds.steps_in_stage + ticks),
        is_paused=seeds.is_paused & is_in(stage, ON_ITS_WAY),
        alpha=jnp.where(begins, 0.0, seeds.alpha),
        embargo_steps=jnp.where(
            moves & is_in(stage, ENDS_WITH_EMBARGO),
            limits.embargo_steps,
            jnp.maximum(seeds.embargo_steps - 1, 0),
        ),
        error_count=fresh(seeds.error_count),
        stability=jnp.where(is_new_life, 1.0, seeds.stability),
        num_contributions=jnp.where(moves, 0, seeds.num_contributions),
        contribution=fresh(seeds.contribution),
        telemetry=telemetry._replace(
            utility=fresh(telemetry.utility),
            utility_slow=fresh(telemetry.utility_slow),
            output_share=fresh(telemetry.output_share),
            num_live_steps=fresh(telemetry.num_live_steps),
        ),
    )


def has_training_place(seeds: SeedState, limits: Settings) -> Bool[Array, "S"]:
    """Which GERMINATED seeds may begin to train: the first ready ones, as far as places are free.

    A seed that cannot move yet (paused, or too young) takes no place from one that can.
    """
    is_ready = (
        (seeds.stage == Stage.GERMINATED)
        & ~seeds.is_paused
        & (seeds.steps_in_stage >= limits.min_steps[Stage.GERMINATED])
    )
    num_training = jnp.sum(seeds.stage == Stage.TRAINING, dtype=jnp.int32)
    num_places = limits.max_training - num_training

    def first_ready() -> Bool[Array, "S"]:
        return is_ready & (jnp.cumsum(is_ready, dtype=jnp.int32) <= num_places)

    # Counting along the seeds is what takes time: only where some of the ready ones get a place.
    num_ready = jnp.sum(is_ready, dtype=jnp.int32)
    places: Bool[Array, "S"] = cond(
        (num_places > 0) & (num_ready > num_places),
        first_ready,
        lambda: is_ready & (num_ready <= num_places),
    )
    return places


@record
class LossTrack(NamedTuple):
    """Averages of the training loss."""

    fast: Float32[Array, ""]
    slow: Float32[Array, ""]
    square: Float32[Array, ""]
    """Average squared deviation of the loss from `slow`."""
    num_steps: Int32[Array, ""]


def loss_track() -> LossTrack:
    """Before the first loss."""
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
    """Takes one loss in; a non-finite one is left out and counts as a spike.

    So does one whose square is not finite. Of any other spike the averages see the band's edge
    only; the band widens with it, so a loss that stays high is followed.

    Returns:
      The track, and whether the loss lay more than `SPIKE_DEVIATIONS` standard deviations above
      its slow average.
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
    kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, track)
    return kept, is_spike


def loss_variation(track: LossTrack) -> Scalar:
    """`|fast - slow| / |slow|`; infinite until both averages differ in what they remember."""
    variation = jnp.abs(track.fast - track.slow) / (jnp.abs(track.slow) + 1e-12)
    return jnp.where(track.num_steps > FAST_STEPS, variation, jnp.inf)
