"""What becomes of commands and requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._control import cond
from esper_fn._typing import Array, Bool, Int8, Int32
from esper_fn.lifecycle._commands import Code, Commands, Kind, Outcomes, Requests
from esper_fn.lifecycle._gates import Cause
from esper_fn.lifecycle._moves import Move, is_legal
from esper_fn.lifecycle._stages import ON_ITS_WAY, Stage
from esper_fn.lifecycle._state import NONE, UNSERVED, SeedState, is_in

Allocate = Callable[[Array, Array, Array], Array]
"""`allocate(owner, asks, blueprint)`: a free slot for each seed that asks, `NONE` or `UNSERVED`."""


class _Demands(NamedTuple):
    """What is asked of each seed in this step, by a command or by the policy."""

    kind: Int8[Array, "S"]
    blueprint: Int8[Array, "S"]
    graft: Int8[Array, "S"]
    target: Int8[Array, "S"]
    is_command: Bool[Array, "S"]
    batch: Int32[Array, "S"]
    """The batch a command belongs to, or NONE."""
    is_broken: Bool[Array, "M"]
    """Batches with a row that names no seed, or one that an earlier row names."""


class _Answer(NamedTuple):
    """What the table answers."""

    target: Int8[Array, "S"]
    """Where the seed is asked to go, or NONE."""
    code: Int8[Array, "S"]
    slot: Int32[Array, "S"]
    owner: Int32[Array, "Q"]


class Resolved(NamedTuple):
    """What became of all commands and requests."""

    move: Move
    """The guard's moves and those that were asked for."""
    seeds: SeedState
    """The rows with blueprints, slots, schedules and pauses changed."""
    code: Int8[Array, "S"]
    owner: Int32[Array, "Q"]
    """With newborn adapters in their slots."""
    is_born: Bool[Array, "S"]


def resolve(
    seeds: SeedState,
    owner: Int32[Array, "Q"],
    commands: Commands,
    requests: Requests,
    *,
    num_grafts: int,
    guard: Move,
    forbids_germination: Bool[Array, ""],
    allocate: Allocate,
) -> Resolved:
    """Holds everything that is asked against the table, and carries out what may be.

    Args:
      seeds: rows before the step's moves.
      owner: the seed that holds each slot, or `NONE`.
      commands: of people; they come before the policy's requests.
      requests: of the policy.
      num_grafts: number of alpha schedules.
      guard: moves that nothing overrides.
      forbids_germination: the governor's veto.
      allocate: finds free slots.
    """
    demands = _merge(commands, requests)
    asks = demands.kind != Kind.NONE

    def check() -> _Answer:
        target, code = _check(seeds, demands, num_grafts, guard, forbids_germination)
        return _allocate(demands, target, code, owner, allocate)

    def no_answer() -> _Answer:
        return _Answer(
            target=jnp.full(asks.shape, NONE, jnp.int8),
            code=jnp.full(asks.shape, Code.NOT_ASKED, jnp.int8),
            slot=jnp.full(asks.shape, NONE, jnp.int32),
            owner=owner,
        )

    answer = cond(jnp.any(asks), check, no_answer)
    is_done = answer.code == Code.DONE
    is_born = is_done & (demands.kind == Kind.GERMINATE)
    moves = is_done & (answer.target != NONE)
    cause = jnp.where(demands.is_command, jnp.int8(Cause.COMMAND), jnp.int8(Cause.POLICY))
    move = Move(
        target=jnp.where(moves, answer.target, guard.target),
        cause=jnp.where(moves, cause, guard.cause),
    )
    sets_graft = is_born | (is_done & (demands.kind == Kind.SET_GRAFT))
    pauses, resumes = (is_done & (demands.kind == kind) for kind in (Kind.PAUSE, Kind.RESUME))
    seeds = seeds._replace(
        blueprint=jnp.where(is_born, demands.blueprint, seeds.blueprint),
        slot=jnp.where(is_born, answer.slot, seeds.slot),
        graft=jnp.where(sets_graft, jnp.maximum(demands.graft, jnp.int8(0)), seeds.graft),
        is_paused=(seeds.is_paused | pauses) & ~resumes,
    )
    return Resolved(move=move, seeds=seeds, code=answer.code, owner=answer.owner, is_born=is_born)


def _merge(commands: Commands, requests: Requests) -> _Demands:
    """Commands before the policy's requests; of two commands for a seed, the first one."""
    num_seeds = requests.kind.shape[0]
    is_real = _names_seed(commands, num_seeds) & ~_is_repeated(commands)
    position = jnp.arange(commands.kind.shape[0], dtype=jnp.int32)
    row = (
        jnp.full((num_seeds,), NONE, jnp.int32)
        .at[jnp.where(is_real, commands.seed, num_seeds)]
        .set(position, mode="drop")
    )
    is_command = row != NONE
    row = jnp.maximum(row, 0)

    def choose(command: Array, request: Array) -> Array:
        return jnp.where(is_command, command[row], request)

    return _Demands(
        kind=choose(commands.kind, requests.kind),
        blueprint=choose(commands.blueprint, requests.blueprint),
        graft=choose(commands.graft, requests.graft),
        target=choose(commands.target, requests.target),
        is_command=is_command,
        batch=choose(commands.batch, jnp.full((num_seeds,), NONE, jnp.int32)),
        is_broken=_mark(
            jnp.zeros(commands.kind.shape, bool),
            commands.batch,
            (commands.kind != Kind.NONE) & ~is_real,
        ),
    )


def _mark(is_broken: Bool[Array, "M"], batch: Array, breaks: Array) -> Bool[Array, "M"]:
    """The batches broken already, and those with a row in `breaks`."""
    index = jnp.where(breaks & (batch >= 0), batch, is_broken.shape[0])
    return is_broken.at[index].set(True, mode="drop")


def _names_seed(commands: Commands, num_seeds: int) -> Bool[Array, "M"]:
    """Rows that ask something of a seed that exists."""
    return (commands.kind != Kind.NONE) & (commands.seed >= 0) & (commands.seed < num_seeds)


def _is_repeated(commands: Commands) -> Bool[Array, "M"]:
    """Rows whose seed an earlier row of the same step names already."""
    asks = commands.kind != Kind.NONE
    same = (commands.seed[:, None] == commands.seed[None, :]) & asks[None, :] & asks[:, None]
    return jnp.any(jnp.tril(same, k=-1), axis=1)


def _refuse(code: Int8[Array, "S"], reason: Code, is_refused: Array) -> Int8[Array, "S"]:
    """The codes after a refusal; the first one stands."""
    return jnp.where((code == Code.DONE) & is_refused, jnp.int8(reason), code)


def _check(
    seeds: SeedState,
    demands: _Demands,
    num_grafts: int,
    guard: Move,
    forbids_germination: Bool[Array, ""],
) -> tuple[Int8[Array, "S"], Int8[Array, "S"]]:
    """Where each seed is asked to go, and what speaks against it but for slots and batches."""
    kind, stage = demands.kind, seeds.stage
    germinates, moves = kind == Kind.GERMINATE, kind == Kind.TRANSITION
    sets_graft = kind == Kind.SET_GRAFT
    steers = sets_graft | (kind == Kind.PAUSE) | (kind == Kind.RESUME)
    target = jnp.where(
        germinates, jnp.int8(Stage.GERMINATED), jnp.where(moves, demands.target, jnp.int8(NONE))
    )
    code = jnp.where(kind == Kind.NONE, jnp.int8(Code.NOT_ASKED), jnp.int8(Code.DONE))
    code = _refuse(code, Code.UNKNOWN_KIND, ~(germinates | moves | steers))
    code = _refuse(code, Code.OVERRULED, guard.target != NONE)
    # A newborn needs a blueprint, so only GERMINATE leads to GERMINATED.
    lacks_blueprint = moves & (target == Stage.GERMINATED)
    is_illegal = (germinates | moves) & (~is_legal(stage, target) | lacks_blueprint)
    code = _refuse(code, Code.ILLEGAL_TRANSITION, is_illegal)
    is_waiting = is_in(stage, [Stage.CULLED, Stage.CANCELLED]) & (seeds.embargo_steps > 0)
    code = _refuse(code, Code.EMBARGOED, moves & is_waiting)
    names_graft = sets_graft | (germinates & (demands.graft != NONE))
    is_no_graft = (demands.graft < 0) | (demands.graft >= num_grafts)
    code = _refuse(code, Code.UNKNOWN_GRAFT, names_graft & is_no_graft)
    code = _refuse(code, Code.NO_ADAPTER, steers & ~is_in(stage, ON_ITS_WAY))
    return target, _refuse(code, Code.VETOED, germinates & forbids_germination)


def _allocate(
    demands: _Demands,
    target: Int8[Array, "S"],
    code: Int8[Array, "S"],
    owner: Int32[Array, "Q"],
    allocate: Allocate,
) -> _Answer:
    """Slots for newborn adapters; whole batches are refused with one of their commands."""

    def in_broken_batch(code: Array) -> Array:
        is_broken = _mark(demands.is_broken, demands.batch, code != Code.DONE)
        return (demands.batch >= 0) & is_broken[jnp.clip(demands.batch, 0)]

    # What a broken batch asks for must not take a slot from others.
    code = _refuse(code, Code.BATCH_REFUSED, in_broken_batch(code))
    asks = (demands.kind == Kind.GERMINATE) & (code == Code.DONE)
    slot = allocate(owner, asks, demands.blueprint)
    code = _refuse(code, Code.BLUEPRINT_NOT_SERVED, asks & (slot == UNSERVED))
    code = _refuse(code, Code.BANK_FULL, asks & (slot == NONE))
    code = _refuse(code, Code.BATCH_REFUSED, in_broken_batch(code))
    owner = take_slots(owner, slot, asks & (code == Code.DONE))
    return _Answer(target=target, code=code, slot=slot, owner=owner)


def take_slots(
    owner: Int32[Array, "Q"], slot: Int32[Array, "S"], takes: Bool[Array, "S"]
) -> Int32[Array, "Q"]:
    """`owner` after the seeds in `takes` took their `slot`."""
    seeds = jnp.arange(slot.shape[0], dtype=jnp.int32)
    return owner.at[jnp.where(takes, slot, owner.shape[0])].set(seeds, mode="drop")


def outcomes(
    commands: Commands,
    code: Int8[Array, "S"],
    before: Int8[Array, "S"],
    after: Int8[Array, "S"],
) -> Outcomes:
    """What became of each command.

    Args:
      commands: of this step.
      code: of each seed, from `resolve`.
      before: stages before the step.
      after: stages after it.
    """
    num_seeds = code.shape[0]
    exists = _names_seed(commands, num_seeds)
    seed = jnp.clip(commands.seed, 0, num_seeds - 1)
    own = jnp.where(_is_repeated(commands), jnp.int8(Code.DUPLICATE), code[seed])
    unknown = jnp.where(
        commands.kind != Kind.NONE, jnp.int8(Code.UNKNOWN_SEED), jnp.int8(Code.NOT_ASKED)
    )
    none = jnp.int8(NONE)
    return Outcomes(
        code=jnp.where(exists, own, unknown),
        before=jnp.where(exists, before[seed], none),
        after=jnp.where(exists, after[seed], none),
    )
