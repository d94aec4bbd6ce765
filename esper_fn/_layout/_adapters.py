"""What the adapters of one bank compute, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._layout._chunks import lay_out, per_feature, place, window
from esper_fn._layout._rounds import Live, Wiring
from esper_fn._typing import Array, Bool, Float, Float32, Params
from esper_fn.base import Blueprint
from esper_fn.errors import LayoutError
from esper_kernels import BackwardStatistics, Chunking, Gains


def _column(values: Array, like: Array) -> Array:
    """`[n]` shaped to broadcast against `[n, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _per_slot(values: Array, reduce: Callable[..., Array]) -> Array:
    return reduce(values, axis=tuple(range(1, values.ndim)))


def is_finite(values: Array) -> Bool[Array, "n"]:
    """Whether all of a slot's values are."""
    return _per_slot(jnp.isfinite(values), jnp.all)


def outputs(
    blueprint: Blueprint, wiring: Wiring, live: Live, adapters: Params, u: Float[Array, "n ... F"]
) -> Float[Array, "n ... G"]:
    """The adapters' outputs, zero in the padding of narrow chunks."""
    chunk = jnp.maximum(live.chunk, 0)
    mask = jnp.asarray(wiring.source.mask)[chunk]
    r = jax.vmap(lambda adapter, x, real: blueprint.apply(adapter, x, wiring.spec, real))(
        adapters, u, mask
    )
    wanted = (*u.shape[:-1], wiring.spec.outputs)
    if r.shape != wanted or r.dtype != u.dtype:
        raise LayoutError(
            f"blueprint {blueprint.name!r}: apply must return {wanted[1:]} {u.dtype}, its input's "
            f"dtype whatever the parameters' is, got {r.shape[1:]} {r.dtype}"
        )
    if wiring.target.is_even:
        return r
    is_real = jnp.asarray(wiring.target.mask)[chunk]
    return jnp.where(is_real.reshape(-1, *(1,) * (r.ndim - 2), r.shape[-1]), r, jnp.zeros_like(r))


def bits(x: Array) -> Array:
    """`x`, numbers of 16 bits as integers.

    XLA on CPU may select 16-bit floats as float32 and flush subnormal ones to zero on the way; so
    would a loop whose carry a `vmap` selects.
    """
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


@jax.custom_jvp
def choose(is_first: Bool[Array, "..."], first: Array, second: Array) -> Array:
    """`where(is_first, first, second)` on the bits."""
    chosen: Array = jnp.where(is_first, bits(first), bits(second))
    return chosen.view(first.dtype)


@choose.defjvp
def _choose_tangent(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    return choose(*primals), jnp.where(primals[0], *tangents[1:])


def add(base: Array, chunking: Chunking, chunk: Array, gain: Array, values: Array) -> Array:
    """`base + gain * values` in the slots' chunks, `base` itself where the gain is 0.

    Args:
      base: `[..., D]`, of `values`' dtype or its `bits`.
      chunking: how D splits.
      chunk: of each slot; negative where it serves none.
      gain: of each slot, float32.
      values: `[n, ..., F]`.

    Returns:
      What `base` is.
    """
    if chunk.shape[0] == 1:
        gain = jnp.where(chunk[0] >= 0, gain[0], 0.0)
        start, is_real, values = window(chunking, chunk[0], values[0])
        part = jax.lax.dynamic_slice_in_dim(base, start, chunking.widest, axis=-1)
        old = part.view(values.dtype)
        wide = old.astype(jnp.float32) + gain * values.astype(jnp.float32)
        new = choose(is_real & (gain != 0), wide.astype(old.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(base, new.view(base.dtype), start, axis=-1)
    placed = place(chunking, chunk)
    factor = per_feature(gain, chunking, placed, base.ndim)
    old = base.view(values.dtype)
    wide = old.astype(jnp.float32) + factor * lay_out(values, chunking, placed).astype(jnp.float32)
    return choose(factor != 0, wide.astype(old.dtype), old).view(base.dtype)


class Pulled(NamedTuple):
    """One bank's share of the backward pass."""

    adapters: Params
    input_grad_scale: Float32[Array, "n"]
    """How much of `d_u` reaches the host; 0 where the adapter breaks."""
    d_u: Float[Array, "n ... F"]
    channels: Float32[Array, "n 5"]
    is_flowing: Bool[Array, "n"]
    """Whether output and gradients are finite."""


def _damped(dy: Array, damping: Float32[Array, "n"], r: Array) -> Array:
    """`dy + damping r`, `dy` itself where damping is 0."""
    factor = _column(damping, r)
    wide = dy.astype(jnp.float32) + factor * r.astype(jnp.float32)
    return choose(factor != 0, wide.astype(dy.dtype), dy)


def pull(wiring: Wiring, blueprint: Blueprint, live: Live, u: Array, dy: Array) -> Pulled:
    """The adapters' gradients, and what the step measured of them."""
    r, pull_back = jax.vjp(partial(outputs, blueprint, wiring, live), live.adapters, u)
    gains = Gains.from_columns(live.gains)
    # The host gets nothing of a damped adapter: nobody reads its `d_u`.
    d_adapters, d_u = pull_back(_damped(dy, gains.output_damping, r))
    is_sound = is_finite(r)
    is_flowing = is_sound & is_finite(d_u)
    for leaf in jax.tree.leaves(d_adapters):
        is_flowing = is_flowing & is_finite(leaf)

    def learned(leaf: Array) -> Array:
        scale = gains.param_grad_scale
        learns = _column((scale != 0) & is_flowing, leaf)
        return jnp.where(learns, leaf * _column(scale, leaf).astype(leaf.dtype), 0)

    was_fed_soundly = is_finite(u) & is_finite(dy)
    wide = jnp.where(_column(is_sound, r), r.astype(jnp.float32), 0.0)
    worth = jnp.where(wide != 0, -dy.astype(jnp.float32) * wide, 0.0)
    channels = BackwardStatistics(
        gradient_square=_per_slot(jnp.square(dy.astype(jnp.float32)), jnp.sum),
        num_live=jnp.ones_like(gains.param_grad_scale),
        output_square=_per_slot(jnp.square(wide), jnp.sum),
        utility=_per_slot(worth, jnp.sum),
        num_errors=(was_fed_soundly & ~is_flowing).astype(jnp.float32),
    )
    return Pulled(
        adapters=jax.tree.map(learned, d_adapters),
        input_grad_scale=jnp.where(is_flowing, gains.input_grad_scale, 0.0),
        d_u=d_u,
        channels=jnp.where((live.chunk >= 0)[:, None], jnp.stack(channels, axis=-1), 0.0),
        is_flowing=is_flowing,
    )
