"""Allocation of slots, for all seeds at once."""

from __future__ import annotations

import jax.numpy as jnp

from esper_fn._layout._layout import Layout
from esper_fn._typing import Array, Bool, Int8, Int32
from esper_fn.lifecycle._state import NONE, UNSERVED


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
      is_requested: seeds that ask for a slot.
      blueprint: the blueprint each asks for.

    Returns:
      The slot of each seed that got one, `UNSERVED` where the blueprint does not serve the site,
      else `NONE` (not asked, or its pool is full).
    """
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


def free_slots(owner: Int32[Array, "Q"], has_adapter: Bool[Array, "S"]) -> Int32[Array, "Q"]:
    """`owner` without the seeds that have no adapter any more.

    Args:
      owner: the seed that holds each slot, or `NONE`.
      has_adapter: seeds that keep their slots.
    """
    keeps = has_adapter[jnp.maximum(owner, 0)]
    return jnp.where((owner != NONE) & keeps, owner, NONE)
