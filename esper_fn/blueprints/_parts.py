"""Initialisers and casts that blueprints share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, DType, Float, Float32, Key, Params


def lecun_normal(key: Key, shape: tuple[int, ...], dtype: DType) -> Float[Array, "..."]:
    """Normal with variance `1 / fan_in`, the product of all axes but the last."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)


def spanning(
    key: Key, width: int, dtype: DType, directions: Float32[Array, "F U"]
) -> Float[Array, "F R"]:
    """`lecun_normal` of shape `(F, width)` whose first columns are `directions`, where not zero."""
    inputs, count = directions.shape
    drawn = lecun_normal(key, (inputs, width), dtype)
    told = jnp.zeros((inputs, width), dtype)
    told = told.at[:, : min(count, width)].set(directions[:, :width].astype(dtype))
    return jnp.where(jnp.any(told != 0, axis=0, keepdims=True), told, drawn)


def mirrored(directions: Float32[Array, "F U"]) -> Float32[Array, "F V"]:
    """Every direction followed by its opposite, `V = 2 U`.

    For each of relu, silu and gelu `phi(z) - phi(-z) = z`, so a pair of opposite units sees
    the linear function `z` whatever the sign that a singular vector happens to have, and
    `|E[phi(z) dy]|^2 + |E[phi(-z) dy]|^2 >= |E[z dy]|^2 / 2`. One unit alone has no such bound.
    """
    both = jnp.stack([directions, -directions], axis=-1)
    return both.reshape(directions.shape[0], -1)


def cast(params: Params, x: Array) -> Params:
    """`params` in the dtype of the activation, in which adapters compute."""
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)


def positive(**sizes: int) -> None:
    """Raises `ValueError` for a size that is not a positive int."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
