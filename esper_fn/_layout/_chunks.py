"""Taking chunks out of an activation, and laying chunks out along its features again."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esper_fn._typing import Array, Bool, Float, Int32
from esper_kernels import Chunking


def read(
    x: Float[Array, "... D"], chunking: Chunking, chunk: Int32[Array, "n"]
) -> Float[Array, "n ... F"]:
    """The chunks of `x`, zero where padded; for a negative chunk whatever the first one holds."""
    safe = jnp.maximum(chunk, 0)
    if chunking.is_even:
        split = x.reshape(*x.shape[:-1], chunking.chunks, chunking.widest)
        return jnp.moveaxis(jnp.take(split, safe, axis=-2, mode="clip"), -2, 0)
    columns = jnp.asarray(chunking.columns)[safe]
    return jnp.moveaxis(jnp.take(x, columns, axis=-1, mode="fill", fill_value=0), -2, 0)


def window(
    chunking: Chunking, chunk: Int32[Array, ""], values: Float[Array, "... F"]
) -> tuple[Int32[Array, ""], Bool[Array, "*"], Float[Array, "... F"]]:
    """One chunk in place.

    Returns the first of F neighbouring features of the activation that hold the chunk, which of
    them are its own, and its values moved to these.
    """
    safe = jnp.maximum(chunk, 0)
    if chunking.is_even:
        return safe * chunking.widest, jnp.ones((), bool), values
    first, last = jnp.asarray(chunking.starts)[safe], chunking.features - chunking.widest
    start, is_real = jnp.minimum(first, last), jnp.asarray(chunking.mask)[safe]
    # A narrow chunk at the very end: its window begins one feature early.
    is_late = first > last
    moved = jnp.roll(values, 1, axis=-1), jnp.roll(is_real, 1)
    values = jnp.where(is_late, moved[0], values)
    is_real = jnp.where(is_late, moved[1], is_real)
    return start, is_real.reshape(*(1,) * (values.ndim - 1), -1), values


class Placed(NamedTuple):
    """Which of `n` slots serves each chunk."""

    slot: Int32[Array, "C"]
    is_served: Bool[Array, "C"]


def place(chunking: Chunking, chunk: Int32[Array, "n"]) -> Placed:
    """The slots by chunk rather than the chunks by slot; negative chunks are nobody's."""
    slots = jnp.arange(chunk.shape[0], dtype=jnp.int32)
    where = jnp.where(chunk >= 0, chunk, chunking.chunks)
    slot = jnp.full((chunking.chunks,), -1, jnp.int32).at[where].set(slots, mode="drop")
    return Placed(slot=jnp.maximum(slot, 0), is_served=slot >= 0)


def lay_out(
    values: Float[Array, "n ... F"], chunking: Chunking, placed: Placed
) -> Float[Array, "... D"]:
    """The slots' chunks side by side; whatever, where a chunk is not served."""
    apart = jnp.moveaxis(values, 0, -2)
    if chunking.is_even:
        served = jnp.take(apart, placed.slot, axis=-2, mode="clip")
        return served.reshape(*served.shape[:-2], chunking.features)
    chunk, offset = _of_feature(chunking)
    columns = placed.slot[chunk] * chunking.widest + offset
    flat = apart.reshape(*apart.shape[:-2], apart.shape[-2] * apart.shape[-1])
    return jnp.take(flat, columns, axis=-1, mode="clip")


def per_feature(values: Array, chunking: Chunking, placed: Placed, ndim: int) -> Array:
    """One value a slot as one a feature, shaped to broadcast; zero where a chunk is not served."""
    zero = jnp.zeros((), values.dtype)
    of_chunk = jnp.where(placed.is_served, values[placed.slot], zero)
    return of_chunk[_of_feature(chunking)[0]].reshape(*(1,) * (ndim - 1), -1)


def split(values: Float[Array, "D"], chunking: Chunking) -> Float[Array, "C F"]:
    """One value a feature as rows of chunks, padded with zeros."""
    return read(values, chunking, jnp.arange(chunking.chunks, dtype=jnp.int32))


@lru_cache(maxsize=256)
def _of_feature(chunking: Chunking) -> tuple[np.ndarray, np.ndarray]:
    """int32[D] each: the chunk a feature belongs to, and its place within."""
    chunk = np.repeat(np.arange(chunking.chunks, dtype=np.int32), chunking.sizes)
    offset = np.arange(chunking.features, dtype=np.int32) - chunking.starts[chunk]
    return chunk, offset
