"""Going back to parameters that were good, inside jit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._control import once_if
from esper_fn._growth import Growth, GrowthState, forget
from esper_fn._lattice import per_slot_tree, select_slots
from esper_fn._typing import Array, Bodies, Bool, Int32, Params
from esper_fn.governors import Alarm, Verdict
from esper_fn.lifecycle import LossTrack


class Snapshot(NamedTuple):
    """The numbers of one moment; stages are no part of it."""

    params: Params
    opt_state: Any
    bodies: Bodies
    loss: LossTrack


class Anchor(NamedTuple):
    """Two snapshots: what a roll-back restores, and what will take its place."""

    older: Snapshot
    newer: Snapshot
    is_born_since: Bool[Array, "Q"]
    """Slots that got a newborn body after `older` was taken."""
    is_born_newer: Bool[Array, "Q"]
    """The same for `newer`."""
    age: Int32[Array, ""]
    """Steps since `newer` was taken."""
    every: Int32[Array, ""]


def anchor(params: Params, opt_state: Any, state: GrowthState, *, every: int = 50) -> Anchor:
    """An anchor at the present.

    Args:
      params: of the host.
      opt_state: of the optimiser.
      state: of the growth.
      every: steps between snapshots; a roll-back goes back between `every` and `2 * every` steps.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every!r}")
    now = Snapshot(params=params, opt_state=opt_state, bodies=state.bodies, loss=state.loss)
    # Two copies: buffers of one tree may be donated only once.
    return Anchor(
        older=jax.tree.map(jnp.copy, now),
        newer=jax.tree.map(jnp.copy, now),
        is_born_since=jnp.zeros_like(state.is_born),
        is_born_newer=jnp.zeros_like(state.is_born),
        age=jnp.int32(0),
        every=jnp.int32(every),
    )


class _Guarded(NamedTuple):
    """What a roll-back and a renewal of the anchor work on, in place."""

    now: Snapshot
    is_born: Bool[Array, "Q"]
    held: Anchor


def guard(
    growth: Growth,
    held: Anchor,
    params: Params,
    opt_state: Any,
    state: GrowthState,
    verdict: Verdict,
) -> tuple[Params, Any, GrowthState, Anchor]:
    """Restores what the verdict wants restored, and renews the anchor in calm times.

    Host parameters, optimiser state, bodies and loss averages go back together. Seeds keep their
    stages, which follow the table alone: those the verdict quarantines are ROLLED_BACK already. A
    body born after the snapshot keeps its parameters and starts with fresh optimiser state.

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
    born_since = held.is_born_since | state.is_born
    born_newer = held.is_born_newer | state.is_born
    now = Snapshot(params=params, opt_state=opt_state, bodies=state.bodies, loss=state.loss)

    aged = held._replace(is_born_since=born_since, is_born_newer=born_newer, age=held.age + 1)

    def go_back(carry: _Guarded) -> _Guarded:
        young = per_slot_tree(growth.lattice, born_since)
        older = carry.held.older
        bodies = {
            site: {
                name: jax.tree.map(
                    lambda new, old, is_young=young[site][name]: select_slots(is_young, new, old),
                    bank,
                    older.bodies[site][name],
                )
                for name, bank in at_site.items()
            }
            for site, at_site in carry.now.bodies.items()
        }
        restored = older._replace(bodies=bodies)
        kept = carry.held._replace(
            older=restored,
            newer=restored,
            is_born_since=born_since,
            is_born_newer=born_since,
            age=jnp.int32(0),
        )
        return _Guarded(now=restored, is_born=born_since, held=kept)

    def renew(carry: _Guarded) -> _Guarded:
        renewed = Anchor(
            older=carry.held.newer,
            newer=carry.now,
            is_born_since=born_newer,
            is_born_newer=jnp.zeros_like(born_newer),
            age=jnp.int32(0),
            every=held.every,
        )
        return carry._replace(held=renewed)

    is_due = (aged.age >= held.every) & (verdict.alarm == Alarm.CALM)
    guarded = _Guarded(now=now, is_born=state.is_born, held=aged)
    guarded = once_if(is_due & ~verdict.should_roll_back, renew, guarded)
    chosen, is_born, held = once_if(verdict.should_roll_back, go_back, guarded)
    memory = state.memory
    if memory is not None:
        memory = forget(memory, verdict.should_roll_back)
    state = state._replace(bodies=chosen.bodies, loss=chosen.loss, is_born=is_born, memory=memory)
    return chosen.params, chosen.opt_state, state, held
