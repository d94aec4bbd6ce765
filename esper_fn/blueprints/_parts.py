"""Initialisers and casts that blueprints share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_fn._arguments import is_count
from esper_fn._typing import Array, DType, Float, Float32, Key, Params
from esper_fn.blueprints._base import AdapterSpec


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
    columns = jnp.zeros((inputs, width), dtype)
    columns = columns.at[:, : min(count, width)].set(directions[:, :width].astype(dtype))
    return jnp.where(jnp.any(columns != 0, axis=0, keepdims=True), columns, drawn)


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


def check_positive(**sizes: int) -> None:
    """Raises `ValueError` for a size that is not a positive int."""
    for name, value in sizes.items():
        if not is_count(value):
            raise ValueError(f"{name} must be a positive int, got {value!r}")


def two_matrices(key: Key, spec: AdapterSpec, width: int, dtype: DType) -> dict[str, Array]:
    """Parameters of `phi(x down + bias) up`, with `up = 0`."""
    return {
        "down": lecun_normal(key, (spec.inputs, width), dtype),
        "bias": jnp.zeros((width,), dtype),
        "up": jnp.zeros((width, spec.outputs), dtype),
    }


def add_bias(x: Array, bias: Array) -> Array:
    """`x + bias` for a bias of the last axis."""
    return x + bias.reshape(*(1,) * (x.ndim - 1), -1)
