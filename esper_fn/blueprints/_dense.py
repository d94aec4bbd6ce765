"""Blueprints that act on each position alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, DType, Key, Params
from esper_fn.base import TOPOLOGIES, AdapterSpec, Blueprint, Cost
from esper_fn.blueprints._parts import cast, lecun_normal, mirrored, positive, spanning

Activation = Literal["relu", "gelu", "silu"]
Birth = Literal["zero", "paired"]
_BIRTHS: tuple[Birth, ...] = ("zero", "paired")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def noop() -> Blueprint:
    """`r = 0`: an adapter without parameters, the control of every comparison."""

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

    Born along directions, these are the first columns of `down`.

    Args:
      rank: inner width R.
    """
    positive(rank=rank)

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


def _two_matrices(key: Key, spec: AdapterSpec, width: int, dtype: DType) -> dict[str, Array]:
    return {
        "down": lecun_normal(key, (spec.inputs, width), dtype),
        "bias": jnp.zeros((width,), dtype),
        "up": jnp.zeros((width, spec.outputs), dtype),
    }


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rise(phi: Callable[[Array], Array], z: Array, dz: Array) -> Array:
    """`phi(z + dz) - phi(z)`, and exactly 0 where `dz` is; with the derivative of the formula.

    A compiler may contract the products inside the two `phi` differently, so that their difference
    is not 0 though their arguments are equal.
    """
    return jnp.where(dz == 0, jnp.zeros_like(z), phi(z + dz) - phi(z))


@_rise.defjvp
def _rise_jvp(
    phi: Callable[[Array], Array], primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    _, slope = jax.jvp(lambda z, dz: phi(z + dz) - phi(z), primals, tangents)
    return _rise(phi, *primals), slope


def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.reshape(*(1,) * (x.ndim - 1), -1)


def bottleneck(width: int = 8, activation: Activation = "relu", birth: Birth = "zero") -> Blueprint:
    """`r = phi(x down + bias) up`, the identity at birth (Houlsby et al., ICML 2019).

    Over a span from a layer's input to its successor's pre-activation this is exactly `width`
    more neurons in that layer.

    Two ways to be born as the identity:

    - `zero`: `up = 0`. Then `down` and `bias` get no gradient until `up` has moved.
    - `paired`: units `k` and `k + width / 2` are twins with equal `down` and `bias` and opposite
      `up` (function-preserving, as in Chen et al., Net2Net, ICLR 2016), so every parameter gets a
      gradient in the first step, and the twins part at once: their `down` get opposite ones. Summed
      as it stands, `r` would be 0 up to rounding. It is exactly 0, in every dtype and in whatever
      order a product is summed, as it is computed from the twins' difference,

          z = x down_1 + bias_1,  dz = x (down_2 - down_1) + (bias_2 - bias_1),
          r = phi(z + dz) (up_1 + up_2) - (phi(z + dz) - phi(z)) up_1,

      where `phi(z + dz) - phi(z)` is selected, not computed, to be 0 where `dz` is.

    Born along directions, each is given to two units with opposite signs, for
    `phi(z) - phi(-z) = z`; a `paired` adapter gives them to its first half, and the twins follow.

    Args:
      width: inner width R.
      activation: `relu`, `gelu` or `silu`.
      birth: `zero` or `paired`.

    Raises:
      ValueError: a width that is no positive int, or odd where twins are asked for; an unknown
        activation or birth.
    """
    positive(width=width)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    if birth not in _BIRTHS:
        raise ValueError(f"birth must be one of {_BIRTHS}, got {birth!r}")
    is_paired = birth == "paired"
    if is_paired and width % 2:
        raise ValueError(f"width must be even for birth='paired', got {width}; take {width + 1}")
    phi = _ACTIVATIONS[activation]
    half = width // 2

    def paired(key: Key, spec: AdapterSpec, dtype: DType, directions: Array | None) -> Params:
        down_key, up_key = jax.random.split(key)
        told = jnp.zeros((spec.inputs, 0)) if directions is None else mirrored(directions)
        down = spanning(down_key, half, dtype, told)
        up = lecun_normal(up_key, (half, spec.outputs), dtype) * jnp.asarray(0.5**0.5, dtype)
        return {
            "down": jnp.concatenate([down, down], axis=-1),
            "bias": jnp.zeros((width,), dtype),
            "up": jnp.concatenate([up, -up]),
        }

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        if is_paired:
            return paired(key, spec, dtype, None)
        return _two_matrices(key, spec, width, dtype)

    def init_along(key: Key, spec: AdapterSpec, dtype: DType, directions: Array) -> Params:
        if is_paired:
            return paired(key, spec, dtype, directions)
        down = spanning(key, width, dtype, mirrored(directions))
        return {**_two_matrices(jax.random.clone(key), spec, width, dtype), "down": down}

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = phi(_add_bias(x @ params["down"], params["bias"])) @ params["up"]
        return r

    def apply_paired(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        down, bias, up = params["down"], params["bias"], params["up"]
        first = cast({"down": down[:, :half], "bias": bias[:half], "up": up[:half]}, x)
        gap = cast(
            {
                "down": down[:, half:] - down[:, :half],
                "bias": bias[half:] - bias[:half],
                "up": up[:half] + up[half:],
            },
            x,
        )
        z = _add_bias(x @ first["down"], first["bias"])
        dz = _add_bias(x @ gap["down"], gap["bias"])
        r: Array = phi(z + dz) @ gap["up"] - _rise(phi, z, dz) @ first["up"]
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        extra = width + spec.outputs if is_paired else 0
        return Cost(parameters=weights + width, flops=(2 * weights + 2 * width + extra) * positions)

    return Blueprint(
        "bottleneck",
        init,
        apply_paired if is_paired else apply,
        cost,
        TOPOLOGIES,
        can_span=True,
        init_along=init_along,
        activation=None if is_paired else activation,
        neurons=activation,
    )


def gated(width: int = 8) -> Blueprint:
    """`r = (silu(x gate) * (x down)) up`, `up = 0` at birth (Shazeer, GLU variants, 2020).

    Born along directions, these are the first columns of `down`; the gate is drawn, and scales
    what each of them finds by a number that depends on the example.

    Args:
      width: inner width R.
    """
    positive(width=width)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        gate_key, value_key = jax.random.split(key)
        return {
            "gate": lecun_normal(gate_key, (spec.inputs, width), dtype),
            "down": lecun_normal(value_key, (spec.inputs, width), dtype),
            "up": jnp.zeros((width, spec.outputs), dtype),
        }

    def init_along(key: Key, spec: AdapterSpec, dtype: DType, directions: Array) -> Params:
        _, value_key = jax.random.split(jax.random.clone(key))
        told = spanning(value_key, width, dtype, directions)
        return {**init(key, spec, dtype), "down": told}

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
    """
    positive(width=width)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return _two_matrices(key, spec, width, dtype)

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
        r: Array = jax.nn.gelu(_add_bias(normal @ params["down"], params["bias"])) @ params["up"]
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        per_position = 2 * weights + 10 * width + 7 * spec.inputs
        return Cost(parameters=weights + width, flops=per_position * positions)

    return Blueprint("normalised", init, apply, cost, TOPOLOGIES, can_span=True)
