"""Rules that ask for growth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._lattice import Lattice
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.commands import Command, Kind
from esper_fn.lifecycle import NONE, Stage
from esper_fn.policies._base import Observation, Policy, Proposal, rule

Score: TypeAlias = Literal["potential", "gradient", "random"]
_SCORES = ("potential", "gradient", "random")


def _blueprint_of_group(lattice: Lattice, blueprint: str | None) -> np.ndarray:
    """int8[G]: what to grow at each site; NONE where the wanted blueprint does not serve it."""
    served = lattice.tables.pool_start >= 0
    if blueprint is None:
        return served.argmax(axis=1).astype(np.int8)
    index = lattice.blueprint_index(blueprint)
    return np.where(served[:, index], index, NONE).astype(np.int8)


def _has_room(lattice: Lattice, owner: Array, of_group: np.ndarray) -> Bool[Array, "G"]:
    """Whether the wanted blueprint's pool of each group has a free slot."""
    tables = lattice.tables
    num_groups = len(tables.group_site)
    is_wanted = jnp.asarray(tables.slot_blueprint == of_group[tables.slot_group])
    free = (owner == NONE) & is_wanted
    return (
        jnp.zeros((num_groups,), jnp.int32)
        .at[jnp.asarray(tables.slot_group)]
        .add(free.astype(jnp.int32))
        > 0
    )


def _propose(
    lattice: Lattice,
    seen: Observation,
    proposal: Proposal,
    *,
    score: Score,
    blueprint: str | None,
    count: int,
    key: Key,
) -> Proposal:
    """Asks for the `count` best dormant seeds whose pool has room."""
    of_group = _blueprint_of_group(lattice, blueprint)
    has_room = lattice.per_seed(_has_room(lattice, seen.owner, of_group))
    wanted = lattice.per_seed(of_group)
    seeds = seen.seeds
    if score == "potential":
        worth, is_measured = seeds.potential, seeds.num_potentials > 0
    elif score == "gradient":
        worth, is_measured = seeds.telemetry.gradient_norm, seeds.telemetry.num_steps > 0
    else:
        worth = jax.random.uniform(key, seeds.stage.shape)
        is_measured = jnp.ones(seeds.stage.shape, bool)
    can = (
        (seeds.stage == Stage.DORMANT)
        & ~seeds.is_paused
        & is_measured
        & has_room
        & (wanted != NONE)
        & (proposal.kind == Kind.NONE)
    )
    best, index = jax.lax.top_k(jnp.where(can, worth, -jnp.inf), min(count, lattice.num_seeds))
    chosen = jnp.where(best > -jnp.inf, index, lattice.num_seeds)
    asks = jnp.zeros(seeds.stage.shape, bool).at[chosen].set(True, mode="drop")
    return proposal._replace(
        kind=jnp.where(asks, jnp.int8(Kind.GERMINATE), proposal.kind),
        blueprint=jnp.where(asks, wanted, proposal.blueprint),
        priority=jnp.where(asks, worth, proposal.priority),
    )


def _check(score: str, count: int, **steps: int) -> None:
    if score not in _SCORES:
        raise ValueError(f"score must be one of {_SCORES}, got {score!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def never() -> Policy:
    """Asks for nothing: a static network, or growth by commands alone."""

    def decide(
        lattice: Lattice, state: Any, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[Any, Proposal]:
        del lattice, seen, key
        return state, proposal

    return rule("never", lambda lattice: (), decide)


class _Periodic(NamedTuple):
    every: Int32[Array, ""]
    start: Int32[Array, ""]


def periodic(
    *,
    every: int,
    start: int = 0,
    score: Score = "potential",
    blueprint: str | None = None,
    count: int = 1,
    name: str = "periodic",
) -> Policy:
    """Asks for the best seeds every `every` steps.

    Args:
      every: steps between two requests.
      start: first step that may ask.
      score: what makes a seed best: its surveyed growth `potential`, the `gradient` norm of its
        chunk, or chance (`random`). Seeds without the measurement are never asked for.
      blueprint: what to grow; None takes the first that serves the site.
      count: seeds a request.
      name: the rule's name in the decision log.
    """
    _check(score, count, every=every)

    def decide(
        lattice: Lattice, state: _Periodic, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Periodic, Proposal]:
        is_due = (seen.step >= state.start) & ((seen.step - state.start) % state.every == 0)
        return state, jax.lax.cond(
            is_due,
            lambda same: _propose(
                lattice, seen, same, score=score, blueprint=blueprint, count=count, key=key
            ),
            lambda same: same,
            proposal,
        )

    return rule(name, lambda lattice: _Periodic(jnp.int32(every), jnp.int32(start)), decide)


def random(*, every: int, start: int = 0, blueprint: str | None = None, count: int = 1) -> Policy:
    """`periodic` with places drawn at random: the control for every other choice of places."""
    return periodic(
        every=every, start=start, score="random", blueprint=blueprint, count=count, name="random"
    )


class _Plateau(NamedTuple):
    patience: Int32[Array, ""]
    min_gain: Float32[Array, ""]
    best: Float32[Array, ""]
    last_gain: Int32[Array, ""]


def plateau(
    *,
    patience: int = 200,
    min_gain: float = 0.01,
    score: Score = "potential",
    blueprint: str | None = None,
    count: int = 1,
) -> Policy:
    """Asks for the best seeds once the loss has not fallen for `patience` steps.

    A fall is a new best of the slow loss average, lower than the old one by the share `min_gain`.
    It asks on every step until something germinates; then patience starts anew.

    Args:
      patience: steps without a fall.
      min_gain: relative fall that counts.
      score: see `periodic`.
      blueprint: see `periodic`.
      count: seeds a request.
    """
    _check(score, count, patience=patience)

    def init(lattice: Lattice) -> _Plateau:
        del lattice
        return _Plateau(
            jnp.int32(patience), jnp.float32(min_gain), jnp.float32(jnp.inf), jnp.int32(0)
        )

    def decide(
        lattice: Lattice, state: _Plateau, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Plateau, Proposal]:
        loss = seen.loss.slow
        is_known = seen.loss.num_steps > 0
        has_fallen = is_known & (loss < state.best - state.min_gain * jnp.abs(loss))
        has_grown = jnp.any(
            (seen.seeds.stage == Stage.GERMINATED) & (seen.seeds.steps_in_stage == 0)
        )
        state = state._replace(
            best=jnp.where(has_fallen, loss, state.best),
            last_gain=jnp.where(has_fallen | has_grown, seen.step, state.last_gain),
        )
        return state, jax.lax.cond(
            seen.step - state.last_gain >= state.patience,
            lambda same: _propose(
                lattice, seen, same, score=score, blueprint=blueprint, count=count, key=key
            ),
            lambda same: same,
            proposal,
        )

    return rule("plateau", init, decide)


class _Script(NamedTuple):
    step: Int32[Array, "N"]
    seed: Int32[Array, "N"]
    row: Int32[Array, "N 4"]


def scripted(events: Sequence[tuple[int, Command]], grafts: Sequence[str] = ()) -> Policy:
    """Asks for given things at given steps, whatever is measured.

    Args:
      events: `(step, command)`, with commands made by `esper_fn.commands`.
      grafts: names of the growth's strategies, in order, where a command names one.
    """

    def init(lattice: Lattice) -> _Script:
        rows = []
        for _, command in events:
            blueprint = NONE
            if command.blueprint is not None:
                blueprint = lattice.blueprint_index(command.blueprint)
            graft = NONE if command.graft is None else list(grafts).index(command.graft)
            target = NONE if command.target is None else int(command.target)
            rows.append([int(command.kind), blueprint, graft, target])
        return _Script(
            step=jnp.asarray([step for step, _ in events], jnp.int32),
            seed=jnp.asarray([command.seed for _, command in events], jnp.int32),
            row=jnp.asarray(rows, jnp.int32).reshape(len(rows), 4),
        )

    def decide(
        lattice: Lattice, state: _Script, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Script, Proposal]:
        del key
        where = jnp.where(state.step == seen.step, state.seed, lattice.num_seeds)
        row = state.row.astype(jnp.int8)

        def put(column: Array, index: int) -> Array:
            return column.at[where].set(row[:, index], mode="drop")

        return state, proposal._replace(
            kind=put(proposal.kind, 0),
            blueprint=put(proposal.blueprint, 1),
            graft=put(proposal.graft, 2),
            target=put(proposal.target, 3),
        )

    return rule("scripted", init, decide)
