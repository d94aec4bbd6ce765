"""Chunks of an activation: reading some of them, and adding to them in place."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._typing import Array, Bool, Float, Float32, Int32
from esper_kernels import Chunking, rule_jax


def read(
    x: Float[Array, "... D"], chunking: Chunking, chunk: Int32[Array, "n"]
) -> Float[Array, "n ... F"]:
    """The chunks of `x`, zero where padded; a negative chunk reads the first one.

    Args:
      x: `[..., D]`.
      chunking: how D splits.
      chunk: the chunk of each of n adapters.
    """
    safe, width = jnp.maximum(chunk, 0), chunking.widest
    if not chunking.is_even:
        columns = jnp.asarray(chunking.columns)[safe]
        return jnp.moveaxis(jnp.take(x, columns, axis=-1, mode="fill", fill_value=0), -2, 0)
    if chunk.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(x, safe[0] * width, width, axis=-1)[None]
    split = x.reshape(*x.shape[:-1], chunking.chunks, width)
    return jnp.moveaxis(jnp.take(split, safe, axis=-2, mode="clip"), -2, 0)


def add(
    base: Float[Array, "... D"],
    chunking: Chunking,
    chunk: Int32[Array, "n"],
    scale: Float32[Array, "n"],
    values: Float[Array, "n ... F"],
) -> Float[Array, "... D"]:
    """`base` after `rule_jax.blend` in the chunks of n adapters.

    Args:
      base: of the dtype of `values` or its `rule_jax.bits`.
      chunking: how D splits.
      chunk: the chunk of each adapter, all different; negative for none.
      scale: a gain of each adapter.
      values: what each adapter adds.

    Returns:
      An array like `base`.
    """
    scale = jnp.where(chunk >= 0, scale, 0.0)
    if chunk.shape[0] == 1:
        start, is_own, moved = _window(chunking, chunk[0], values[0])
        part = jax.lax.dynamic_slice_in_dim(base, start, chunking.widest, axis=-1)
        part = rule_jax.blend(part.view(values.dtype), scale[0], moved, is_own).view(base.dtype)
        return jax.lax.dynamic_update_slice_in_dim(base, part, start, axis=-1)
    adapter = adapter_of_chunk(chunking, chunk)
    scale = jnp.where(adapter >= 0, scale[adapter], 0.0)
    scale = scale[_of_features(chunking)[0]].reshape(*(1,) * (base.ndim - 1), -1)
    whole = _join(values, chunking, jnp.maximum(adapter, 0))
    return rule_jax.blend(base.view(values.dtype), scale, whole).view(base.dtype)


def split(values: Float[Array, "... D"], chunking: Chunking) -> Float[Array, "... C F"]:
    """Features as rows of chunks, padded with zeros."""
    if chunking.is_even:
        return values.reshape(*values.shape[:-1], chunking.chunks, chunking.widest)
    return jnp.take(values, jnp.asarray(chunking.columns), axis=-1, mode="fill", fill_value=0)


def _window(
    chunking: Chunking, chunk: Int32[Array, ""], values: Float[Array, "... F"]
) -> tuple[Int32[Array, ""], Bool[Array, "*"] | bool, Float[Array, "... F"]]:
    """One chunk in place.

    Returns the first of F neighbouring features of the activation that hold the chunk, which of
    them are its own, and its values moved to these.
    """
    safe = jnp.maximum(chunk, 0)
    if chunking.is_even:
        return safe * chunking.widest, True, values
    first, last = jnp.asarray(chunking.starts)[safe], chunking.features - chunking.widest
    start, is_real = jnp.minimum(first, last), jnp.asarray(chunking.mask)[safe]
    # The window of a narrow chunk at the very end begins one feature early.
    is_late = first > last
    values = jnp.where(is_late, jnp.roll(values, 1, axis=-1), values)
    is_real = jnp.where(is_late, jnp.roll(is_real, 1), is_real)
    return start, is_real.reshape(*(1,) * (values.ndim - 1), -1), values


def adapter_of_chunk(chunking: Chunking, chunk: Int32[Array, "n"]) -> Int32[Array, "C"]:
    """Which of n adapters serves each chunk, -1 for none; negative chunks are served by none."""
    adapters = jnp.arange(chunk.shape[0], dtype=jnp.int32)[None, :]
    chunks = jnp.arange(chunking.chunks, dtype=jnp.int32)[:, None]
    return jnp.max(jnp.where(chunk[None, :] == chunks, adapters, -1), axis=1)


def _join(
    values: Float[Array, "n ... F"], chunking: Chunking, adapter: Int32[Array, "C"]
) -> Float[Array, "... D"]:
    """The chunks of the adapters side by side."""
    apart = jnp.moveaxis(values, 0, -2)
    if chunking.is_even:
        served = jnp.take(apart, adapter, axis=-2, mode="clip")
        return served.reshape(*served.shape[:-2], chunking.features)
    chunk, offset = _of_features(chunking)
    columns = adapter[chunk] * chunking.widest + offset
    flat = apart.reshape(*apart.shape[:-2], apart.shape[-2] * apart.shape[-1])
    return jnp.take(flat, columns, axis=-1, mode="clip")


@lru_cache(maxsize=256)
def _of_features(chunking: Chunking) -> tuple[np.ndarray, np.ndarray]:
    """int32[D] each: the chunk of a feature, and its position within."""
    chunk = np.repeat(np.arange(chunking.chunks, dtype=np.int32), chunking.sizes)
    offset = np.arange(chunking.features, dtype=np.int32) - chunking.starts[chunk]
    return chunk, offset
