"""The definition of `graft` in `jax.numpy`, by `rule_jax`; XLA runs it where there is no kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from esper_kernels import rule_jax
from esper_kernels._records import Adapter, BackwardStatistics, ForwardStatistics, Gains
from esper_kernels.graft._case import Case

Array = jax.Array


def refuses(case: Case) -> str | None:
    """The reference serves every case."""
    del case
    return None


def split(case: Case, x: Array) -> Array:
    """[N, D] as [C, N, F], zero where a narrow chunk is padded."""
    if case.is_even:
        return jnp.moveaxis(x.reshape(x.shape[0], case.chunks, case.width), 1, 0)
    chunks = jnp.take(x, case.chunking.columns, axis=1, mode="fill", fill_value=0)
    return jnp.moveaxis(chunks, 1, 0)


def _join(case: Case, parts: Array) -> Array:
    flat = jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], case.chunks * case.width)
    return flat if case.is_even else flat[:, np.flatnonzero(case.chunking.mask)]


def _activate(activation: str, h: Array) -> Array:
    if activation == "relu":
        return jax.nn.relu(h)
    if activation == "gelu":
        return jax.nn.gelu(h, approximate=True)
    if activation == "silu":
        return jax.nn.silu(h)
    return h


def _run(case: Case, adapter: Adapter, u: Array) -> Array:
    """The output of every chunk's adapter; `adapter` has one row a chunk, `u` is [C, N, F]."""
    down, up, bias, gate = jax.tree.map(lambda leaf: leaf.astype(u.dtype), adapter)
    if not case.is_even:
        # What a slot holds beyond a narrow chunk's width is nobody's.
        is_real, zero = jnp.asarray(case.chunking.mask), jnp.zeros((), u.dtype)
        down = jnp.where(is_real[:, :, None], down, zero)
        up = jnp.where(is_real[:, None, :], up, zero)
        gate = None if gate is None else jnp.where(is_real[:, :, None], gate, zero)
    h = jnp.einsum("cnf,cfr->cnr", u, down)
    if bias is not None:
        h = h + bias[:, None]
    if gate is not None:
        a = jax.nn.silu(jnp.einsum("cnf,cfr->cnr", u, gate)) * h
    else:
        a = _activate(case.activation, h)
    return jnp.einsum("cnr,crf->cnf", a, up)


def is_live(case: Case, slot: Array, gains: Array) -> Array:
    """[C]: chunks that have an adapter at work."""
    return (slot >= 0) & (slot < case.slots) & jnp.any(gains != 0, axis=1)


def _of_live(case: Case, columns: Array, slot: Array, gains: Array) -> Array:
    return jnp.where(is_live(case, slot, gains)[:, None], columns, jnp.zeros_like(columns))


def _gather(case: Case, adapter: Adapter, slot: Array) -> Adapter:
    rows = jnp.clip(slot, 0, case.slots - 1)
    own: Adapter = jax.tree.map(lambda leaf: leaf[rows], adapter)
    return own


def watch(case: Case, x: Array) -> Array:
    """[C, 5]: the columns of `ForwardStatistics`."""
    wide = x.astype(rule_jax.accumulator(x.dtype))
    square, total = jnp.sum(wide * wide, axis=0)[None], jnp.sum(wide, axis=0)[None]
    sizes = jnp.asarray(case.chunking.sizes, wide.dtype)
    is_dead = (split(case, square)[:, 0] == 0) & jnp.asarray(case.chunking.mask)
    statistics = ForwardStatistics(
        num_values=sizes * x.shape[0],
        total=jnp.sum(split(case, total)[:, 0], axis=1),
        square=jnp.sum(split(case, square)[:, 0], axis=1),
        num_features=sizes,
        num_dead=jnp.sum(is_dead.astype(wide.dtype), axis=1),
    )
    return jnp.stack(statistics, axis=1)


def forward(
    case: Case, x: Array, adapter: Adapter, slot: Array, gains: Array
) -> tuple[Array, Array]:
    """`y` and `watched`; see the README beside this file."""
    u = split(case, x)
    r = _run(case, _gather(case, adapter, slot), u)
    scale = Gains.from_columns(_of_live(case, gains, slot, gains)).output_scale
    return _join(case, rule_jax.blend(u, rule_jax.per_adapter(scale, r), r)), watch(case, x)


def forward_in_place(
    case: Case, x: Array, adapter: Adapter, slot: Array, gains: Array
) -> tuple[Array, Array]:
    """The same with `watched` for live chunks only. Donate `x` to spare the copy."""
    y, watched = forward(case, x, adapter, slot, gains)
    return y, _of_live(case, watched, slot, gains)


def backward(
    case: Case, x: Array, dy: Array, adapter: Adapter, slot: Array, gains: Array, watched: Array
) -> tuple[Array, Adapter, Array]:
    """`dx`, the adapter's gradients and `channels`; see the README beside this file."""
    del watched  # the rule looks at what it reads itself
    live, named = is_live(case, slot, gains), Gains.from_columns(_of_live(case, gains, slot, gains))
    u, slope = split(case, x), split(case, dy)
    own = _gather(case, adapter, slot)
    pulled = rule_jax.pullback(partial(_run, case), named, own, u, slope)
    scale = rule_jax.per_adapter(named.input_grad_scale, slope)
    rows = jnp.where(live, slot, case.slots)

    def scatter(leaf: Array, like: Array) -> Array:
        return jnp.zeros_like(like).at[rows].set(leaf, mode="drop")

    of_live = jax.tree.map(lambda leaf: jnp.where(live, leaf, 0), pulled.statistics)
    channels: BackwardStatistics = of_live._replace(
        gradient_square=pulled.statistics.gradient_square
    )
    return (
        _join(case, rule_jax.blend(slope, scale, pulled.d_u)),
        jax.tree.map(scatter, pulled.d_adapters, adapter),
        jnp.stack(channels, axis=1),
    )


def backward_in_place(
    case: Case, x: Array, dy: Array, adapter: Adapter, slot: Array, gains: Array, watched: Array
) -> tuple[Array, Adapter, Array]:
    """The same with `channels` for live chunks only. Donate `dy` to spare the copy."""
    dx, d_adapter, channels = backward(case, x, dy, adapter, slot, gains, watched)
    return dx, d_adapter, _of_live(case, channels, slot, gains)
