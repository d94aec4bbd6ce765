"""Builds a small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._sites import NoSeeds, Seeds, site
from esper_fn._typing import Array, Key, Params
from esper_fn.demo.hosts._base import Host, dense, dense_init


def _convolve(layer: dict[str, Array], x: Array) -> Array:
    y = jax.lax.conv_general_dilated(
        x,
        layer["kernel"].astype(x.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + layer["bias"].astype(x.dtype).reshape(1, 1, 1, -1)


def _halve(x: Array) -> Array:
    """Takes the largest of every 2 x 2 positions."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, window, "VALID")


def conv(
    image: tuple[int, int, int],
    channels: Sequence[int],
    *,
    hidden: int,
    classes: int,
    chunks: int = 4,
) -> Host:
    """Builds 3 x 3 convolutions with relu and 2 x 2 pooling, a dense hidden layer and logits.

    Sites: `conv{k}` on the pooled output of each convolution (an image) and `hidden` on the dense
    layer's (a vector), each with `chunks` seeds or one per channel if those are fewer.

    Args:
      image: height, width and channels of the input.
      channels: output channels of each convolution.
      hidden: width of the dense layer.
      classes: number of logits.
      chunks: number of seeds of a site.
    """
    height, width, depth = image
    sizes = (depth, *channels)
    sites, flops = [], 0
    for k, (a, b) in enumerate(pairwise(sizes), start=1):
        flops += 2 * 9 * a * b * height * width
        height, width = height // 2, width // 2
        image_site = partial(site, topology="image", positions=height * width)
        sites.append(image_site(f"conv{k}", features=b, chunks=min(chunks, b)))
    flat = height * width * sizes[-1]
    flops += 2 * (flat * hidden + hidden * classes)
    sites.append(site("hidden", features=hidden, chunks=min(chunks, hidden)))

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(channels) + 2)
        layers = [
            {
                "kernel": jax.random.normal(k, (3, 3, a, b)) * (2 / (9 * a)) ** 0.5,
                "bias": jnp.zeros((b,)),
            }
            for k, a, b in zip(keys[2:], sizes[:-1], sizes[1:], strict=True)
        ]
        return {
            "conv": layers,
            "hidden": dense_init(keys[0], flat, hidden),
            "out": dense_init(keys[1], hidden, classes, gain=1.0),
        }

    def apply(params: Params, seeds: Seeds | NoSeeds, inputs: Array) -> Array:
        x = inputs
        for k, layer in enumerate(params["conv"], start=1):
            x = seeds.grow(f"conv{k}", _halve(jax.nn.relu(_convolve(layer, x))))
        x = jax.nn.relu(dense(params["hidden"], x.reshape(x.shape[0], -1)))
        return dense(params["out"], seeds.grow("hidden", x))

    return Host("conv", init, apply, tuple(sites), flops)
