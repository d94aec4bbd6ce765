"""Rules that ask for growth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_counts, check_numbers, described
from esper_fn._control import cond
from esper_fn._layout import Layout
from esper_fn._leaves import LARGEST
from esper_fn._typing import Array, Bool, Float32, Int8, Int32, Key
from esper_fn.commands import Command, Commands, Kind, pack
from esper_fn.lifecycle import NONE, Stage
from esper_fn.policies._base import Observation, Policy, Requests, rule

Score: TypeAlias = Literal["potential", "gradient", "random", "even"]
_SCORES = ("potential", "gradient", "random", "even")


def blueprint_of_group(layout: Layout, blueprint: str | None) -> np.ndarray:
    """int8[G]: what to grow at each site; NONE where the wanted blueprint does not serve it."""
    served = layout.tables.pool_start >= 0
    chosen = served.argmax(axis=1)
    if blueprint is not None:
        index = layout.blueprint_index(blueprint)
        chosen = np.where(served[:, index], index, NONE)
    return np.asarray(chosen, np.int8)


def _choose(
    layout: Layout, seen: Observation, blueprint: str | None
) -> tuple[Int8[Array, "G"], Bool[Array, "G"]]:
    """What to grow at each site, and whether the limits behind the rule admit it.

    Where a rule leaves the blueprint open, the first one that is admitted.
    """
    of_group = jnp.asarray(blueprint_of_group(layout, blueprint))
    if seen.is_admitted is None:
        return of_group, jnp.ones(of_group.shape, bool)
    if blueprint is None:
        options = jnp.asarray(layout.tables.pool_start >= 0) & seen.is_admitted
        first = jnp.argmax(options, axis=1).astype(jnp.int8)
        of_group = jnp.where(jnp.any(options, axis=1), first, of_group)
    group = jnp.arange(of_group.size)
    return of_group, seen.is_admitted[group, jnp.maximum(of_group, 0)]


def _room(layout: Layout, owner: Array, of_group: Int8[Array, "G"]) -> Int32[Array, "G"]:
    """Free slots in the wanted blueprint's pool of each group."""
    tables = layout.tables
    num_groups = len(tables.group_site)
    is_wanted = jnp.asarray(tables.slot_blueprint, jnp.int8) == of_group[tables.slot_group]
    free = (owner == NONE) & is_wanted
    return (
        jnp.zeros((num_groups,), jnp.int32)
        .at[jnp.asarray(tables.slot_group)]
        .add(free.astype(jnp.int32))
    )


def _rank_in_group(group: Int32[Array, "n"]) -> Int32[Array, "n"]:
    """How many earlier entries are of the same group."""
    order = jnp.argsort(group, stable=True)
    ordered = group[order]
    rank = jnp.arange(group.size) - jnp.searchsorted(ordered, ordered, side="left")
    return jnp.zeros_like(group).at[order].set(rank.astype(group.dtype))


_AFTER_ALL_SPANS = 1e6


def _even_spread(layout: Layout) -> Float32[Array, "S"]:
    """Larger is sooner: one seed of every layer in turn, where there are spans of these first.

    Sites whose names agree up to their last dot ("layer1.0", "layer1.1") are of one layer.
    """
    has_spans = any(place.is_span for place in layout.sites)
    turns: dict[tuple[str, int], int] = {}
    order = []
    for place in layout.sites:
        stem = place.name.rpartition(".")[0] or place.name
        is_late = has_spans and not place.is_span
        for layer in range(place.num_layers):
            first = turns.get((stem, layer), 0)
            turns[stem, layer] = first + place.chunks
            own = -np.arange(first, first + place.chunks, dtype=np.float32)
            order.append(own - _AFTER_ALL_SPANS * is_late)
    return jnp.asarray(np.concatenate(order), jnp.float32)


def propose(
    layout: Layout,
    seen: Observation,
    requests: Requests,
    *,
    score: Int32[Array, ""],
    blueprint: str | None,
    count: int,
    key: Key,
    floor: Array | float = -jnp.inf,
    is_barred: Bool[Array, "S"] | None = None,
) -> Requests:
    """Asks for the `count` best dormant seeds, of each pool no more than it has room for.

    Only for adapters that the limits behind the rule admit, if there are any: else the limit's
    refusal of the best one is what the log should say. Seeds worth less than `floor`, and those
    barred, are not asked for.
    """
    of_group, is_admitted = _choose(layout, seen, blueprint)
    room = _room(layout, seen.owner, of_group)
    wanted = layout.per_seed(of_group)
    seeds = seen.seeds
    telemetry = seeds.telemetry

    def has_gain(score: Float32[Array, "S"]) -> Bool[Array, "S"]:
        # A chunk that is dead, or that no gradient reaches: an adapter there could never help.
        return jnp.isfinite(score) & (score != 0)

    worth, is_measured = jax.lax.switch(
        score,
        (
            lambda: (seeds.potential, (seeds.num_potentials > 0) & has_gain(seeds.potential)),
            lambda: (
                telemetry.gradient_norm,
                (telemetry.num_steps > 0) & has_gain(telemetry.gradient_norm),
            ),
            lambda: (
                jax.random.uniform(key, seeds.stage.shape, jnp.float32),
                jnp.ones(seeds.stage.shape, bool),
            ),
            lambda: (
                _even_spread(layout),
                jnp.ones(seeds.stage.shape, bool),
            ),
        ),
    )
    can = (
        (seeds.stage == Stage.DORMANT)
        & ~seeds.is_paused
        & is_measured
        & (worth >= floor)
        & layout.per_seed(room > 0)
        & (wanted != NONE)
        & (requests.kind == Kind.NONE)
        & (True if is_barred is None else ~is_barred)
    )
    fitting = can & layout.per_seed(is_admitted)
    can = jnp.where(jnp.any(fitting), fitting, can)
    best, index = jax.lax.top_k(jnp.where(can, worth, -jnp.inf), min(count, layout.num_seeds))
    group = jnp.searchsorted(jnp.asarray(layout.tables.group_start), index, side="right") - 1
    fits = (best > -jnp.inf) & (_rank_in_group(group) < room[group])
    chosen = jnp.where(fits, index, layout.num_seeds)
    asks = jnp.zeros(seeds.stage.shape, bool).at[chosen].set(True, mode="drop")
    return requests._replace(
        kind=jnp.where(asks, jnp.int8(Kind.GERMINATE), requests.kind),
        blueprint=jnp.where(asks, wanted, requests.blueprint),
        graft=jnp.where(asks, jnp.int8(NONE), requests.graft),
        target=jnp.where(asks, jnp.int8(NONE), requests.target),
        priority=jnp.where(asks, worth, requests.priority),
    )


def score_index(score: Score) -> Int32[Array, ""]:
    # In the state, like every number of a rule: choosing by chance instead compiles nothing anew.
    return jnp.int32(_SCORES.index(score))


def check(score: str, count: int, **steps: int) -> None:
    if score not in _SCORES:
        raise ValueError(f"score must be one of {_SCORES}, got {score!r}")
    check_counts(count=count, **steps)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def never() -> Policy:
    """Asks for nothing: a static network, or growth by commands alone."""

    def decide(
        layout: Layout, state: Any, seen: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        del layout, seen, key
        return state, requests

    return rule("never", lambda layout: (), decide)


class _Periodic(NamedTuple):
    every: Int32[Array, ""]
    start: Int32[Array, ""]
    score: Int32[Array, ""]


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
        chunk, chance (`random`), or nothing: one seed of every layer in turn (`even`). Seeds
        without the measurement, or where it is exactly zero (a dead chunk), are never asked for.
      blueprint: what to grow; None takes the first that serves the site and fits into a budget
        behind the rule.
      count: seeds a request.
      name: the rule's name in the decision log.
    """
    check(score, count, every=every)
    check_counts(start=start)

    def decide(
        layout: Layout, state: _Periodic, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Periodic, Requests]:
        is_due = (seen.step >= state.start) & ((seen.step - state.start) % state.every == 0)
        return state, cond(
            is_due,
            lambda same: propose(
                layout,
                seen,
                same,
                score=state.score,
                blueprint=blueprint,
                count=count,
                key=key,
            ),
            lambda same: same,
            requests,
        )

    def init(layout: Layout) -> _Periodic:
        blueprint_of_group(layout, blueprint)  # a wrong name shows here, not in the first step
        return _Periodic(jnp.int32(every), jnp.int32(start), score_index(score))

    return rule(name, init, decide)


def random(*, every: int, start: int = 0, blueprint: str | None = None, count: int = 1) -> Policy:
    """`periodic` with places drawn at random: the control for every other choice of places."""
    return periodic(
        every=every, start=start, score="random", blueprint=blueprint, count=count, name="random"
    )


class _Plateau(NamedTuple):
    score: Int32[Array, ""]
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
    check(score, count, patience=patience)
    check_numbers(min_gain=min_gain)

    def init(layout: Layout) -> _Plateau:
        blueprint_of_group(layout, blueprint)
        return _Plateau(
            score=score_index(score),
            patience=jnp.int32(patience),
            min_gain=jnp.float32(min_gain),
            best=jnp.float32(LARGEST),
            last_gain=jnp.int32(0),
        )

    def decide(
        layout: Layout, state: _Plateau, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Plateau, Requests]:
        loss = seen.loss.slow
        is_known = seen.loss.num_steps > 0
        has_fallen = is_known & (loss < state.best - state.min_gain * jnp.abs(loss))
        is_newborn = (seen.seeds.stage == Stage.GERMINATED) & (seen.seeds.steps_in_stage == 0)
        has_grown = jnp.any(is_newborn & ~seen.seeds.is_paused)
        state = state._replace(
            best=jnp.where(has_fallen, loss, state.best),
            last_gain=jnp.where(has_fallen | has_grown, seen.step, state.last_gain),
        )
        return state, cond(
            seen.step - state.last_gain >= state.patience,
            lambda same: propose(
                layout,
                seen,
                same,
                score=state.score,
                blueprint=blueprint,
                count=count,
                key=key,
            ),
            lambda same: same,
            requests,
        )

    return rule("plateau", init, decide)


class _Script(NamedTuple):
    step: Int32[Array, "M"]
    asked: Commands


def scripted(events: Sequence[tuple[int, Command]], grafts: Sequence[str] = ()) -> Policy:
    """Asks for given things at given steps, whatever is measured.

    Args:
      events: `(step, command)`, with commands made by `esper_fn.commands`; one a seed and step.
      grafts: names of the growth's alpha schedules, in order, where a command names one.

    Raises:
      TypeError: an event that is no such pair.
      ValueError: two commands for one seed at one step. When the growth is initialised, what
        `esper_fn.commands.pack` raises.
    """
    if not isinstance(events, Sequence) or isinstance(events, str):
        raise TypeError(f"events must be a list of (step, command), got {described(events)}")
    for event in events:
        is_pair = isinstance(event, tuple | list) and len(event) == 2
        if not is_pair or not isinstance(event[1], Command):
            raise TypeError(
                "events must hold pairs (step, command), as `(100, commands.germinate(0, "
                f"'low_rank'))`, got {described(event)}"
            )
        check_counts(**{"the step of an event": event[0]})
    places = [(step, command.seed) for step, command in events]
    doubled = sorted({place for place in places if places.count(place) > 1})
    if doubled:
        raise ValueError(f"one command a seed and step, got several at (step, seed) {doubled}")

    def init(layout: Layout) -> _Script:
        asked = pack(layout, grafts, [command for _, command in events], len(events))
        return _Script(step=jnp.asarray([step for step, _ in events], jnp.int32), asked=asked)

    def decide(
        layout: Layout, state: _Script, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Script, Requests]:
        del key
        asked = state.asked
        where = jnp.where(state.step == seen.step, asked.seed, layout.num_seeds)

        def put(column: Array, values: Array) -> Array:
            return column.at[where].set(values, mode="drop")

        return state, requests._replace(
            kind=put(requests.kind, asked.kind),
            blueprint=put(requests.blueprint, asked.blueprint),
            graft=put(requests.graft, asked.graft),
            target=put(requests.target, asked.target),
        )

    return rule("scripted", init, decide)
