"""Rules that ask for growth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from esper_fn._arguments import check_counts, check_numbers, describe
from esper_fn._layout import Layout
from esper_fn._leaves import LARGEST
from esper_fn._records import record
from esper_fn._typing import Array, Float32, Int32, Key
from esper_fn.commands import Command, Commands
from esper_fn.commands._pack import pack
from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._commands import Requests
from esper_fn.policies._base import Observation, Policy, rule
from esper_fn.policies._select import (
    Score,
    blueprint_by_group,
    check_arguments,
    request_best,
    score_index,
)


def never() -> Policy:
    """Asks for nothing: for a static network, or for growth by commands alone."""

    def decide(
        layout: Layout, state: Any, observation: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        del layout, observation, key
        return state, requests

    return rule("never", lambda layout: (), decide)


@record
class PeriodicState(NamedTuple):
    """State of `periodic`."""

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
    """Asks for the best dormant seeds every `every` steps.

    Args:
      every: steps between two requests.
      start: the first step with a request.
      score: what makes a seed best: its surveyed growth `potential`, the `gradient` norm of its
        chunk, chance (`random`), or the layers' turn (`even`). Seeds without the measurement, or
        where it is exactly zero (a dead chunk), are never asked for.
      blueprint: name of what to grow; None takes the first that serves the site and fits into the
        limits behind the rule.
      count: seeds in one request.
      name: the rule's name in the decision log.

    Returns:
      The policy.

    Raises:
      ValueError: an unknown score, or `every` or `count` below 1.
    """
    check_arguments(score, count, every=every)
    check_counts(start=start)

    def decide(
        layout: Layout, state: PeriodicState, observation: Observation, requests: Requests, key: Key
    ) -> tuple[PeriodicState, Requests]:
        num_steps = observation.step - state.start
        is_due = (num_steps >= 0) & (num_steps % state.every == 0)
        return state, request_best(
            is_due,
            layout,
            observation,
            requests,
            score=state.score,
            blueprint=blueprint,
            count=count,
            key=key,
        )

    def init(layout: Layout) -> PeriodicState:
        blueprint_by_group(layout, blueprint)  # a wrong name shows here, not in the first step
        return PeriodicState(jnp.int32(every), jnp.int32(start), score_index(score))

    return rule(name, init, decide)


def random(*, every: int, start: int = 0, blueprint: str | None = None, count: int = 1) -> Policy:
    """Asks for seeds at random, as a control for every other choice; arguments as in `periodic`."""
    return periodic(
        every=every, start=start, score="random", blueprint=blueprint, count=count, name="random"
    )


@record
class PlateauState(NamedTuple):
    """State of `plateau`."""

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
    """Asks for the best dormant seeds once the loss has not fallen for `patience` steps.

    The loss falls when its slow average is below the lowest so far by the share `min_gain`. The
    rule asks in every step until something germinates; then it waits for `patience` steps again.

    Args:
      patience: steps without a fall.
      min_gain: relative fall that counts.
      score: see `periodic`.
      blueprint: see `periodic`.
      count: seeds in one request.

    Returns:
      The policy.

    Raises:
      ValueError: an unknown score, or `patience` or `count` below 1.
    """
    check_arguments(score, count, patience=patience)
    check_numbers(min_gain=min_gain)

    def init(layout: Layout) -> PlateauState:
        blueprint_by_group(layout, blueprint)
        return PlateauState(
            score=score_index(score),
            patience=jnp.int32(patience),
            min_gain=jnp.float32(min_gain),
            best=jnp.float32(LARGEST),
            last_gain=jnp.int32(0),
        )

    return rule("plateau", init, partial(_decide_plateau, blueprint, count))


def _decide_plateau(
    blueprint: str | None,
    count: int,
    layout: Layout,
    state: PlateauState,
    observation: Observation,
    requests: Requests,
    key: Key,
) -> tuple[PlateauState, Requests]:
    loss, seeds = observation.loss, observation.seeds
    bound = state.best - state.min_gain * jnp.abs(loss.slow)
    has_fallen = (loss.num_steps > 0) & (loss.slow < bound)
    is_newborn = (seeds.stage == Stage.GERMINATED) & (seeds.steps_in_stage == 0)
    has_grown = jnp.any(is_newborn & ~seeds.is_paused)
    state = state._replace(
        best=jnp.where(has_fallen, loss.slow, state.best),
        last_gain=jnp.where(has_fallen | has_grown, observation.step, state.last_gain),
    )
    return state, request_best(
        observation.step - state.last_gain >= state.patience,
        layout,
        observation,
        requests,
        score=state.score,
        blueprint=blueprint,
        count=count,
        key=key,
    )


@record
class ScriptState(NamedTuple):
    """State of `scripted`."""

    step: Int32[Array, "M"]
    commands: Commands


def scripted(events: Sequence[tuple[int, Command]], grafts: Sequence[str] = ()) -> Policy:
    """Makes requests from a list of commands, each in its step.

    Args:
      events: pairs `(step, command)` with commands from `esper_fn.commands`, at most one for each
        seed and step.
      grafts: names of the growth's alpha schedules, in order, where a command names one.

    Returns:
      The policy. Its `init` raises what `Growth.commands` raises.

    Raises:
      TypeError: an event is no such pair.
      ValueError: two commands for one seed in one step.
    """
    if not isinstance(events, Sequence) or isinstance(events, str):
        raise TypeError(f"events must be a list of (step, command), got {describe(events)}")
    for event in events:
        is_pair = isinstance(event, tuple | list) and len(event) == 2
        if not is_pair or not isinstance(event[1], Command):
            raise TypeError(
                "events must hold pairs (step, command), as `(100, commands.germinate(0, "
                f"'low_rank'))`, got {describe(event)}"
            )
        check_counts(**{"the step of an event": event[0]})
    pairs = [(step, command.seed) for step, command in events]
    doubled = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if doubled:
        raise ValueError(f"one command a seed and step, got several at (step, seed) {doubled}")

    def init(layout: Layout) -> ScriptState:
        packed = pack(layout, grafts, [command for _, command in events], len(events))
        steps = jnp.asarray([step for step, _ in events], jnp.int32)
        return ScriptState(step=steps, commands=packed)

    def decide(
        layout: Layout, state: ScriptState, observation: Observation, requests: Requests, key: Key
    ) -> tuple[ScriptState, Requests]:
        del key
        commands = state.commands
        row = jnp.where(state.step == observation.step, commands.seed, layout.num_seeds)

        def put(column: Array, values: Array) -> Array:
            return column.at[row].set(values, mode="drop")

        return state, requests._replace(
            kind=put(requests.kind, commands.kind),
            blueprint=put(requests.blueprint, commands.blueprint),
            graft=put(requests.graft, commands.graft),
            target=put(requests.target, commands.target),
        )

    return rule("scripted", init, decide)
