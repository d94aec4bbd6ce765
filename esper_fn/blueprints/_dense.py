"""Blueprints that act on each position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, DType, Key, Params
from esper_fn.blueprints._base import TOPOLOGIES, AdapterSpec, Blueprint, Cost
from esper_fn.blueprints._parts import (
    add_bias,
    cast,
    check_positive,
    lecun_normal,
    spanning,
    two_matrices,
)


def noop() -> Blueprint:
    """`r = 0`: an adapter without parameters, as a control in comparisons."""

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        del key, spec, dtype
        return {}

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del params, spec, mask
        return jnp.zeros_like(x)

    return Blueprint(
        "noop", init, apply, lambda spec, positions: Cost(0, 0), TOPOLOGIES, can_span=False
    )


def scale_shift() -> Blueprint:
    """`r = x * scale + shift`, both zero at birth (Perez et al., FiLM, AAAI 2018)."""

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        del key
        return {
            "scale": jnp.zeros((spec.inputs,), dtype),
            "shift": jnp.zeros((spec.inputs,), dtype),
        }

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        leading = (1,) * (x.ndim - 1)
        scale, shift = params["scale"], params["shift"]
        r: Array = x * scale.reshape(*leading, -1) + shift.reshape(*leading, -1)
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        return Cost(parameters=2 * spec.inputs, flops=2 * spec.inputs * positions)

    return Blueprint("scale_shift", init, apply, cost, TOPOLOGIES, can_span=False)


def low_rank(rank: int = 4) -> Blueprint:
    """`r = (x down) up`, `up = 0` at birth (Hu et al., LoRA, ICLR 2022).

    For an adapter born along directions these are the first columns of `down`.

    Args:
      rank: inner width R.

    Returns:
      The blueprint.

    Raises:
      ValueError: `rank` is no positive int.
    """
    check_positive(rank=rank)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return {
            "down": lecun_normal(key, (spec.inputs, rank), dtype),
            "up": jnp.zeros((rank, spec.outputs), dtype),
        }

    def init_along(key: Key, spec: AdapterSpec, dtype: DType, directions: Array) -> Params:
        return {
            **init(jax.random.clone(key), spec, dtype),
            "down": spanning(key, rank, dtype, directions),
        }

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = (x @ params["down"]) @ params["up"]
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = rank * (spec.inputs + spec.outputs)
        return Cost(parameters=weights, flops=2 * weights * positions)

    return Blueprint(
        "low_rank",
        init,
        apply,
        cost,
        TOPOLOGIES,
        can_span=True,
        activation="none",
        init_along=init_along,
    )


def gated(width: int = 8) -> Blueprint:
    """`r = (silu(x gate) * (x down)) up`, `up = 0` at birth (Shazeer, GLU variants, 2020).

    For an adapter born along directions these are the first columns of `down`. The gate is random,
    and scales each of them by a number that depends on the example.

    Args:
      width: inner width R.

    Returns:
      The blueprint.

    Raises:
      ValueError: `width` is no positive int.
    """
    check_positive(width=width)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        gate_key, value_key = jax.random.split(key)
        return {
            "gate": lecun_normal(gate_key, (spec.inputs, width), dtype),
            "down": lecun_normal(value_key, (spec.inputs, width), dtype),
            "up": jnp.zeros((width, spec.outputs), dtype),
        }

    def init_along(key: Key, spec: AdapterSpec, dtype: DType, directions: Array) -> Params:
        _, value_key = jax.random.split(jax.random.clone(key))
        down = spanning(value_key, width, dtype, directions)
        return {**init(key, spec, dtype), "down": down}

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = (jax.nn.silu(x @ params["gate"]) * (x @ params["down"])) @ params["up"]
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (2 * spec.inputs + spec.outputs)
        return Cost(parameters=weights, flops=(2 * weights + 5 * width) * positions)

    return Blueprint(
        "gated",
        init,
        apply,
        cost,
        TOPOLOGIES,
        can_span=True,
        activation="gated",
        init_along=init_along,
    )


def normalised(width: int = 8, epsilon: float = 1e-5) -> Blueprint:
    """`r = gelu(norm(x) down + bias) up`, `norm` over the chunk's features, `up = 0` at birth.

    `norm(x) = (x - mean) / sqrt(var + epsilon)` (Ba et al., layer normalisation, 2016), without
    scale and shift, which `down` and `bias` contain. It offers no birth along directions: these are
    measured on `x`, and which of them matter changes with each example's own mean and scale.

    Args:
      width: inner width R.
      epsilon: added to the variance.

    Returns:
      The blueprint.

    Raises:
      ValueError: `width` is no positive int.
    """
    check_positive(width=width)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return two_matrices(key, spec, width, dtype)

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec
        params = cast(params, x)
        real = mask.reshape(*(1,) * (x.ndim - 1), -1)
        count = jnp.sum(mask, dtype=jnp.float32)
        wide = x.astype(jnp.float32)
        mean = jnp.sum(wide, axis=-1, keepdims=True) / count
        centred = jnp.where(real, wide - mean, 0.0)
        variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
        normal = (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
        r: Array = jax.nn.gelu(add_bias(normal @ params["down"], params["bias"])) @ params["up"]
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        per_position = 2 * weights + 10 * width + 7 * spec.inputs
        return Cost(parameters=weights + width, flops=per_position * positions)

    return Blueprint("normalised", init, apply, cost, TOPOLOGIES, can_span=True)
