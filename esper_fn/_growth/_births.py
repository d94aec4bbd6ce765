"""What a survey finds is remembered, and spent on the seed's next body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import telemetry
from esper_fn._lattice import Directions, Lattice, Memory, Moments, chunk_mask
from esper_fn._typing import Array, Bool, Float32, Int8, Int32
from esper_fn.lifecycle import NONE


def remember(
    lattice: Lattice,
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
    for site, old, moment in zip(lattice.sites, memory, moments, strict=True):
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
            is_real = jnp.asarray(chunk_mask(site.source))[chunk] & is_found[..., None]
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
    lattice: Lattice, memory: Memory, is_born: Bool[Array, "S"], blueprint: Int8[Array, "S"]
) -> tuple[Memory, Int32[Array, ""]]:
    """The memory without the seeds just born, and how many of these began along it.

    It serves one birth: the next body of the same seed will meet another host.
    """
    can = jnp.asarray(np.array([b.init_along is not None for b in lattice.blueprints]))
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
