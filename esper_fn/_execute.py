"""Carrying out what commands and policies ask."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._control import cond
from esper_fn._layout import UNSERVED, Layout, allocate
from esper_fn._typing import Array, Bool, Int8, Int32
from esper_fn.commands import Code, Commands, Kind, Outcomes
from esper_fn.lifecycle import (
    NONE,
    ON_ITS_WAY,
    Cause,
    Move,
    SeedState,
    Stage,
    is_in,
    is_legal,
)
from esper_fn.policies import Requests


class AllRequests(NamedTuple):
    """What is asked of each seed in this step, whoever asks."""

    kind: Int8[Array, "S"]
    blueprint: Int8[Array, "S"]
    graft: Int8[Array, "S"]
    target: Int8[Array, "S"]
    is_command: Bool[Array, "S"]
    batch: Int32[Array, "S"]
    """The batch a command belongs to, or NONE."""
    is_broken: Bool[Array, "M"]
    """Batches with a row that names no seed, or one that an earlier row names."""


class Executed(NamedTuple):
    """What became of the requests."""

    move: Move
    seeds: SeedState
    code: Int8[Array, "S"]
    slot: Int32[Array, "S"]
    is_born: Bool[Array, "S"]


def merge(layout: Layout, commands: Commands, requests: Requests) -> AllRequests:
    """Commands before the policy's requests; of two commands for a seed, the first one."""
    num_seeds = layout.num_seeds
    is_real = is_addressed(layout, commands) & ~is_repeated(commands)
    where = jnp.where(is_real, commands.seed, num_seeds)

    def put(base: Array, column: Array) -> Array:
        return base.at[where].set(column, mode="drop")

    return AllRequests(
        kind=put(requests.kind, commands.kind),
        blueprint=put(requests.blueprint, commands.blueprint),
        graft=put(requests.graft, commands.graft),
        target=put(requests.target, commands.target),
        is_command=jnp.zeros((num_seeds,), bool).at[where].set(True, mode="drop"),
        batch=put(jnp.full((num_seeds,), NONE, jnp.int32), commands.batch),
        is_broken=_mark(
            jnp.zeros(commands.kind.shape, bool),
            commands.batch,
            (commands.kind != Kind.NONE) & ~is_real,
        ),
    )


def _mark(is_broken: Bool[Array, "M"], batch: Array, if_: Array) -> Bool[Array, "M"]:
    """Batches broken already, and those that `if_` breaks."""
    where = jnp.where(if_ & (batch >= 0), batch, is_broken.shape[0])
    return is_broken.at[where].set(True, mode="drop")


def is_addressed(layout: Layout, commands: Commands) -> Bool[Array, "M"]:
    """Rows that ask something of a seed that exists."""
    return (commands.kind != Kind.NONE) & (commands.seed >= 0) & (commands.seed < layout.num_seeds)


def is_repeated(commands: Commands) -> Bool[Array, "M"]:
    """Rows whose seed an earlier row of the same step names already."""
    asks = commands.kind != Kind.NONE
    same = (commands.seed[:, None] == commands.seed[None, :]) & asks[None, :] & asks[:, None]
    return jnp.any(jnp.tril(same, k=-1), axis=1)


def execute(
    layout: Layout,
    seeds: SeedState,
    owner: Int32[Array, "Q"],
    requests: AllRequests,
    *,
    num_grafts: int,
    guarded: Move,
    is_vetoing: Bool[Array, ""],
) -> Executed:
    """Checks every request against the table and carries out those that hold.

    Args:
      layout: static layout.
      seeds: rows before the step's moves.
      owner: who holds each slot.
      requests: what is asked.
      num_grafts: alpha schedules there are.
      guarded: moves already decided by guard edges.
      is_vetoing: the governor allows no germination.

    Returns:
      The moves (guard moves included), rows with graft and pause changes made, one `Code` a seed.
    """
    is_asked = requests.kind != Kind.NONE

    def check() -> _Checked:
        return _check(
            layout,
            seeds,
            owner,
            requests,
            num_grafts=num_grafts,
            guarded=guarded,
            is_vetoing=is_vetoing,
        )

    def nothing() -> _Checked:
        return _Checked(
            target=jnp.full(is_asked.shape, NONE, jnp.int8),
            code=jnp.full(is_asked.shape, Code.NOT_ASKED, jnp.int8),
            slot=jnp.full(is_asked.shape, NONE, jnp.int32),
        )

    target, code, slot = cond(jnp.any(is_asked), check, nothing)

    kind = requests.kind
    is_done = code == Code.DONE
    is_born = is_done & (kind == Kind.GERMINATE)
    sets_graft = is_done & (kind == Kind.SET_GRAFT)
    pauses, resumes = is_done & (kind == Kind.PAUSE), is_done & (kind == Kind.RESUME)
    by = jnp.where(requests.is_command, jnp.int8(Cause.COMMAND), jnp.int8(Cause.POLICY))
    takes = is_done & (target != NONE)
    move = Move(
        target=jnp.where(takes, target, guarded.target),
        cause=jnp.where(takes, by, guarded.cause),
    )
    graft = jnp.maximum(requests.graft, jnp.int8(0))
    seeds = seeds._replace(
        blueprint=jnp.where(is_born, requests.blueprint, seeds.blueprint),
        slot=jnp.where(is_born, slot, seeds.slot),
        graft=jnp.where(is_born | sets_graft, graft, seeds.graft),
        is_paused=(seeds.is_paused | pauses) & ~resumes,
    )
    return Executed(move=move, seeds=seeds, code=code, slot=slot, is_born=is_born)


class _Checked(NamedTuple):
    """AllRequests held against the table."""

    target: Int8[Array, "S"]
    """Where the seed is asked to go, or NONE."""
    code: Int8[Array, "S"]
    slot: Int32[Array, "S"]


def _check(
    layout: Layout,
    seeds: SeedState,
    owner: Int32[Array, "Q"],
    requests: AllRequests,
    *,
    num_grafts: int,
    guarded: Move,
    is_vetoing: Bool[Array, ""],
) -> _Checked:
    kind, stage = requests.kind, seeds.stage
    germinates, moves = kind == Kind.GERMINATE, kind == Kind.TRANSITION
    sets_graft, pauses, resumes = (
        kind == Kind.SET_GRAFT,
        kind == Kind.PAUSE,
        kind == Kind.RESUME,
    )
    target = jnp.where(
        germinates, jnp.int8(Stage.GERMINATED), jnp.where(moves, requests.target, jnp.int8(NONE))
    )
    code = jnp.where(kind == Kind.NONE, jnp.int8(Code.NOT_ASKED), jnp.int8(Code.DONE))

    def refuse(code: Array, because: Code, if_: Array) -> Array:
        return jnp.where((code == Code.DONE) & if_, jnp.int8(because), code)

    is_known = germinates | moves | sets_graft | pauses | resumes
    code = refuse(code, Code.UNKNOWN_KIND, ~is_known)
    code = refuse(code, Code.OVERRULED, guarded.target != NONE)
    # A newborn needs a blueprint, so only GERMINATE leads to GERMINATED.
    is_bodiless = moves & (target == Stage.GERMINATED)
    is_illegal = (germinates | moves) & (~is_legal(stage, target) | is_bodiless)
    code = refuse(code, Code.ILLEGAL_TRANSITION, is_illegal)
    is_waiting = is_in(stage, [Stage.CULLED, Stage.CANCELLED]) & (seeds.embargo_steps > 0)
    code = refuse(code, Code.EMBARGOED, moves & is_waiting)
    names_graft = sets_graft | (germinates & (requests.graft != NONE))
    is_no_graft = (requests.graft < 0) | (requests.graft >= num_grafts)
    code = refuse(code, Code.UNKNOWN_GRAFT, names_graft & is_no_graft)
    steers = sets_graft | pauses | resumes
    code = refuse(code, Code.NO_ADAPTER, steers & ~is_in(stage, ON_ITS_WAY))
    code = refuse(code, Code.VETOED, germinates & is_vetoing)

    def in_broken_batch(code: Array) -> Array:
        is_broken = _mark(requests.is_broken, requests.batch, code != Code.DONE)
        return (requests.batch >= 0) & is_broken[jnp.clip(requests.batch, 0)]

    # What a broken batch asks for must not take a slot from others.
    code = refuse(code, Code.BATCH_REFUSED, in_broken_batch(code))
    asks = germinates & (code == Code.DONE)
    slot = allocate(layout, owner, asks, requests.blueprint)
    code = refuse(code, Code.BLUEPRINT_NOT_SERVED, asks & (slot == UNSERVED))
    code = refuse(code, Code.BANK_FULL, asks & (slot == NONE))
    code = refuse(code, Code.BATCH_REFUSED, in_broken_batch(code))
    return _Checked(target=target, code=code, slot=slot)


def answer(
    layout: Layout,
    commands: Commands,
    code: Int8[Array, "S"],
    before: Int8[Array, "S"],
    after: Int8[Array, "S"],
) -> Outcomes:
    """One outcome a command."""
    asks = commands.kind != Kind.NONE
    exists = is_addressed(layout, commands)
    seed = jnp.clip(commands.seed, 0, layout.num_seeds - 1)
    told = jnp.where(is_repeated(commands), jnp.int8(Code.DUPLICATE), code[seed])
    nobody = jnp.int8(NONE)
    return Outcomes(
        code=jnp.where(
            exists,
            told,
            jnp.where(asks, jnp.int8(Code.UNKNOWN_SEED), jnp.int8(Code.NOT_ASKED)),
        ),
        before=jnp.where(exists, before[seed], nobody),
        after=jnp.where(exists, after[seed], nobody),
    )
