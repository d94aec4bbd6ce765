"""A step of a growing network: the adapters' parameters, and every seed's life."""

from __future__ import annotations

from operator import itemgetter

import jax
import jax.numpy as jnp

from esper_fn._control import once_if
from esper_fn._growth._advance import advance
from esper_fn._growth._checks import check_adapters, check_state
from esper_fn._growth._newborns import init_newborns
from esper_fn._growth._state import GrowthState, Parts, StepInfo
from esper_fn._layout import Layout, join_banks, map_banks, select_slots, slot_gains, split_by_bank
from esper_fn._sites import Statistics
from esper_fn._typing import Adapters, Array, Bool, Float32, Params, Scalar
from esper_fn.lifecycle._commands import Commands
from esper_fn.lifecycle._state import NONE


def update(
    parts: Parts,
    state: GrowthState,
    adapters: Adapters,
    statistics: Statistics,
    loss: Scalar,
    commands: Commands | None = None,
    reference_loss: Scalar | None = None,
) -> tuple[GrowthState, StepInfo]:
    """The state after a step, and what happened; arguments and results as of `Growth.update`."""
    check_state(parts, state, "update(state, adapters, statistics, loss, commands)")
    check_adapters(parts.layout, adapters, "adapters")
    accepted, drift, has_broken = _accept(parts.layout, state, adapters)
    after, info, birth_key = advance(
        parts,
        state,
        statistics,
        loss,
        drift=drift,
        has_broken=has_broken,
        commands=commands,
        reference_loss=reference_loss,
    )
    fresh = init_newborns(
        parts.layout,
        accepted,
        after.generation != state.generation,
        birth_key,
        owner=after.owner,
        directions=state.directions,
    )
    return after._replace(adapters=fresh), info


def _accept(
    layout: Layout, state: GrowthState, adapters: Adapters
) -> tuple[Adapters, Float32[Array, "S"], Bool[Array, "S"]]:
    """Finite parameters of adapters that learn, how far each adapter moved, and which ones broke.

    All other adapters keep the parameters they had.
    """
    learns = slot_gains(state.seeds, state.owner, state.settings)[:, 1] != 0
    learns_by_bank = split_by_bank(layout, learns)

    def accept(before: tuple[Adapters, Array, Array]) -> tuple[Adapters, Array, Array]:
        banks = map_banks(_accept_bank, before[0], adapters, learns_by_bank)
        parameters, drift, has_broken = (map_banks(itemgetter(part), banks) for part in range(3))
        return parameters, join_banks(layout, drift), join_banks(layout, has_broken)

    before = (state.adapters, jnp.zeros(learns.shape, jnp.float32), jnp.zeros_like(learns))
    accepted, drift, has_broken = once_if(jnp.any(learns), accept, before)
    # Constant, like all that is measured; the root has no derivative where nothing moved.
    drift = jax.lax.stop_gradient(drift)
    seed = jnp.where(state.owner == NONE, layout.num_seeds, state.owner)
    drifts = jnp.zeros((layout.num_seeds,), jnp.float32).at[seed].set(drift, mode="drop")
    broken = jnp.zeros((layout.num_seeds,), bool).at[seed].set(has_broken, mode="drop")
    return accepted, drifts, broken


def _accept_bank(
    old: Params, new: Params, learns: Bool[Array, "P"]
) -> tuple[Params, Float32[Array, "P"], Bool[Array, "P"]]:
    """One bank's parameters, how far they moved over their size, and which adapters broke."""
    if not jax.tree.leaves(old):
        return old, jnp.zeros(learns.shape, jnp.float32), jnp.zeros_like(learns)
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    moved = sum(_square(b.astype(jnp.float32) - a.astype(jnp.float32)) for a, b in pairs)
    size = sum(_square(a.astype(jnp.float32)) for a, _ in pairs)
    is_accepted = learns & jnp.isfinite(moved)
    # An adapter of zero has no size to compare with.
    drift = jnp.sqrt(moved) / jnp.where(size > 0, jnp.sqrt(size), jnp.inf)
    drift = jnp.where(is_accepted, drift, 0.0)
    return select_slots(is_accepted, new, old), drift, learns & ~is_accepted


def _square(leaf: Array) -> Float32[Array, "P"]:
    return jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim)))
