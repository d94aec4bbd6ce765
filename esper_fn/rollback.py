"""Going back to parameters that were good, inside jit: `(init, update)` of a ring of snapshots."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._arguments import is_count
from esper_fn._control import once_if
from esper_fn._growth import Growth, GrowthState, LossFn
from esper_fn._layout import map_banks, select_slots, split_by_bank
from esper_fn._records import record
from esper_fn._survey import clear_directions
from esper_fn._typing import Adapters, Array, Bool, Float32, Int32, Params
from esper_fn.governors import Alarm, Verdict
from esper_fn.lifecycle import NONE, LossTrack

NUM_SNAPSHOTS = 3
"""Default size of the ring: the fewest with which a second emergency can go back further."""


@record
class Snapshot(NamedTuple):
    """The numbers of one moment; stages are no part of it."""

    params: Params
    opt_state: Any
    adapters: Adapters
    loss: LossTrack
    generation: Int32[Array, "Q"]
    """How many adapters each slot had had by then; never restored."""


@record
class Ring(NamedTuple):
    """H snapshots, and when each of them was taken.

    The newest has the largest of `steps`; older ones stand before it around the ring.
    """

    snapshots: Snapshot
    """Every leaf has a leading axis H."""
    steps: Int32[Array, "H"]
    """`GrowthState.step` when each was taken, or `NONE` where nothing is to go back to."""
    next_step: Int32[Array, ""]
    """The step from which the next one may be taken."""
    every: Int32[Array, ""]
    is_elevated: Bool[Array, ""]
    """Whether the governor thought the last loss too high."""

    @property
    def num_snapshots(self) -> int:
        """H, static."""
        return int(self.snapshots.generation.shape[-2])


def init(
    params: Params,
    opt_state: Any,
    state: GrowthState,
    *,
    every: int = 50,
    num_snapshots: int = NUM_SNAPSHOTS,
) -> Ring:
    """A ring that holds the present.

    With H snapshots a roll-back restores the newest but one, since the newest may have been taken
    while things went wrong already: it goes back at least `every` and less than `2 * every` calm
    steps. What is newer is dropped, and the next snapshot is taken `H * every` calm steps later. So
    an emergency within `H * every` steps of the last one goes one snapshot further back, until only
    the oldest is left, which stays. With H = 2 that is the case after the first; with H = 1 the
    newest snapshot is all there is.

    The memory is H times that of parameters, optimiser state and adapters: with Adam and H = 3,
    nine times the parameters' own. A step copies nothing of it; every `every` steps one snapshot is
    written in place.

    Args:
      params: of the host.
      opt_state: of the optimiser.
      state: of the growth.
      every: steps between snapshots. Take more than the governor needs to see a divergence.
      num_snapshots: H, static, at least 1. For none, keep no ring.

    Returns:
      The ring for the first `update`.

    Raises:
      ValueError: `every` or `num_snapshots` is no int of at least 1.
    """
    for name, value in (("every", every), ("num_snapshots", num_snapshots)):
        if not is_count(value):
            raise ValueError(
                f"{name} must be an int, at least 1, got {value!r}; to do without roll-backs, keep "
                "no ring (`snapshot_every=None` or `num_snapshots=0` in `runtime`)"
            )
    return _first_ring(take_snapshot(params, opt_state, state), state.step, every, num_snapshots)


@partial(jax.jit, static_argnums=3)
def _first_ring(now: Snapshot, step: Any, every: Any, num_snapshots: int) -> Ring:
    step, every = jnp.asarray(step, jnp.int32), jnp.asarray(every, jnp.int32)
    return Ring(
        # A stack is divided among devices as what it is made of.
        snapshots=jax.tree.map(lambda leaf: jnp.stack([leaf] * num_snapshots), now),
        steps=jnp.where(jnp.arange(num_snapshots) == 0, step, NONE),
        next_step=step + every,
        every=every,
        is_elevated=jnp.asarray(False),
    )


def take_snapshot(params: Params, opt_state: Any, state: GrowthState) -> Snapshot:
    """The numbers of the present."""
    return Snapshot(
        params=params,
        opt_state=opt_state,
        adapters=state.adapters,
        loss=state.loss,
        generation=state.generation,
    )


def reference_loss(
    growth: Growth, ring: Ring, loss_fn: LossFn, state: GrowthState, *args: Any, **kwargs: Any
) -> tuple[Float32[Array, ""], Ring]:
    """The loss that the parameters a roll-back would restore have on the batch of this step.

    It is computed only while the loss is elevated, and NaN otherwise. Where the snapshot does no
    better than the parameters of today, it is the data that changed. Pass it to `Growth.update`.

    Args:
      growth: the static part.
      ring: from before the step.
      loss_fn: `loss_fn(params, seeds, *args, **kwargs)`, a scalar.
      state: before the step.
      *args: of `loss_fn`.
      **kwargs: of `loss_fn`.

    Returns:
      The loss, and the ring for `update`: the same snapshots, in the same buffers.
    """

    def measure(carry: tuple[Array, Snapshot]) -> tuple[Array, Snapshot]:
        snapshots, target = carry[1], _places(ring).target
        old = _snapshot(snapshots, target)
        banks = _with_newborns(growth, state.adapters, state.generation, old)
        loss = loss_fn(old.params, growth.seeds(state._replace(adapters=banks)), *args, **kwargs)
        # Written back as it is, after it was read: of what a loop only reads, or may write before
        # it reads, the compiler makes a copy.
        loss, old = jax.lax.optimization_barrier((jax.lax.stop_gradient(loss), old))
        return jnp.asarray(loss, jnp.float32), _put(snapshots, target, old)

    loss, snapshots = once_if(ring.is_elevated, measure, (jnp.float32(jnp.nan), ring.snapshots))
    return loss, ring._replace(snapshots=snapshots)


def update(
    growth: Growth,
    ring: Ring,
    params: Params,
    opt_state: Any,
    state: GrowthState,
    verdict: Verdict,
) -> tuple[Params, Any, GrowthState, Ring, Int32[Array, ""]]:
    """Restores a snapshot where the verdict says so, and takes new ones in calm times.

    Host parameters, optimiser state, adapters and loss averages go back together. Seeds keep their
    stages, which follow the table alone: those the verdict quarantines are ROLLED_BACK already. An
    adapter born after the snapshot keeps its parameters and starts with fresh optimiser state.

    Args:
      growth: the static part.
      ring: from before the step.
      params: after the step.
      opt_state: after the step.
      state: after `Growth.update`.
      verdict: `info.verdict` of that update.

    Returns:
      `(params, opt_state, state, ring, steps_undone)`: the first four are for the next step. The
      last says how many steps back the restored snapshot lies, 0 where nothing was restored; it
      belongs into `StepInfo.steps_undone`.
    """
    goes_back = verdict.should_roll_back
    is_calm = (verdict.alarm == Alarm.CALM) & ~jnp.asarray(verdict.is_elevated) & ~goes_back
    is_due = (state.step >= ring.next_step) & is_calm
    places = _places(ring)
    now = take_snapshot(params, opt_state, state)

    snapshots = once_if(
        is_due, lambda snapshots: _put(snapshots, places.after, now), ring.snapshots
    )

    def restore(now: Snapshot) -> Snapshot:
        old = _snapshot(snapshots, places.target)
        adapters = _with_newborns(growth, now.adapters, now.generation, old)
        return old._replace(adapters=adapters, generation=now.generation)

    chosen = once_if(goes_back, restore, now)
    directions = state.directions
    if directions is not None:
        directions = clear_directions(directions, goes_back)
    steps_undone = jnp.where(goes_back, state.step - ring.steps[places.target], 0)
    ring = ring._replace(snapshots=snapshots, is_elevated=jnp.asarray(verdict.is_elevated))
    ring = _dated(ring, places, state.step, is_due, goes_back)
    state = state._replace(adapters=chosen.adapters, loss=chosen.loss, directions=directions)
    return chosen.params, chosen.opt_state, state, ring, steps_undone


class _Places(NamedTuple):
    """Places around the ring."""

    newest: Int32[Array, ""]
    after: Int32[Array, ""]
    """Where the next snapshot goes."""
    target: Int32[Array, ""]
    """Which a roll-back restores: the newest but one, if there is one."""


def _places(ring: Ring) -> _Places:
    size = ring.num_snapshots
    newest = jnp.argmax(ring.steps).astype(jnp.int32)
    before = (newest - 1) % size
    return _Places(
        newest=newest,
        after=(newest + 1) % size,
        target=jnp.where(ring.steps[before] == NONE, newest, before),
    )


def _dated(ring: Ring, places: _Places, step: Any, is_due: Any, goes_back: Any) -> Ring:
    """The ring with the steps that its snapshots have after this step."""
    size, index = ring.num_snapshots, jnp.arange(ring.num_snapshots)
    is_taken = is_due & (index == places.after)
    is_dropped = goes_back & (index == places.newest) & (places.target != places.newest)
    wait = jnp.where(goes_back, size * ring.every, ring.every)
    return ring._replace(
        steps=jnp.where(is_dropped, NONE, jnp.where(is_taken, step, ring.steps)),
        next_step=jnp.where(goes_back | is_due, step + wait, ring.next_step),
    )


def _snapshot(snapshots: Snapshot, index: Int32[Array, ""]) -> Snapshot:
    """One of the ring's."""
    chosen: Snapshot = jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, index, 0, keepdims=False), snapshots
    )
    return chosen


def _put(snapshots: Snapshot, index: Int32[Array, ""], snapshot: Snapshot) -> Snapshot:
    """The ring's snapshots with another one at a place."""
    after: Snapshot = jax.tree.map(
        lambda rows, leaf: jax.lax.dynamic_update_index_in_dim(rows, jnp.asarray(leaf), index, 0),
        snapshots,
        snapshot,
    )
    return after


def _with_newborns(
    growth: Growth, adapters: Adapters, generation: Int32[Array, "Q"], old: Snapshot
) -> Adapters:
    """The old adapters, and the present one in each slot where one was born since."""
    is_newborn = split_by_bank(growth.layout, generation != old.generation)
    return map_banks(select_slots, is_newborn, adapters, old.adapters)


__all__ = [
    "NUM_SNAPSHOTS",
    "Ring",
    "Snapshot",
    "init",
    "reference_loss",
    "take_snapshot",
    "update",
]
