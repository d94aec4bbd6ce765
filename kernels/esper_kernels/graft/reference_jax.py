"""The definition of `graft` in `jax.numpy`; what XLA runs where there is no kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_kernels._records import Adapter
from esper_kernels.graft._case import Case

Array = jax.Array


def refuses(case: Case) -> str | None:
    """The reference serves every case."""
    del case
    return None


def split(case: Case, x: Array) -> Array:
    """[N, D] as [N, C, F], zero where a narrow chunk is padded."""
    if case.is_even:
        return x.reshape(x.shape[0], case.chunks, case.width)
    chunking = case.chunking
    columns = np.where(chunking.mask, chunking.columns, 0)
    return jnp.where(chunking.mask[None], x[:, columns], jnp.zeros((), x.dtype))


def _join(case: Case, parts: Array) -> Array:
    flat = parts.reshape(parts.shape[0], case.chunks * case.width)
    if case.is_even:
        return flat
    return flat[:, np.flatnonzero(case.chunking.mask)]


def _wide(dtype: Any) -> Any:
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _activate(activation: str, h: Array) -> Array:
    if activation == "relu":
        return jax.nn.relu(h)
    if activation == "gelu":
        return jax.nn.gelu(h, approximate=True)
    if activation == "silu":
        return jax.nn.silu(h)
    return h


def _run(activation: str, adapter: Adapter, u: Array) -> Array:
    """`r` of every chunk; `adapter` has one row a chunk."""
    h = jnp.einsum("ncf,cfr->ncr", u, adapter.down)
    if adapter.bias is not None:
        h = h + adapter.bias[None]
    if adapter.gate is not None:
        a = jax.nn.silu(jnp.einsum("ncf,cfr->ncr", u, adapter.gate)) * h
    else:
        a = _activate(activation, h)
    return jnp.einsum("ncr,crf->ncf", a, adapter.up)


def is_live(case: Case, slot: Array, gains: Array) -> Array:
    """[C]: chunks that have an adapter at work."""
    return (slot >= 0) & (slot < case.slots) & jnp.any(gains != 0, axis=1)


def _gather(case: Case, adapter: Adapter, slot: Array, dtype: Any) -> Adapter:
    rows = jnp.clip(slot, 0, case.slots - 1)
    own: Adapter = jax.tree.map(lambda leaf: leaf[rows].astype(dtype), adapter)
    if case.is_even:
        return own
    # What a slot holds beyond a narrow chunk's width is nobody's.
    is_real, zero = jnp.asarray(case.chunking.mask), jnp.zeros((), dtype)
    return own._replace(
        down=jnp.where(is_real[:, :, None], own.down, zero),
        up=jnp.where(is_real[:, None, :], own.up, zero),
        gate=None if own.gate is None else jnp.where(is_real[:, :, None], own.gate, zero),
    )


def _add(base: Array, gain: Array, values: Array) -> Array:
    """`base + gain * values`; `base` itself where the gain is 0 or a value is not finite."""
    gain = gain.astype(_wide(base.dtype))[None, :, None]
    wide = base.astype(gain.dtype) + gain * values.astype(gain.dtype)
    return jnp.where((gain != 0) & jnp.isfinite(values), wide.astype(base.dtype), base)


def watch(case: Case, x: Array) -> Array:
    """[C, 5]: `num_values, total, square, num_features, num_dead`."""
    wide = x.astype(_wide(x.dtype))
    square, total = jnp.sum(wide * wide, axis=0)[None], jnp.sum(wide, axis=0)[None]
    widths = jnp.asarray(case.chunking.sizes, wide.dtype)
    real = jnp.asarray(case.chunking.mask, wide.dtype)
    is_dead = (split(case, square)[0] == 0).astype(wide.dtype) * real
    return jnp.stack(
        [
            widths * x.shape[0],
            jnp.sum(split(case, total)[0], axis=1),
            jnp.sum(split(case, square)[0], axis=1),
            widths,
            jnp.sum(is_dead, axis=1),
        ],
        axis=1,
    )


def forward(
    case: Case, x: Array, adapter: Adapter, slot: Array, gains: Array
) -> tuple[Array, Array]:
    """`y` and `watched`; see the README beside this file."""
    act = jnp.where(is_live(case, slot, gains), gains[:, 0], jnp.zeros((), gains.dtype))
    u = split(case, x)
    r = _run(case.activation, _gather(case, adapter, slot, x.dtype), u)
    return _join(case, _add(u, act, r)), watch(case, x)


def forward_in_place(
    case: Case, x: Array, adapter: Adapter, slot: Array, gains: Array
) -> tuple[Array, Array]:
    """The same with `watched` for live chunks only. Donate `x` to spare the copy."""
    y, watched = forward(case, x, adapter, slot, gains)
    return y, _of_live(case, watched, slot, gains)


def _of_live(case: Case, measured: Array, slot: Array, gains: Array) -> Array:
    return jnp.where(is_live(case, slot, gains)[:, None], measured, jnp.zeros_like(measured))


def backward(
    case: Case, x: Array, dy: Array, adapter: Adapter, slot: Array, gains: Array, watched: Array
) -> tuple[Array, Adapter, Array]:
    """`dx`, the adapter's gradients and `channels`; see the README beside this file."""
    live = is_live(case, slot, gains)
    learn, feel, damping = (
        jnp.where(live, gains[:, k], jnp.zeros((), gains.dtype)) for k in (1, 2, 3)
    )
    u, slope = split(case, x), split(case, dy)
    narrow = _gather(case, adapter, slot, x.dtype)
    r, pull = jax.vjp(partial(_run, case.activation), narrow, u)
    # An adapter that is felt is not damped, so `d_u` is the host's own wherever it is read.
    damping = jnp.where(feel == 0, damping, jnp.zeros((), gains.dtype))
    d_adapter, d_u = pull(_add(slope, damping, r))

    wide = _wide(x.dtype)
    gradient_square = jnp.sum(jnp.square(slope.astype(wide)), axis=(0, 2))
    output_square = jnp.sum(jnp.square(r.astype(wide)), axis=(0, 2))
    utility = -jnp.sum(slope.astype(wide) * r.astype(wide), axis=(0, 2))
    is_sound = jnp.isfinite(output_square)
    is_flowing = is_sound & jnp.all(jnp.isfinite(d_u), axis=(0, 2))
    for leaf in jax.tree.leaves(d_adapter):
        is_flowing &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    fed = jnp.isfinite(gradient_square) & jnp.isfinite(watched[:, 2])

    rows = jnp.where(live & is_flowing & (learn != 0), slot, case.slots)

    def learned(leaf: Array, of: Array) -> Array:
        share = leaf.astype(wide) * learn.astype(wide).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.zeros_like(of).at[rows].set(share.astype(of.dtype), mode="drop")

    zero = jnp.zeros((), wide)
    channels = [
        jnp.where(live, jnp.ones((), wide), zero),
        jnp.where(live & is_sound, output_square, zero),
        jnp.where(live & is_sound, utility, zero),
        (live & fed & ~is_flowing).astype(wide),
    ]
    return (
        _join(case, _add(slope, feel, d_u)),
        jax.tree.map(learned, d_adapter, adapter),
        jnp.stack([gradient_square, *channels], axis=1),
    )


def backward_in_place(
    case: Case, x: Array, dy: Array, adapter: Adapter, slot: Array, gains: Array, watched: Array
) -> tuple[Array, Adapter, Array]:
    """The same with `channels` for live chunks only. Donate `dy` to spare the copy."""
    dx, d_adapter, channels = backward(case, x, dy, adapter, slot, gains, watched)
    return dx, d_adapter, _of_live(case, channels, slot, gains)
