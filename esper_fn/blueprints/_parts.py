"""Initialisers and casts that blueprints share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, DType, Float, Key, Params


def lecun_normal(key: Key, shape: tuple[int, ...], dtype: DType) -> Float[Array, "..."]:
    """Normal with variance `1 / fan_in`, the product of all axes but the last."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)


def cast(params: Params, x: Array) -> Params:
    """`params` in the dtype of the activation, in which bodies compute."""
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)


def positive(**sizes: int) -> None:
    """Raises `ValueError` for a size that is not a positive int."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
