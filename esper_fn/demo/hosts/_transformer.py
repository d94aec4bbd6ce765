"""Builds a small causal transformer whose blocks run in one scan."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from esper_fn._sites import NoSeeds, Seeds, site
from esper_fn._typing import Array, Key, Params
from esper_fn.demo.hosts._base import Host

AnySeeds = Seeds | NoSeeds


def _normalise(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-5)
    return (centred * scale).astype(x.dtype)


def _attend(block: Params, x: Array, heads: int) -> Array:
    batch, length, width = x.shape
    qkv = (x @ block["qkv"]).reshape(batch, length, 3, heads, width // heads)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return mixed.reshape(batch, length, width) @ block["mix"]


def _init(
    key: Key, vocabulary: int, length: int, width: int, blocks: int, inner: int
) -> dict[str, Params]:
    keys = jax.random.split(key, 6)

    def stack(key: Key, a: int, b: int, gain: float = 1.0) -> Array:
        return jax.random.normal(key, (blocks, a, b)) * (gain / a) ** 0.5

    return {
        "token": jax.random.normal(keys[0], (vocabulary, width)) * 0.1,
        "position": jax.random.normal(keys[1], (length, width)) * 0.1,
        "blocks": {
            "qkv": stack(keys[2], width, 3 * width),
            "mix": stack(keys[3], width, width, 0.5 / blocks),
            "up": stack(keys[4], width, inner, 2.0),
            "down": stack(keys[5], inner, width, 0.5 / blocks),
        },
    }


def transformer(
    *,
    vocabulary: int,
    length: int,
    width: int = 64,
    blocks: int = 2,
    heads: int = 4,
    hidden: int | None = None,
    chunks: int = 4,
) -> Host:
    """Builds token and position embeddings, pre-norm blocks and logits of the next token.

    Sites, each with one set of seeds per block: `mlp` on the hidden activation of the block's MLP
    and `residual` on its output.

    Args:
      vocabulary: number of tokens.
      length: length of the longest sequence.
      width: width of the residual stream; `heads` divides it.
      blocks: number of blocks.
      heads: number of heads of the attention.
      hidden: width of the MLPs; four times `width` by default.
      chunks: number of seeds of a site in a block.

    Raises:
      ValueError: `heads` does not divide `width`.
    """
    if width % heads:
        raise ValueError(f"width {width} must be divisible by heads {heads}")
    inner = 4 * width if hidden is None else hidden
    block_site = partial(site, topology="sequence", layers=blocks, positions=length)
    sites = (
        block_site("mlp", features=inner, chunks=min(chunks, inner)),
        block_site("residual", features=width, chunks=min(chunks, width)),
    )

    def init(key: Key) -> Params:
        return _init(key, vocabulary, length, width, blocks, inner)

    def apply(params: Params, seeds: AnySeeds, inputs: Array) -> Array:
        x = params["token"][inputs] + params["position"][: inputs.shape[1]][None]

        def block(x: Array, layer: tuple[Params, AnySeeds, AnySeeds]) -> tuple[Array, None]:
            weights, mlp_seeds, residual_seeds = layer
            x = x + _attend(weights, _normalise(x), heads)
            inner = mlp_seeds.grow("mlp", jax.nn.gelu(_normalise(x) @ weights["up"]))
            return residual_seeds.grow("residual", x + inner @ weights["down"]), None

        stacked = (params["blocks"], seeds.layers("mlp"), seeds.layers("residual"))
        x, _ = jax.lax.scan(block, x, stacked)
        return _normalise(x) @ params["token"].T

    per_token = 2 * (4 * width * width + 2 * width * inner) * blocks + 2 * width * vocabulary
    flops = length * per_token + blocks * 4 * length * length * width
    return Host("transformer", init, apply, sites, flops)
