"""Moves of seeds along the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esper_fn._control import cond
from esper_fn._typing import Array, Bool, Int8, UInt8
from esper_fn.lifecycle._gates import (
    EDGES,
    GUARD_EDGES,
    OPTIONS,
    TESTS,
    Cause,
    Edge,
    Gate,
    Signals,
)
from esper_fn.lifecycle._settings import Settings
from esper_fn.lifecycle._stages import ENDS_WITH_EMBARGO, ON_ITS_WAY, TRANSITIONS, Stage
from esper_fn.lifecycle._state import NONE, SeedState, is_in


class Move(NamedTuple):
    """Where each seed goes in this step; `target == NONE` for seeds that stay."""

    target: Int8[Array, "S"]
    cause: Int8[Array, "S"]


def no_moves(num_seeds: int) -> Move:
    """A move in which every seed stays."""
    return Move(
        target=jnp.full((num_seeds,), NONE, jnp.int8),
        cause=jnp.full((num_seeds,), Cause.NONE, jnp.int8),
    )


def guard_moves(seeds: SeedState, signals: Signals, settings: Settings) -> Move:
    """The moves along `GUARD_EDGES`, which no command and no policy overrides.

    Args:
      seeds: the rows that the gates read.
      signals: the measurements of this step.
      settings: thresholds.
    """
    edge = cond(
        jnp.any(signals.has_error | signals.is_quarantined),
        lambda: _first_open_edge(seeds, _open_gates(seeds, signals, settings, GUARD_EDGES)),
        lambda: jnp.full(seeds.stage.shape, _NO_EDGE, jnp.uint8),
    )
    return _follow(no_moves(seeds.stage.shape[0]), edge, edge != _NO_EDGE)


def own_moves(
    move: Move, seeds: SeedState, signals: Signals, settings: Settings
) -> tuple[Move, Int8[Array, "S"]]:
    """Adds to `move` the first open edge of every seed that does not move yet and is not paused.

    Args:
      move: what was decided before; it stands.
      seeds: the rows that the gates read.
      signals: the measurements of this step.
      settings: thresholds.

    Returns:
      The complete `Move`, and the `Gate` that keeps each seed that stays: a pause, or the first
      closed gate on its way forward, or `Gate.OPEN`.
    """
    has_edges = is_in(seeds.stage, [edge.source for edge in EDGES])

    def read_table() -> tuple[UInt8[Array, "S"], Int8[Array, "S"]]:
        gates = _open_gates(seeds, signals, settings, EDGES)
        return _first_open_edge(seeds, gates), _first_closed_gate(seeds, gates)

    edge, gate = cond(
        jnp.any(seeds.is_paused | has_edges),
        read_table,
        lambda: (
            jnp.full(seeds.stage.shape, _NO_EDGE, jnp.uint8),
            jnp.full(seeds.stage.shape, Gate.OPEN, jnp.int8),
        ),
    )
    is_free = (move.target == NONE) & ~seeds.is_paused & (edge != _NO_EDGE)
    after = _follow(move, edge, is_free)
    return after, jnp.where(after.target == NONE, gate, jnp.int8(Gate.OPEN))


_CAUSE = 16
_NO_EDGE = 255


def _follow(move: Move, edge: UInt8[Array, "S"], is_taken: Bool[Array, "S"]) -> Move:
    return Move(
        target=jnp.where(is_taken, (edge % _CAUSE).astype(jnp.int8), move.target),
        cause=jnp.where(is_taken, (edge // _CAUSE).astype(jnp.int8), move.cause),
    )


class _OpenGates(NamedTuple):
    """Which seeds the gates of some edges are open for."""

    edges: Sequence[Edge]
    is_open: dict[Gate, Bool[Array, "S"]]


def _open_gates(
    seeds: SeedState, signals: Signals, settings: Settings, edges: Sequence[Edge]
) -> _OpenGates:
    gates = dict.fromkeys(gate for edge in edges for gate in edge.gates)
    return _OpenGates(edges, {gate: TESTS[gate](seeds, signals, settings) for gate in gates})


def _first_open_edge(seeds: SeedState, gates: _OpenGates) -> UInt8[Array, "S"]:
    """`target + _CAUSE * cause` of each seed's first open edge, or `_NO_EDGE`.

    One small number a seed, so that the table is read once: as two arrays the compiler would read
    it for each of them, and again wherever they are used.
    """
    code = jnp.full(seeds.stage.shape, _NO_EDGE, jnp.uint8)
    for edge in reversed(gates.edges):
        is_open = seeds.stage == edge.source
        for gate in edge.gates:
            is_open = is_open & gates.is_open[gate]
        code = jnp.where(is_open, jnp.uint8(edge.target + _CAUSE * edge.cause), code)
    return code


def _first_closed_gate(seeds: SeedState, gates: _OpenGates) -> Int8[Array, "S"]:
    """The first closed gate on each seed's way forward: on the first edge the settings allow."""
    first = {edge.source: edge for edge in reversed(gates.edges)}
    code = jnp.full(seeds.stage.shape, Gate.OPEN, jnp.int8)
    for edge in gates.edges:
        options = OPTIONS & set(edge.gates)
        if edge != first[edge.source] and not options:
            continue
        is_forward = seeds.stage == edge.source
        for gate in options:
            is_forward = is_forward & gates.is_open[gate]
        for gate in reversed(edge.gates):
            code = jnp.where(is_forward & ~gates.is_open[gate], jnp.int8(gate), code)
    return jnp.where(seeds.is_paused, jnp.int8(Gate.PAUSED), code)


def is_legal(source: Int8[Array, "..."], target: Int8[Array, "..."]) -> Bool[Array, "..."]:
    """`TRANSITIONS[source, target]`, False for a `target` that is no stage.

    >>> bool(is_legal(jnp.int8(Stage.TRAINING), jnp.int8(Stage.FOSSILIZED)))
    False
    """
    successors = jnp.asarray((TRANSITIONS << np.arange(len(Stage))).sum(1).astype(np.int32))
    known = (target >= 0) & (target < len(Stage))
    shift = jnp.where(known, target, jnp.int8(0)).astype(jnp.int32)
    return known & ((successors[source.astype(jnp.int32)] >> shift) & 1 == 1)


def apply_moves(seeds: SeedState, move: Move, settings: Settings) -> SeedState:
    """Carries out a `Move`, which must be legal, and counts the step for seeds that stay.

    Every transition between acting stages keeps alpha; every other one sets it to 0. Slots and
    blueprints stay as they are: whoever allocates slots changes them.

    Args:
      seeds: rows before.
      move: where each seed goes.
      settings: thresholds.
    """
    moves = move.target != NONE
    stage = jnp.where(moves, move.target, seeds.stage)
    ticks = jnp.where(seeds.is_paused, 0, 1).astype(jnp.int32)
    keeps_alpha = (stage >= Stage.GRAFTING) & (stage <= Stage.FOSSILIZED)
    is_new_life = moves & (stage == Stage.GERMINATED)
    telemetry = seeds.telemetry

    def fresh(value: Array) -> Array:
        return jnp.where(is_new_life, jnp.zeros((), value.dtype), value)

    return seeds._replace(
        stage=stage,
        parent=jnp.where(moves, seeds.stage, seeds.parent),
        steps_in_stage=jnp.where(moves, 0, seeds.steps_in_stage + ticks),
        is_paused=seeds.is_paused & is_in(stage, ON_ITS_WAY),
        alpha=jnp.where(moves & ~keeps_alpha, 0.0, seeds.alpha),
        embargo_steps=jnp.where(
            moves & is_in(stage, ENDS_WITH_EMBARGO),
            settings.embargo_steps,
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


def has_training_place(seeds: SeedState, settings: Settings) -> Bool[Array, "S"]:
    """The GERMINATED seeds that may begin to train: the first ready ones, while places are free.

    A seed that cannot move yet (paused, or too young) takes no place from one that can.

    Args:
      seeds: rows before the step's moves.
      settings: thresholds.
    """
    is_ready = (
        (seeds.stage == Stage.GERMINATED)
        & ~seeds.is_paused
        & (seeds.steps_in_stage >= settings.min_steps[Stage.GERMINATED])
    )
    num_training = jnp.sum(seeds.stage == Stage.TRAINING, dtype=jnp.int32)
    num_places = settings.max_training - num_training
    num_ready = jnp.sum(is_ready, dtype=jnp.int32)

    def first_ready() -> Bool[Array, "S"]:
        return is_ready & (jnp.cumsum(is_ready, dtype=jnp.int32) <= num_places)

    # Counting along the seeds takes time, and is needed only where some of them get no place.
    may_train: Bool[Array, "S"] = cond(
        (num_places > 0) & (num_ready > num_places),
        first_ready,
        lambda: is_ready & (num_ready <= num_places),
    )
    return may_train
