"""Blueprints that mix positions. On a sequence each is causal: no output reads the future."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._typing import Array, DType, Key, Params
from esper_fn.blueprints._base import AdapterSpec, Blueprint, Cost
from esper_fn.blueprints._parts import cast, check_positive, lecun_normal


def _num_axes(spec: AdapterSpec) -> int:
    return 2 if spec.topology == "image" else 1


def _shifted(x: Array, window: tuple[int, ...]) -> list[Array]:
    """What each place of a window sees, in the kernel's order: `x` moved over its spatial axes.

    Same size, zeros beyond the edge; over one axis the window ends at the position (causal), over
    two it is centred.

    Adapters are mapped over slots with a kernel each, which makes of a convolution a grouped one; a
    CPU takes ten times as long for it as for these copies and one product.
    """
    num_axes = len(window)
    before = [size - 1 if num_axes == 1 else (size - 1) // 2 for size in window]
    inner = [(b, size - 1 - b) for b, size in zip(before, window, strict=True)]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - num_axes - 1) + inner + [(0, 0)])
    lengths = x.shape[-num_axes - 1 : -1]
    return [
        padded[(..., *(slice(o, o + n) for o, n in zip(offset, lengths, strict=True)), slice(None))]
        for offset in np.ndindex(*window)
    ]


def _convolve(x: Array, kernel: Array) -> Array:
    """Same-size convolution over the spatial axes; left-padded (causal) over one axis."""
    neighbours = jnp.concatenate(_shifted(x, kernel.shape[:-2]), axis=-1)
    return neighbours @ kernel.reshape(-1, kernel.shape[-1])


def _convolve_depthwise(x: Array, kernel: Array) -> Array:
    """The same with one filter a feature, `[*window, 1, F]`."""
    filters = kernel.reshape(-1, *(1,) * (x.ndim - 1), x.shape[-1]).astype(jnp.float32)
    y = jnp.zeros(x.shape, jnp.float32)
    for index, part in enumerate(_shifted(x, kernel.shape[:-2])):
        y = y + part.astype(jnp.float32) * filters[index]
    return y.astype(x.dtype)


def squeeze_excite(width: int = 4) -> Blueprint:
    """`r = x * (2 sigmoid(relu(pool(x) down) up) - 1)`, `up = 0` at birth.

    `pool` is the mean over an image's positions, the running mean over a sequence's
    (Hu et al., squeeze-and-excitation, CVPR 2018).

    Args:
      width: inner width R.

    Returns:
      The blueprint.

    Raises:
      ValueError: `width` is no positive int.
    """
    check_positive(width=width)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return {
            "down": lecun_normal(key, (spec.inputs, width), dtype),
            "up": jnp.zeros((width, spec.outputs), dtype),
        }

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del mask
        is_image = spec.topology == "image"
        params = cast(params, x)
        wide = x.astype(jnp.float32)
        if is_image:
            pooled = jnp.mean(wide, axis=(-3, -2), keepdims=True)
        else:
            count = jnp.arange(1, x.shape[-2] + 1, dtype=jnp.float32)
            pooled = jnp.cumsum(wide, axis=-2) / count.reshape(*(1,) * (x.ndim - 2), -1, 1)
        inner = jax.nn.relu(pooled.astype(x.dtype) @ params["down"])
        return x * (2 * jax.nn.sigmoid(inner @ params["up"]) - 1)

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs)
        gates = positions if spec.topology == "sequence" else 1
        return Cost(parameters=weights, flops=2 * weights * gates + 3 * spec.inputs * positions)

    return Blueprint("squeeze_excite", init, apply, cost, ("sequence", "image"), can_span=False)


def depthwise_conv(window: int = 3) -> Blueprint:
    """`r = x * kernel`, one filter a feature, zero at birth (Chollet, Xception, CVPR 2017).

    Args:
      window: positions along each spatial axis.

    Returns:
      The blueprint.

    Raises:
      ValueError: `window` is no positive int.
    """
    check_positive(window=window)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        del key
        return {"kernel": jnp.zeros((window,) * _num_axes(spec) + (1, spec.inputs), dtype)}

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        return _convolve_depthwise(x, cast(params, x)["kernel"])

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = window ** _num_axes(spec) * spec.inputs
        return Cost(parameters=weights, flops=2 * weights * positions)

    return Blueprint("depthwise_conv", init, apply, cost, ("sequence", "image"), can_span=False)


def bottleneck_conv(width: int = 4, window: int = 3) -> Blueprint:
    """`r = relu(conv(x down)) up`, `up = 0` at birth (He et al., CVPR 2016).

    Args:
      width: inner width R.
      window: positions of the inner convolution along each spatial axis.

    Returns:
      The blueprint.

    Raises:
      ValueError: an argument is no positive int.
    """
    check_positive(width=width, window=window)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        down_key, conv_key = jax.random.split(key)
        return {
            "down": lecun_normal(down_key, (spec.inputs, width), dtype),
            "kernel": lecun_normal(conv_key, (window,) * _num_axes(spec) + (width, width), dtype),
            "up": jnp.zeros((width, spec.outputs), dtype),
        }

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del spec, mask
        params = cast(params, x)
        inner = _convolve(x @ params["down"], params["kernel"])
        r: Array = jax.nn.relu(inner) @ params["up"]
        return r

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (spec.inputs + spec.outputs) + window ** _num_axes(spec) * width**2
        return Cost(parameters=weights, flops=(2 * weights + width) * positions)

    return Blueprint("bottleneck_conv", init, apply, cost, ("sequence", "image"), can_span=False)


def self_attention(width: int = 8, is_causal: bool = True) -> Blueprint:
    """`r = softmax(q k^T / sqrt(R)) v up` over the positions, `up = 0` at birth.

    One head of width R (Vaswani et al., 2017). An image's positions are read row by row.

    Args:
      width: width R of queries, keys and values.
      is_causal: on a sequence, whether a position sees only itself and its past; an image is
        always seen whole.

    Returns:
      The blueprint.

    Raises:
      ValueError: `width` is no positive int.
    """
    check_positive(width=width)

    def init(key: Key, spec: AdapterSpec, dtype: DType) -> Params:
        return {
            "qkv": lecun_normal(key, (spec.inputs, 3 * width), dtype),
            "up": jnp.zeros((width, spec.outputs), dtype),
        }

    def apply(params: Params, x: Array, spec: AdapterSpec, mask: Array) -> Array:
        del mask
        is_image = spec.topology == "image"
        params = cast(params, x)
        rows = x.reshape(*x.shape[:-3], -1, x.shape[-1]) if is_image else x
        query, key, value = jnp.split(rows @ params["qkv"], 3, axis=-1)
        scores = jnp.einsum("...tr,...sr->...ts", query, key).astype(jnp.float32) * width**-0.5
        if is_causal and not is_image:
            length = rows.shape[-2]
            is_visible = jnp.tril(jnp.ones((length, length), bool))
            is_visible = is_visible.reshape(*(1,) * (scores.ndim - 2), length, length)
            scores = jnp.where(is_visible, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        r: Array = jnp.einsum("...ts,...sr->...tr", weights, value) @ params["up"]
        return r.reshape(x.shape)

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        weights = width * (3 * spec.inputs + spec.outputs)
        return Cost(parameters=weights, flops=2 * weights * positions + 4 * width * positions**2)

    return Blueprint("self_attention", init, apply, cost, ("sequence", "image"), can_span=False)
