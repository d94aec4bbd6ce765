"""What a survey finds is remembered, and spent on the seed's next adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import telemetry
from esper_fn._layout import Directions, Layout, Memory
from esper_fn._sites import Moments
from esper_fn._typing import Array, Bool, DType, Float32, Int8, Int32, Key, Params
from esper_fn.base import AdapterSpec, Blueprint
from esper_fn.lifecycle import NONE


def remember(
    layout: Layout,
    memory: Memory,
    moments: Sequence[Moments],
    is_eligible: Bool[Array, "S"],
    potential: Float32[Array, "S"],
) -> Memory:
    """The directions of each layer's eligible seeds of highest potential; all others are forgotten.

    A potential of zero, and directions that are not finite or none at all, are not remembered.
    """
    kept: list[Directions | None] = []
    first = 0
    for site, old, moment in zip(layout.sites, memory, moments, strict=True):
        here = slice(first, first + site.num_seeds)
        found = None
        if old is not None:
            worth = jnp.where(is_eligible & (potential > 0), potential, -jnp.inf)[here]
            rows: Any = jax.tree.map(
                lambda leaf, old=old: leaf.reshape(old.seed.shape[0], -1, *_inner(leaf)), moment
            )
            worth = worth.reshape(site.num_layers, site.chunks)
            best, chunk = jax.lax.top_k(worth, old.seed.shape[1])
            chosen = jax.vmap(lambda row, at: jax.tree.map(lambda leaf: leaf[at], row))(rows, chunk)
            along = telemetry.directions(chosen)
            is_found = (
                (best > -jnp.inf)
                & jnp.all(jnp.isfinite(along), axis=(-2, -1))
                & jnp.any(along != 0, axis=(-2, -1))
            )
            is_real = jnp.asarray(site.source.mask)[chunk] & is_found[..., None]
            layer = site.chunks * jnp.arange(site.num_layers, dtype=jnp.int32)[:, None]
            seed = first + layer + chunk.astype(jnp.int32)
            found = Directions(
                seed=jnp.where(is_found, seed, NONE).astype(jnp.int32),
                along=jnp.where(is_real[..., None], along, 0.0),
            )
        kept.append(found)
        first += site.num_seeds
    return tuple(kept)


def spend(
    layout: Layout, memory: Memory, is_born: Bool[Array, "S"], blueprint: Int8[Array, "S"]
) -> tuple[Memory, Int32[Array, ""]]:
    """The memory without the seeds just born, and how many of these began along it.

    It serves one birth: the next adapter of the same seed will meet another host.
    """
    can = jnp.asarray(np.array([b.init_along is not None for b in layout.blueprints]))
    kept: list[Directions | None] = []
    count = jnp.int32(0)
    for old in memory:
        if old is None:
            kept.append(None)
            continue
        seed = jnp.maximum(old.seed, 0)
        is_used = (old.seed != NONE) & is_born[seed]
        count += jnp.sum(is_used & can[jnp.maximum(blueprint[seed], 0)], dtype=jnp.int32)
        kept.append(old._replace(seed=jnp.where(is_used, NONE, old.seed)))
    return tuple(kept), count


def forget(memory: Memory, should: Bool[Array, ""]) -> Memory:
    """An empty memory where `should`."""
    forgotten: Memory = tuple(
        None if old is None else old._replace(seed=jnp.where(should, NONE, old.seed))
        for old in memory
    )
    return forgotten


def _inner(leaf: Array) -> tuple[int, ...]:
    """The axes of a moment behind layers and chunks."""
    return leaf.shape[-2:] if leaf.ndim > 2 else ()


def newborn(
    layout: Layout, key: Key, slot: int, seed: int = NONE, memory: Memory | None = None
) -> Params:
    """`Growth.newborn`."""
    index = next(
        i
        for i, bank in enumerate(layout.tables.banks)
        if bank.start <= slot < bank.start + bank.num_slots
    )
    bank = layout.tables.banks[index]
    own_key = _slot_key(key, index, slot - bank.start, bank.num_slots)
    blueprint, spec = layout.blueprints[bank.blueprint], layout.sites[bank.site].spec
    told = None if memory is None else memory[bank.site]
    if told is not None and blueprint.init_along is not None:
        rows = np.flatnonzero(np.asarray(told.seed).reshape(-1) == seed)
        if seed != NONE and rows.size:
            along = told.along.reshape(-1, *told.along.shape[2:])[int(rows[0])]
            return _initialiser(blueprint, spec, layout.dtype, True)(own_key, along)
    return _initialiser(blueprint, spec, layout.dtype, False)(own_key)


@lru_cache(maxsize=256)
def _initialiser(
    blueprint: Blueprint, spec: AdapterSpec, dtype: DType, is_directed: bool
) -> Callable[..., Params]:
    if is_directed and blueprint.init_along is not None:
        along = blueprint.init_along
        return jax.jit(lambda key, directions: along(key, spec, dtype, directions))
    return jax.jit(lambda key: blueprint.init(key, spec, dtype))


def _slot_key(key: Key, bank: int, slot: int, num_slots: int) -> Key:
    """The key that `give_birth` uses for a slot of a bank."""
    keys: Key = _slot_keys(jax.random.clone(key), bank, num_slots)[slot]
    return keys


_slot_keys = jax.jit(
    lambda key, bank, num_slots: jax.random.split(jax.random.fold_in(key, bank), num_slots),
    static_argnums=2,
)
