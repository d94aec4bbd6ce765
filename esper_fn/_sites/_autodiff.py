"""Derivatives of a site, and how its measurements leave a pure loss function.

The mathematics is `esper_kernels.rule_jax`'s. So that time and memory follow the adapters alive,
each site runs a loop over them, a few at a time, that changes the activation in place. The host's
own operations stand outside the loop, compiled once, and a gain of 0 selects element by element:
the host's bits cannot depend on its dormant or learning seeds.

Every call takes a *tap*, a zero array with one row a chunk, on which its output does not depend.
The derivative rule returns the measurements as the tap's cotangent. Cotangents add up over every
use of an input, and all statistics are sums, so they are right under `jax.checkpoint`, `scan`,
`vmap` and `shard_map`, and a site that the loss does not reach reads zero rows: not measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from esper_fn._control import cond
from esper_fn._sites._chunks import split
from esper_fn._sites._passes import SiteGradients, backward, backward_smooth, forward
from esper_fn._sites._schedule import Banks, BankView, SiteConfig
from esper_fn._typing import Array, Float, Float32
from esper_kernels import NUM_FORWARD_STATISTICS, Chunking, ForwardStatistics


def grow(
    config: SiteConfig,
    banks: Banks,
    source: Float[Array, "... E"] | None,
    x: Float[Array, "... D"],
    tap: Float32[Array, "C 10"],
) -> Float[Array, "... D"]:
    """The activation with a site's adapters added.

    Args:
      config: of the site.
      banks: of the site.
      source: what the adapters of a span read; None where they read `x`.
      x: what they write to.
      tap: zeros, whose cotangent is the columns of `Statistics`.
    """
    return _grow(config, banks, (x,) if source is None else (source, x), tap)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grow(
    config: SiteConfig, banks: Banks, inputs: tuple[Array, ...], tap: Array
) -> tuple[Array, Float32[Array, "C 5"]]:
    """`y` and the columns of `ForwardStatistics`."""
    del tap
    y, statistics = forward(config, banks, inputs[0], inputs[-1])
    if statistics is None:
        statistics = _measure(banks, config.site.target, inputs[-1])
    return y, statistics


def _grow_fwd(config: SiteConfig, banks: Banks, inputs: tuple[Array, ...], tap: Array) -> Any:
    # Itself, so that an outer derivative goes by the same rule.
    y, statistics = _grow(config, banks, inputs, tap)
    return (y, statistics), (banks, inputs, statistics)


def _grow_bwd(config: SiteConfig, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    banks, inputs, statistics = residuals
    dy = cotangents[0]
    pulled = _backward(config, banks, inputs[0], statistics, dy)
    d_banks = tuple(
        BankView(adapters=leaves, chunk=None, gains=jnp.zeros_like(bank.gains))  # type: ignore[arg-type]
        for leaves, bank in zip(pulled.d_adapters, banks, strict=True)
    )
    d_inputs = (pulled.d_source,) if len(inputs) == 1 else (pulled.d_source, dy)
    return d_banks, d_inputs, jnp.concatenate([statistics, pulled.statistics], axis=-1)


_grow.defvjp(_grow_fwd, _grow_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    config: SiteConfig, banks: Banks, source: Array, statistics: Array, dy: Array
) -> SiteGradients:
    return backward(config, banks, source, statistics, dy)


@_backward.defjvp
def _backward_tangent(config: SiteConfig, primals: Any, tangents: Any) -> Any:
    """What is measured counts as constant."""
    pulled = _backward(config, *primals)
    banks, source, _, dy = primals
    d_banks, d_source, _, d_dy = tangents
    _, (moved, d_adapters) = jax.jvp(
        partial(backward_smooth, config), (banks, source, dy), (d_banks, d_source, d_dy)
    )
    still = jnp.zeros_like(pulled.statistics)
    return pulled, SiteGradients(d_source=moved, statistics=still, d_adapters=d_adapters)


def _measure(banks: Banks, chunking: Chunking, x: Array) -> Float32[Array, "C 5"]:
    """The columns of `ForwardStatistics`; zeros for an empty call."""
    rows = x.size // chunking.features
    if not rows:
        shape = chunking.chunks, NUM_FORWARD_STATISTICS
        return jnp.zeros_like(x, shape=shape, dtype=jnp.float32)
    total, square = _sums_apart(banks, x)
    features = total, square, (square == 0).astype(jnp.float32)
    total, square, dead = (jnp.sum(split(values, chunking), axis=-1) for values in features)
    sizes = jnp.asarray(chunking.sizes, jnp.float32)
    statistics = ForwardStatistics(
        num_values=sizes * rows, total=total, square=square, num_features=sizes, num_dead=dead
    )
    return jnp.stack(statistics, axis=-1)


def _sums_apart(banks: Banks, x: Array) -> tuple[Float32[Array, "D"], Float32[Array, "D"]]:
    """The sums over rows of `x` and of its square, in a computation of their own.

    A conditional that always holds, which XLA cannot know. Without it XLA would fuse whatever made
    `x` (a pooling, say) into each sum and compute it several times.
    """
    always = banks[0].chunk[0] > jnp.iinfo(jnp.int32).min
    return cond(always, _sums, _no_sums, x)


def _sums(x: Array) -> tuple[Array, Array]:
    wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    return jnp.sum(wide, axis=axes), jnp.sum(jnp.square(wide), axis=axes)


def _no_sums(x: Array) -> tuple[Array, Array]:
    zeros = jnp.zeros_like(x, shape=x.shape[-1:], dtype=jnp.float32)
    return zeros, zeros
