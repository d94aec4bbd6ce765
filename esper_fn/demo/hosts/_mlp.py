"""Builds a multilayer perceptron that can grow neurons in every hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

from esper_fn._sites import NoSeeds, Seeds, Site, site
from esper_fn._typing import Array, Key, Params
from esper_fn.blueprints._base import Blueprint
from esper_fn.demo.hosts._base import Host, dense, dense_init


def mlp(widths: Sequence[int], *, spans: int = 0, chunks: int = 0) -> Host:
    """Builds a network of `widths[0]` inputs, hidden gelu layers and `widths[-1]` logits.

    Sites: around hidden layer k, `spans` seeds named `layer{k}.{i}`, each of which can add neurons
    to that layer (from its input to its successor's pre-activation); and on its output, site
    `hidden{k}` with `chunks` seeds, or as many as it has units if those are fewer.

    Args:
      widths: sizes of the layers, at least three.
      spans: number of seeds around each hidden layer.
      chunks: number of seeds on each hidden layer's output.

    Raises:
      ValueError: there are fewer than three widths, or one is below 1.
    """
    if len(widths) < 3 or min(widths) < 1:
        raise ValueError(f"widths must name at least three positive sizes, got {tuple(widths)}")
    sizes = tuple(widths)
    num_hidden = len(sizes) - 2
    sites: list[Site] = []
    for k in range(1, num_hidden + 1):
        if chunks:
            sites.append(site(f"hidden{k}", features=sizes[k], chunks=min(chunks, sizes[k])))
        sites.extend(
            site(f"layer{k}.{i}", source_features=sizes[k - 1], features=sizes[k + 1])
            for i in range(spans)
        )

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(sizes) - 1)
        return [dense_init(k, a, b) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def apply(params: Params, seeds: Seeds | NoSeeds, inputs: Array) -> Array:
        # What each hidden layer's added neurons read: the layer's own input.
        read = inputs
        x = dense(params[0], inputs)
        for k in range(1, num_hidden + 1):
            hidden = jax.nn.gelu(x)
            if chunks:
                hidden = seeds.grow(f"hidden{k}", hidden)
            x = dense(params[k], hidden)
            for i in range(spans):
                x = seeds.grow(f"layer{k}.{i}", x, source=read)
            read = hidden
        return x

    flops = sum(2 * a * b for a, b in pairwise(sizes))
    return Host("mlp", init, apply, tuple(sites), flops, _fold)


def _fold(
    params: Params, site_name: str, blueprint: Blueprint, adapter: Params, scale: float, /
) -> Params | None:
    """Folds an adapter over a span into the layer it leads around, if both are gelu neurons."""
    layer, dot, _ = site_name.removeprefix("layer").partition(".")
    is_alike = blueprint.neurons == "gelu" and set(adapter) == {"down", "bias", "up"}
    if not (site_name.startswith("layer") and dot and is_alike):
        return None
    k = int(layer)
    into, out = params[k - 1], params[k]
    # The adapter neither reads nor writes what was folded into the layers below and above.
    unread = into["weight"].shape[0] - adapter["down"].shape[0]
    unwritten = out["weight"].shape[1] - adapter["up"].shape[1]
    down = jnp.pad(jnp.asarray(adapter["down"]), ((0, unread), (0, 0)))
    up = jnp.pad(scale * jnp.asarray(adapter["up"]), ((0, 0), (0, unwritten)))
    wider = [
        {
            "weight": jnp.concatenate([into["weight"], down], axis=1),
            "bias": jnp.concatenate([into["bias"], jnp.asarray(adapter["bias"])]),
        },
        {**out, "weight": jnp.concatenate([out["weight"], up])},
    ]
    return [*params[: k - 1], *wider, *params[k + 1 :]]
