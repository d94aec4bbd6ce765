"""A loop over the live adapters of a bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._control import once_if
from esper_fn._typing import Array, Bool, Float32, Int32, Params
from esper_fn.base import AdapterSpec, Blueprint, Implementation
from esper_kernels import Chunking


class Wiring(NamedTuple):
    """The static part of a site's forward."""

    source: Chunking
    target: Chunking
    is_span: bool
    spec: AdapterSpec
    blueprints: tuple[Blueprint, ...]
    """Of the site's banks, in order."""
    at_once: int | None
    """Adapters a round computes; None for every slot in one go, dead or alive."""
    implementation: Implementation


class BankView(NamedTuple):
    """One bank at one layer of a site, as the forward needs it."""

    adapters: Params
    chunk: Int32[Array, "P"]
    """The chunk each slot serves; negative for a free slot."""
    gains: Float32[Array, "P 4"]
    """The columns of `Gains`; all zero for a free slot."""


Banks = tuple[BankView, ...]


def is_live(bank: BankView) -> Bool[Array, "P"]:
    """Slots whose adapter is at work."""
    return (bank.chunk >= 0) & jnp.any(bank.gains != 0, axis=-1)


class Live(NamedTuple):
    """The slots of one bank that one round computes."""

    slot: Int32[Array, "n"]
    """Which ones; beyond the bank where there is nothing to do."""
    adapters: Params
    chunk: Int32[Array, "n"]
    """Negative for a slot with nothing to do."""
    gains: Float32[Array, "n 4"]


def rounds(wiring: Wiring, bank: BankView, run: Callable[[Live, Any], Any], carry: Any) -> Any:
    """`carry` after `run(live, carry)` for a few live adapters at a time, in slot order."""
    num_slots, at_once = bank.chunk.shape[0], wiring.at_once
    lives = is_live(bank)
    chunk = jnp.where(lives, bank.chunk, -1)
    if at_once is None:
        every = jnp.arange(num_slots, dtype=jnp.int32)
        return run(Live(slot=every, adapters=bank.adapters, chunk=chunk, gains=bank.gains), carry)
    num_live = jnp.sum(lives, dtype=jnp.int32)
    order = jnp.argsort(~lives, stable=True).astype(jnp.int32)
    order = jnp.concatenate([order, jnp.full((at_once - 1,), num_slots, jnp.int32)])

    def once(state: Any) -> Any:
        done, carry = state
        slot = jax.lax.dynamic_slice_in_dim(order, done, at_once)
        safe = jnp.minimum(slot, num_slots - 1)
        adapters, gains = jax.tree.map(lambda leaf: _take(leaf, safe), (bank.adapters, bank.gains))
        here = jnp.where(slot < num_slots, chunk[safe], -1)
        return done + at_once, run(
            Live(slot=slot, adapters=adapters, chunk=here, gains=gains), carry
        )

    _, carry = jax.lax.while_loop(lambda state: state[0] < num_live, once, (jnp.int32(0), carry))
    return carry


def if_any_live(
    wiring: Wiring, banks: Sequence[BankView], run: Callable[[Any], Any], carry: Any
) -> Any:
    """`run(carry)` where an adapter lives, else `carry`."""
    if wiring.at_once is None or not banks:
        return run(carry)
    is_any = jnp.any(jnp.concatenate([is_live(bank) for bank in banks]))
    return once_if(is_any, run, carry)


def _take(leaf: Array, rows: Int32[Array, "n"]) -> Array:
    return leaf.at[rows].get(mode="promise_in_bounds")
