"""The two-layer blueprint, and its two ways to be the identity at birth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, DType, Key, Params
from esper_fn.blueprints._base import (
    TOPOLOGIES,
    AdapterSpec,
    ApplyAdapter,
    Blueprint,
    Cost,
    InitAdapter,
    InitAlong,
)
from esper_fn.blueprints._parts import (
    add_bias,
    cast,
    check_positive,
    lecun_normal,
    mirrored,
    spanning,
    two_matrices,
)

Activation = Literal["relu", "gelu", "silu"]
Birth = Literal["zero", "paired"]
_BIRTHS: tuple[Birth, ...] = ("zero", "paired")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


class _Form(NamedTuple):
    """The functions of a blueprint."""

    init: InitAdapter
    init_along: InitAlong
    apply: ApplyAdapter


def bottleneck(width: int = 8, activation: Activation = "relu", birth: Birth = "zero") -> Blueprint:
    """`r = phi(x down + bias) up`, the identity at birth (Houlsby et al., ICML 2019).

    Over a span from a layer's input to its successor's pre-activation this is exactly `width`
    more neurons in that layer.

    There are two ways to be the identity at birth:

    - `zero`: `up = 0`. Then `down` and `bias` get no gradient until `up` has moved.
    - `paired`: units `k` and `k + width / 2` are twins with equal `down` and `bias` and opposite
      `up` (function-preserving, as in Chen et al., Net2Net, ICLR 2016). Every parameter gets a
      gradient in the first step, and the twins part at once, because their `down` get opposite
      ones.

    An adapter born along directions gives each of them to two units with opposite signs, since
    `phi(z) - phi(-z) = z`; a `paired` one gives them to its first half, and the twins follow.

    Args:
      width: inner width R.
      activation: `relu`, `gelu` or `silu`.
      birth: `zero` or `paired`.

    Returns:
      The blueprint.

    Raises:
      ValueError: `width` is no positive int, or odd with `paired`; an unknown activation or birth.
    """
    check_positive(width=width)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    if birth not in _BIRTHS:
        raise ValueError(f"birth must be one of {_BIRTHS}, got {birth!r}")
    is_paired = birth == "paired"
    if is_paired and width % 2:
        raise ValueError(f"width must be even for birth='paired', got {width}; take {width + 1}")
    form = (_paired_form if is_paired else _zero_form)(width, _ACTIVATIONS[activation])

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        extra = width + spec.outputs if is_paired else 0
        return Cost(parameters=weights + width, flops=(2 * weights + 2 * width + extra) * positions)

    return Blueprint(
        "bottleneck",
        form.init,
        form.apply,
        cost,
        TOPOLOGIES,
        can_span=True,
        init_along=form.init_along,
        activation=None if is_paired else activation,
        neurons=activation,
    )


def _zero_form(width: int, phi: Callable[[Array], Array]) -> _Form:
    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return two_matrices(key, spec, width, dtype)

    def init_along(key: Key, spec: AdapterSpec, dtype: DType, directions: Array) -> Params:
        down = spanning(key, width, dtype, mirrored(directions))
        return {**two_matrices(jax.random.clone(key), spec, width, dtype), "down": down}

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        r: Array = phi(add_bias(x @ params["down"], params["bias"])) @ params["up"]
        return r

    return _Form(init=init, init_along=init_along, apply=apply)


def _paired_form(width: int, phi: Callable[[Array], Array]) -> _Form:
    """Twins, whose sum is computed from their difference.

    Summed as it stands, `r` would be 0 up to rounding. It is exactly 0, in every dtype and in
    whatever order a product is summed, as

        z = x down_1 + bias_1,  dz = x (down_2 - down_1) + (bias_2 - bias_1),
        r = phi(z + dz) (up_1 + up_2) - (phi(z + dz) - phi(z)) up_1,

    where `phi(z + dz) - phi(z)` is selected, not computed, to be 0 where `dz` is.
    """
    half = width // 2

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return init_along(key, spec, dtype, jnp.zeros((spec.inputs, 0)))

    def init_along(key: Key, spec: AdapterSpec, dtype: DType, directions: Array) -> Params:
        down_key, up_key = jax.random.split(key)
        down = spanning(down_key, half, dtype, mirrored(directions))
        up = lecun_normal(up_key, (half, spec.outputs), dtype) * jnp.asarray(0.5**0.5, dtype)
        return {
            "down": jnp.concatenate([down, down], axis=-1),
            "bias": jnp.zeros((width,), dtype),
            "up": jnp.concatenate([up, -up]),
        }

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
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
        z = add_bias(x @ first["down"], first["bias"])
        dz = add_bias(x @ gap["down"], gap["bias"])
        r: Array = phi(z + dz) @ gap["up"] - _rise(phi, z, dz) @ first["up"]
        return r

    return _Form(init=init, init_along=init_along, apply=apply)


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
