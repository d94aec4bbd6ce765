"""Giving slots to seeds and taking them back, all seeds at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_fn._control import cond, once_if
from esper_fn._layout._directions import Memory, of_slots
from esper_fn._layout._layout import Layout, fresh_bank
from esper_fn._typing import Adapters, Array, Bool, Int8, Int32, Key, Params
from esper_fn.lifecycle import NONE

UNSERVED = -2
"""In place of a slot: the blueprint cannot grow at that site."""


def allocate(
    layout: Layout,
    owner: Int32[Array, "Q"],
    is_requested: Bool[Array, "S"],
    blueprint: Int8[Array, "S"],
) -> Int32[Array, "S"]:
    """A free slot for every request that its pool can serve.

    The request of rank k among a pool's requests (in order of the seeds) takes the free slot of
    rank k among the pool's free slots.

    Args:
      layout: the static layout.
      owner: the seed that holds each slot, or `NONE`.
      is_requested: who asks.
      blueprint: for which blueprint.

    Returns:
      The slot of each seed that got one, `UNSERVED` where the blueprint does not serve the site,
      else `NONE` (not asked, or its pool is full).
    """
    slot: Int32[Array, "S"] = cond(
        jnp.any(is_requested),
        lambda: _allocate(layout, owner, is_requested, blueprint),
        lambda: jnp.full(is_requested.shape, NONE, jnp.int32),
    )
    return slot


def _allocate(
    layout: Layout,
    owner: Int32[Array, "Q"],
    is_requested: Bool[Array, "S"],
    blueprint: Int8[Array, "S"],
) -> Int32[Array, "S"]:
    tables = layout.tables
    num_slots = layout.num_slots
    slots = jnp.arange(num_slots, dtype=jnp.int32)

    is_free = owner == NONE
    free_before = jnp.cumsum(is_free, dtype=jnp.int32) - is_free.astype(jnp.int32)
    pool_of_slot = jnp.asarray(tables.slot_pool_start)
    free_rank = free_before - free_before[pool_of_slot]
    by_rank = (
        jnp.full((num_slots,), NONE, jnp.int32)
        .at[jnp.where(is_free, pool_of_slot + free_rank, num_slots)]
        .set(slots, mode="drop")
    )

    group_start = layout.per_seed(tables.group_start)
    is_known = (blueprint >= 0) & (blueprint < len(layout.blueprints))
    slot = jnp.where(is_requested & ~is_known, UNSERVED, NONE).astype(jnp.int32)
    for index in range(len(layout.blueprints)):
        asks = is_requested & (blueprint == index)
        asked_before = jnp.cumsum(asks, dtype=jnp.int32) - asks.astype(jnp.int32)
        rank = asked_before - asked_before[group_start]
        pool = layout.per_seed(tables.pool_start[:, index])
        end = jnp.minimum(pool + rank, num_slots - 1)
        # The place `end` may lie in the next pool: then it belongs to somebody else.
        is_own = (pool >= 0) & (pool_of_slot[end] == pool) & (pool + rank == end)
        slot = jnp.where(asks & is_own, by_rank[end], slot)
        slot = jnp.where(asks & (pool < 0), UNSERVED, slot)
    return slot


def give(
    owner: Int32[Array, "Q"], slot: Int32[Array, "S"], is_given: Bool[Array, "S"]
) -> Int32[Array, "Q"]:
    """`owner` after the seeds where `is_given` took their `slot`."""

    def take() -> Int32[Array, "Q"]:
        seeds = jnp.arange(slot.shape[0], dtype=jnp.int32)
        return owner.at[jnp.where(is_given, slot, owner.shape[0])].set(seeds, mode="drop")

    taken: Int32[Array, "Q"] = cond(jnp.any(is_given), take, lambda: owner)
    return taken


def release(owner: Int32[Array, "Q"], holds_adapter: Bool[Array, "S"]) -> Int32[Array, "Q"]:
    """`owner` without the seeds that hold no adapter any more."""
    keeps = holds_adapter[jnp.maximum(owner, 0)]
    return jnp.where((owner != NONE) & keeps, owner, NONE)


def give_birth(
    layout: Layout,
    adapters: Adapters,
    is_born: Bool[Array, "Q"],
    key: Key,
    *,
    owner: Int32[Array, "Q"] | None = None,
    memory: Memory | None = None,
) -> Adapters:
    """Fresh parameters in the slots where `is_born`; the others keep theirs, bit for bit.

    Args:
      layout: the static layout.
      adapters: parameters of all banks.
      is_born: which slots.
      key: for the drawn parameters; the same ones with and without a memory.
      owner: who holds each slot, for `memory`.
      memory: directions of some seeds; their adapters begin along them where the blueprint can.
    """

    def bear(adapters: Adapters) -> Adapters:
        born: dict[str, dict[str, object]] = {site: dict(banks) for site, banks in adapters.items()}
        for index, bank in enumerate(layout.tables.banks):
            site = layout.sites[bank.site].name
            name = layout.names[bank.blueprint]
            here = jax.lax.slice_in_dim(is_born, bank.start, bank.start + bank.num_slots)

            def renew(old: object, here: Bool[Array, "P"] = here, index: int = index) -> object:
                bank, own_key = layout.tables.banks[index], jax.random.fold_in(key, index)
                fresh = fresh_bank(layout, bank, own_key)
                told = None if memory is None else memory[bank.site]
                can = layout.blueprints[bank.blueprint].init_along is not None
                if can and told is not None and owner is not None:
                    is_told, along = of_slots(bank, owner, told)
                    directed = fresh_bank(layout, bank, jax.random.clone(own_key), along)
                    fresh = _choose(is_told, directed, fresh)
                return _choose(here, fresh, old)

            born[site][name] = once_if(jnp.any(here), renew, adapters[site][name])
        return born

    return once_if(jnp.any(is_born), bear, adapters)


def _choose(is_first: Bool[Array, "P"], first: Params, second: Params) -> Params:
    return jax.tree.map(lambda a, b: select_slots(is_first, a, b), first, second)


def select_slots(is_first: Bool[Array, "P"], first: Array, second: Array) -> Array:
    """`where(is_first, first, second)` along the leading axis."""
    return jnp.where(is_first.reshape(-1, *(1,) * (first.ndim - 1)), first, second)
