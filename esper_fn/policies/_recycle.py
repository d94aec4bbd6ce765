"""A rule for data that change: it releases adapters, so that new ones can take their places."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._arguments import check_counts, check_numbers
from esper_fn._control import cond
from esper_fn._layout import Layout
from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.lifecycle import NONE, Stage, is_in
from esper_fn.lifecycle._commands import Kind, Requests
from esper_fn.lifecycle._state import SLOW_STEPS
from esper_fn.policies._base import Observation, Policy, rule

_DRIFT = 0.25
"""Standard deviations that the loss may lie above its average without counting."""
_LARGEST_RISE = 4.0
"""Standard deviations that one step counts at most."""
_RELEASED_TO = {
    Stage.GRAFTING: Stage.CULLED,
    Stage.EVALUATING: Stage.CULLED,
    Stage.FINE_TUNING: Stage.CULLED,
    Stage.FOSSILIZED: Stage.DORMANT,
}
"""Stages from which the table lets an acting adapter be released, and where its seed goes then."""


@record
class RecycleState(NamedTuple):
    """State of `recycle`."""

    threshold: Float32[Array, ""]
    patience: Int32[Array, ""]
    every: Int32[Array, ""]
    share: Float32[Array, ""]
    rise: Float32[Array, ""]
    """How far the loss has risen, in standard deviations summed over steps."""
    wait: Int32[Array, ""]
    """Steps until the next release at the earliest."""


def recycle(
    *,
    share: float = 1.0,
    threshold: float = 20.0,
    every: int | None = None,
    patience: int = 100,
) -> Policy:
    """Releases the least useful adapters when the data change, for runs without an end.

    A network that learns one task after the other learns each of them worse. New adapters in the
    place of old ones learn as fast as in the first step. This rule needs no knowledge of the tasks,
    since it watches the training loss. With `z` the loss of a step less its slow average, in
    standard deviations and at most 4, it sums

        rise <- max(0, rise + z - 1/4)

    (Page, Continuous inspection schemes, Biometrika 41, 1954) and takes a sum above `threshold` for
    a change of the data. Then it releases `share` of the adapters that act, those of least worth
    per parameter first: the worth of an adapter is the slow average of its utility, the first-order
    fall of the loss through it. Fossils are among them; an adapter in STABILIZATION is not.

    It only releases. A rule before it asks for new adapters: `chain(periodic(every=10, count=8),
    recycle())`. A seed that was not yet FOSSILIZED waits for the end of its embargo first, which
    `settings(embargo_steps=0)` leaves out. docs/how_to/streams.md has a whole example.

    Args:
      share: share of the acting adapters that a change releases, in (0, 1]; at least one adapter.
      threshold: the sum that counts as a change, positive. Noise that is
        independent from step to step exceeds the default never (normal) to about twice in a million
        steps (squared normal, log-normal with sigma 1); noise that is correlated exceeds it more.
      every: steps after which the least useful adapter is released in any case; None for never.
      patience: steps after a change in which the loss is not watched: it is high by itself then.

    Returns:
      The policy.

    Raises:
      ValueError: an argument is out of its range.
    """
    check_numbers(share=share, threshold=threshold)
    check_counts(patience=patience, **({} if every is None else {"every": every}))
    if not (0 < share <= 1 and threshold > 0 and patience >= 1 and (every is None or every >= 1)):
        raise ValueError(
            "need 0 < share <= 1, threshold > 0, patience >= 1 and every >= 1 or None; got "
            f"{share}, {threshold}, {patience}, {every}"
        )

    def init(layout: Layout) -> RecycleState:
        return RecycleState(
            threshold=jnp.float32(threshold),
            patience=jnp.int32(patience),
            every=jnp.int32(every or 0),
            share=jnp.float32(share),
            rise=jnp.float32(0),
            wait=jnp.int32(0),
        )

    return rule("recycle", init, _decide)


def _decide(
    layout: Layout, state: RecycleState, observation: Observation, requests: Requests, key: Key
) -> tuple[RecycleState, Requests]:
    del key
    rise = jnp.where(state.wait > 0, 0.0, _rise(state.rise, observation))
    has_changed = rise > state.threshold
    is_due = (state.every > 0) & ((observation.step + 1) % jnp.maximum(state.every, 1) == 0)
    is_released = cond(
        has_changed | is_due,
        lambda: _least_worthy(layout, observation, has_changed, state.share),
        lambda: jnp.zeros((layout.num_seeds,), bool),
    )
    stage = observation.seeds.stage
    target = jnp.full_like(stage, NONE)
    for source, successor in _RELEASED_TO.items():
        target = jnp.where(stage == source, jnp.int8(successor), target)
    none = jnp.int8(NONE)
    requests = requests._replace(
        kind=jnp.where(is_released, jnp.int8(Kind.TRANSITION), requests.kind),
        blueprint=jnp.where(is_released, none, requests.blueprint),
        target=jnp.where(is_released, target, requests.target),
    )
    return state._replace(
        rise=jnp.where(has_changed, 0.0, rise),
        wait=jnp.where(has_changed, state.patience, jnp.maximum(state.wait - 1, 0)),
    ), requests


def _rise(rise: Float32[Array, ""], observation: Observation) -> Float32[Array, ""]:
    """Page's sum after the loss of this step."""
    track, loss = observation.loss, observation.step_loss
    deviation = jnp.sqrt(track.square)
    z = (loss - track.slow) / jnp.where(deviation > 0, deviation, jnp.inf)
    is_known = jnp.isfinite(loss) & (track.num_steps > SLOW_STEPS)
    counted = jnp.where(is_known, jnp.minimum(z, _LARGEST_RISE) - _DRIFT, 0.0)
    return jnp.maximum(rise + counted, 0.0)


def _least_worthy(
    layout: Layout,
    observation: Observation,
    has_changed: Bool[Array, ""],
    share: Float32[Array, ""],
) -> Bool[Array, "S"]:
    """The adapters to release: a share of all after a change, else one."""
    seeds = observation.seeds
    can = is_in(seeds.stage, list(_RELEASED_TO)) & ~seeds.is_paused
    tables = layout.tables
    costs = jnp.asarray(tables.costs[tables.slot_group, tables.slot_blueprint])
    worth = seeds.telemetry.utility_slow / jnp.maximum(costs[jnp.maximum(seeds.slot, 0)], 1.0)
    worth = jnp.where(can, worth, jnp.inf)
    rank = jnp.argsort(jnp.argsort(worth, stable=True), stable=True)
    part = jnp.round(share * jnp.sum(can, dtype=jnp.float32)).astype(jnp.int32)
    return can & (rank < jnp.where(has_changed, jnp.maximum(part, 1), 1))
