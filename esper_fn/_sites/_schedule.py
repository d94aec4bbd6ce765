"""Which adapters of a bank compute, and when: a loop over the live ones, or all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._control import vary_as_after
from esper_fn._sites._site import Site
from esper_fn._typing import Array, Bool, Float32, Implementation, Int32, Params
from esper_fn.blueprints._base import Blueprint


class SiteConfig(NamedTuple):
    """The static part of what a site computes."""

    site: Site
    blueprints: tuple[Blueprint, ...]
    """Of the site's banks, in order."""
    adapters_at_once: int | None
    """Live adapters that a round computes; None for every slot in one go, dead or alive."""
    implementation: Implementation
    is_stacked: bool = False
    """Whether the arrays have a leading axis of layers, over which a scan goes."""
    is_exact: bool = False
    """Whether derivatives are those of the forward pass; then all slots compute, unmeasured."""

    def anonymous(self) -> SiteConfig:
        """The same for every site that computes alike, so that JAX traces one function for all."""
        site = replace(self.site, name="site", layers=None, positions=1)
        return self._replace(site=site, is_stacked=False)


class BankView(NamedTuple):
    """Slots of one bank at one layer of a site, all of them or those that compute now."""

    adapters: Params
    chunk: Int32[Array, "P"]
    """The chunk each slot serves; negative for a slot that neither acts nor learns."""
    gains: Float32[Array, "P 4"]
    """The columns of `Gains`."""


Banks = tuple[BankView, ...]
Run = Callable[[Int32[Array, "n"], BankView, Any], Any]
"""`run(slot, rows, carry) -> carry` computes n slots."""


def for_each_live(adapters_at_once: int | None, bank: BankView, run: Run, carry: Any) -> Any:
    """`carry` after `run` for the live adapters in slot order, a few in each round.

    Args:
      adapters_at_once: n, or None to run all slots, dead or alive, in one go.
      bank: all slots.
      run: gets slot numbers and the rows of these slots. A row without a live adapter has a
        negative chunk; in a loop its slot number lies beyond the bank.
      carry: what `run` changes.
    """
    num_slots = bank.chunk.shape[0]
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    if adapters_at_once is None:
        return run(slots, bank, carry)

    def next_after(slot: Int32[Array, ""]) -> Int32[Array, "n"]:
        waiting = jnp.where((bank.chunk >= 0) & (slots > slot), slots, num_slots)
        if adapters_at_once == 1:
            return jnp.min(waiting, keepdims=True)
        return jnp.sort(waiting)[:adapters_at_once]

    def run_round(state: tuple[Int32[Array, "n"], Any]) -> tuple[Int32[Array, "n"], Any]:
        slot, carry = state
        safe = jnp.minimum(slot, num_slots - 1)
        rows: BankView = jax.tree.map(lambda leaf: take_rows(leaf, safe), bank)
        rows = rows._replace(chunk=jnp.where(slot < num_slots, rows.chunk, -1))
        return next_after(slot[-1]), run(slot, rows, carry)

    def is_any(state: tuple[Int32[Array, "n"], Any]) -> Bool[Array, ""]:
        return state[0][0] < num_slots

    state = next_after(jnp.int32(-1)), carry
    return jax.lax.while_loop(is_any, run_round, vary_as_after(run_round, state))[1]


def take_rows(leaf: Array, rows: Int32[Array, "n"]) -> Array:
    """`leaf[rows]` for rows within bounds."""
    if rows.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(leaf, rows[0], 1)
    return leaf.at[rows].get(mode="promise_in_bounds")


def add_rows(leaf: Array, rows: Int32[Array, "n"], values: Array) -> Array:
    """`leaf` plus `values` in n different rows; values for rows beyond its end must be 0."""
    if rows.shape[0] > 1:
        return leaf.at[rows].add(values, mode="drop")
    row = jnp.minimum(rows[0], leaf.shape[0] - 1)
    total = jax.lax.dynamic_slice_in_dim(leaf, row, 1) + values
    return jax.lax.dynamic_update_slice_in_dim(leaf, total, row, 0)


def set_rows(leaf: Array, rows: Int32[Array, "n"], values: Array) -> Array:
    """`leaf` with `values` in n different rows; where n > 1, rows beyond its end are dropped."""
    if rows.shape[0] > 1:
        return leaf.at[rows].set(values, mode="drop")
    return jax.lax.dynamic_update_slice_in_dim(leaf, values, rows[0], 0)
