"""Going back to parameters that were good, inside jit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._control import once_if
from esper_fn._growth import Growth, GrowthState, forget
from esper_fn._layout import per_slot_tree, select_slots
from esper_fn._typing import Adapters, Array, Int32, Params
from esper_fn.governors import Alarm, Verdict
from esper_fn.lifecycle import LossTrack

NUM_SNAPSHOTS = 3
"""Default of the ring: the fewest with which a second emergency can go back further."""


class Snapshot(NamedTuple):
    """The numbers of one moment; stages are no part of it."""

    params: Params
    opt_state: Any
    adapters: Adapters
    loss: LossTrack
    generation: Int32[Array, "Q"]
    """Adapters that were born in each slot by then; never restored."""


class Anchor(NamedTuple):
    """A ring of H snapshots, and which of them a roll-back restores.

    The `num_held` snapshots that count stand at `newest`, `newest - 1`, ... around the ring. What
    the other places hold is never read.
    """

    snapshots: Snapshot
    """Every leaf has a leading axis H."""
    newest: Int32[Array, ""]
    """Place of the newest snapshot in the ring."""
    num_held: Int32[Array, ""]
    """Snapshots there are to go back to, at least 1."""
    age: Int32[Array, ""]
    """Steps since the newest one was taken or restored."""
    due: Int32[Array, ""]
    """The age at which the next one is taken."""
    every: Int32[Array, ""]

    @property
    def num_snapshots(self) -> int:
        """H, static."""
        return int(self.snapshots.generation.shape[-2])


def anchor(
    params: Params,
    opt_state: Any,
    state: GrowthState,
    *,
    every: int = 50,
    num_snapshots: int = NUM_SNAPSHOTS,
) -> Anchor:
    """An anchor at the present.

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
      num_snapshots: H, static, at least 1. For none, keep no anchor.

    Raises:
      ValueError: `every` or `num_snapshots` is no int of at least 1.
    """
    for name, given in (("every", every), ("num_snapshots", num_snapshots)):
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ValueError(
                f"{name} must be an int, at least 1, got {given!r}; to do without roll-backs, keep "
                "no anchor (`anchor_every=None` or `num_snapshots=0` in `runtime`)"
            )
    now = snapshot(params, opt_state, state)
    return Anchor(
        # A stack is divided among devices as what it is made of.
        snapshots=jax.tree.map(lambda leaf: jnp.stack([leaf] * num_snapshots), now),
        newest=jnp.int32(0),
        num_held=jnp.int32(1),
        age=jnp.int32(0),
        due=jnp.int32(every),
        every=jnp.int32(every),
    )


def snapshot(params: Params, opt_state: Any, state: GrowthState) -> Snapshot:
    """The present."""
    return Snapshot(
        params=params,
        opt_state=opt_state,
        adapters=state.adapters,
        loss=state.loss,
        generation=state.generation,
    )


def guard(
    growth: Growth,
    held: Anchor,
    params: Params,
    opt_state: Any,
    state: GrowthState,
    verdict: Verdict,
) -> tuple[Params, Any, GrowthState, Anchor]:
    """Restores what the verdict wants restored, and renews the anchor in calm times.

    Host parameters, optimiser state, adapters and loss averages go back together. Seeds keep their
    stages, which follow the table alone: those the verdict quarantines are ROLLED_BACK already. An
    adapter born after the snapshot keeps its parameters and starts with fresh optimiser state.

    Args:
      growth: the static part.
      held: the anchor before the step.
      params: after the step.
      opt_state: after the step.
      state: after `Growth.update`.
      verdict: `info.verdict` of that update.

    Returns:
      params, optimiser state, growth state and anchor for the next step.
    """
    places = held.num_snapshots
    goes_back = verdict.should_roll_back
    now = snapshot(params, opt_state, state)

    is_calm = (verdict.alarm == Alarm.CALM) & ~jnp.asarray(verdict.is_uneasy) & ~goes_back
    is_due = (held.age + 1 >= held.due) & is_calm
    into = (held.newest + 1) % places
    restored = jnp.where(held.num_held > 1, (held.newest - 1) % places, held.newest)

    def renew(ring: Snapshot) -> Snapshot:
        return jax.tree.map(
            lambda kept, leaf: jax.lax.dynamic_update_index_in_dim(
                kept, jnp.asarray(leaf), into, 0
            ),
            ring,
            now,
        )

    ring = once_if(is_due, renew, held.snapshots)

    def go_back(now: Snapshot) -> Snapshot:
        old = jax.tree.map(
            lambda kept: jax.lax.dynamic_index_in_dim(kept, restored, 0, keepdims=False), ring
        )
        young = per_slot_tree(growth.layout, now.generation != old.generation)
        adapters = {
            site: {
                name: jax.tree.map(
                    lambda new, kept, of=young[site][name]: select_slots(of, new, kept),
                    bank,
                    old.adapters[site][name],
                )
                for name, bank in at_site.items()
            }
            for site, at_site in now.adapters.items()
        }
        return old._replace(adapters=adapters, generation=now.generation)

    chosen = once_if(goes_back, go_back, now)
    memory = state.memory
    if memory is not None:
        memory = forget(memory, goes_back)
    state = state._replace(adapters=chosen.adapters, loss=chosen.loss, memory=memory)
    held = Anchor(
        snapshots=ring,
        newest=jnp.where(goes_back, restored, jnp.where(is_due, into, held.newest)),
        num_held=jnp.where(
            goes_back,
            jnp.maximum(held.num_held - 1, 1),
            jnp.where(is_due, jnp.minimum(held.num_held + 1, places), held.num_held),
        ),
        age=jnp.where(goes_back | is_due, 0, held.age + 1),
        due=jnp.where(goes_back, places * held.every, jnp.where(is_due, held.every, held.due)),
        every=held.every,
    )
    return chosen.params, chosen.opt_state, state, held
