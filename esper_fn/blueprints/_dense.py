"""Blueprints that act on each position alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, DType, Key, Params
from esper_fn.base import TOPOLOGIES, Blueprint, BodySpec, Cost
from esper_fn.blueprints._parts import cast, lecun_normal, positive

Activation = Literal["relu", "gelu", "silu"]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def noop() -> Blueprint:
    """`r = 0`: a body without parameters, the control of every comparison."""

    def init(key: Key, spec: BodySpec, dtype: DType) -> Params:
        del key, spec, dtype
        return {}

    def apply(params: Params, x: Array, spec: BodySpec, mask: Array) -> Array:
        del params, spec, mask
        return jnp.zeros_like(x)

    return Blueprint(
        "noop", init, apply, lambda spec, positions: Cost(0, 0), TOPOLOGIES, can_span=False
    )


def scale_shift() -> Blueprint:
    """`r = x * scale + shift`, both zero at birth (Perez et al., FiLM, AAAI 2018)."""

    def init(key: Key, spec: BodySpec, dtype: DType) -> Params:
        del key
        return {
            "scale": jnp.zeros((spec.inputs,), dtype),
            "shift": jnp.zeros((spec.inputs,), dtype),
        }

    def apply(params: Params, x: Array, spec: BodySpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        leading = (1,) * (x.ndim - 1)
        scale, shift = params["scale"], params["shift"]
        r: Array = x * scale.reshape(*leading, -1) + shift.reshape(*leading, -1)
        return r

    def cost(spec: BodySpec, positions: int) -> Cost:
        return Cost(parameters=2 * spec.inputs, flops=2 * spec.inputs * positions)

    return Blueprint("scale_shift", init, apply, cost, TOPOLOGIES, can_span=False)


def low_rank(rank: int = 4) -> Blueprint:
    """`r = (x down) up`, `up = 0` at birth (Hu et al., LoRA, ICLR 2022).

    Args:
      rank: inner width R.
    """
    positive(rank=rank)

    def init(key: Key, spec: BodySpec, dtype: DType) -> Params:
        return {
            "down": lecun_normal(key, (spec.inputs, rank), dtype),
            "up": jnp.zeros((rank, spec.outputs), dtype),
        }

    def apply(params: Params, x: Array, spec: BodySpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = (x @ params["down"]) @ params["up"]
        return r

    def cost(spec: BodySpec, positions: int) -> Cost:
        weights = rank * (spec.inputs + spec.outputs)
        return Cost(parameters=weights, flops=2 * weights * positions)

    return Blueprint("low_rank", init, apply, cost, TOPOLOGIES, can_span=True, activation="none")


def _two_matrices(key: Key, spec: BodySpec, width: int, dtype: DType) -> dict[str, Array]:
    return {
        "down": lecun_normal(key, (spec.inputs, width), dtype),
        "bias": jnp.zeros((width,), dtype),
        "up": jnp.zeros((width, spec.outputs), dtype),
    }


def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.reshape(*(1,) * (x.ndim - 1), -1)


def bottleneck(width: int = 8, activation: Activation = "relu") -> Blueprint:
    """`r = phi(x down + bias) up`, `up = 0` at birth (Houlsby et al., ICML 2019).

    Over a span from a layer's input to its successor's pre-activation this is exactly `width`
    more neurons in that layer.

    Args:
      width: inner width R.
      activation: `relu`, `gelu` or `silu`.
    """
    positive(width=width)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    phi = _ACTIVATIONS[activation]

    def init(key: Key, spec: BodySpec, dtype: DType) -> Params:
        return _two_matrices(key, spec, width, dtype)

    def apply(params: Params, x: Array, spec: BodySpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = phi(_add_bias(x @ params["down"], params["bias"])) @ params["up"]
        return r

    def cost(spec: BodySpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        return Cost(parameters=weights + width, flops=(2 * weights + 2 * width) * positions)

    return Blueprint(
        "bottleneck", init, apply, cost, TOPOLOGIES, can_span=True, activation=activation
    )


def gated(width: int = 8) -> Blueprint:
    """`r = (silu(x gate) * (x down)) up`, `up = 0` at birth (Shazeer, GLU variants, 2020).

    Args:
      width: inner width R.
    """
    positive(width=width)

    def init(key: Key, spec: BodySpec, dtype: DType) -> Params:
        gate_key, value_key = jax.random.split(key)
        return {
            "gate": lecun_normal(gate_key, (spec.inputs, width), dtype),
            "down": lecun_normal(value_key, (spec.inputs, width), dtype),
            "up": jnp.zeros((width, spec.outputs), dtype),
        }

    def apply(params: Params, x: Array, spec: BodySpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = (jax.nn.silu(x @ params["gate"]) * (x @ params["down"])) @ params["up"]
        return r

    def cost(spec: BodySpec, positions: int) -> Cost:
        weights = width * (2 * spec.inputs + spec.outputs)
        return Cost(parameters=weights, flops=(2 * weights + 5 * width) * positions)

    return Blueprint("gated", init, apply, cost, TOPOLOGIES, can_span=True, activation="gated")


def normalised(width: int = 8, epsilon: float = 1e-5) -> Blueprint:
    """`r = gelu(norm(x) down + bias) up`, `norm` over the chunk's features, `up = 0` at birth.

    `norm(x) = (x - mean) / sqrt(var + epsilon)` (Ba et al., layer normalisation, 2016), without
    scale and shift, which `down` and `bias` contain.

    Args:
      width: inner width R.
      epsilon: added to the variance.
    """
    positive(width=width)

    def init(key: Key, spec: BodySpec, dtype: DType) -> Params:
        return _two_matrices(key, spec, width, dtype)

    def apply(params: Params, x: Array, spec: BodySpec, mask: Array) -> Array:
        del spec
        params = cast(params, x)
        real = mask.reshape(*(1,) * (x.ndim - 1), -1)
        count = jnp.sum(mask, dtype=jnp.float32)
        wide = x.astype(jnp.float32)
        mean = jnp.sum(wide, axis=-1, keepdims=True) / count
        centred = jnp.where(real, wide - mean, 0.0)
        variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
        normal = (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
        r: Array = jax.nn.gelu(_add_bias(normal @ params["down"], params["bias"])) @ params["up"]
        return r

    def cost(spec: BodySpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        per_position = 2 * weights + 10 * width + 7 * spec.inputs
        return Cost(parameters=weights + width, flops=per_position * positions)

    return Blueprint("normalised", init, apply, cost, TOPOLOGIES, can_span=True)
