"""The three-gain forward with its exact derivative, and the measurements it makes on the way.

For the chunk `x` a seed writes to, the chunk `u` it reads (`u = x` but over a span), the body's
output `r = body(u)` and the incoming gradient `dy`::

    y       = x + act * r
    d theta = learn * (d r / d theta)^T dy
    d x     = dy                            (+ feel * (d r / d u)^T dy where u = x)
    d u     = feel * (d r / d u)^T dy
    utility = -<dy, r>

A gain of exactly 0 selects the other operand instead of multiplying, so `y` is `x` and `d x` is
`dy` bit for bit, NaN and -0.0 included, and a body that is not finite reaches nothing.

**How the measurements leave a pure loss function.** Every call takes a *tap*, a zero array with one
row a chunk, on which its output does not depend. The derivative rule returns the measurements as
the tap's cotangent. Cotangents add up over every use of an input, and all channels are sums, so
readings are right under `jax.checkpoint`, `scan`, `vmap` and `shard_map`, and a site that the loss
does not reach reads zero rows: not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._typing import Array, Bool, Float, Float32, Int32, Params
from esper_fn.base import Blueprint, BodySpec
from esper_fn._lattice._site import Chunking, chunk_mask


class Reading(NamedTuple):
    """What one step measured, summed over all calls of a site; the channels K of a tap."""

    num_values: Float32[Array, "*"]
    """Entries of the chunk seen; 0 means the site was not reached."""
    total: Float32[Array, "*"]
    """Sum of x."""
    square: Float32[Array, "*"]
    """Sum of x^2."""
    num_features: Float32[Array, "*"]
    """Features times calls."""
    num_dead: Float32[Array, "*"]
    """Features that were zero for a whole call."""
    gradient_square: Float32[Array, "*"]
    """Sum of dy^2."""
    num_live: Float32[Array, "*"]
    """Calls in which the seed had a body at work."""
    output_square: Float32[Array, "*"]
    """Sum of r^2."""
    utility: Float32[Array, "*"]
    """Sum of -dy * r."""
    num_errors: Float32[Array, "*"]
    """Calls in which finite input gave non-finite output or body gradients."""


NUM_CHANNELS = len(Reading._fields)
_NUM_WATCHED = 5


class Wiring(NamedTuple):
    """The static part of a site's forward."""

    source: Chunking
    target: Chunking
    is_span: bool
    spec: BodySpec
    blueprints: tuple[Blueprint, ...]
    """Of the site's banks, in order."""
    max_live: int | None
    """Bodies computed per bank at most; None means all slots."""


class BankView(NamedTuple):
    """One bank at one layer of a site, as the forward needs it."""

    bodies: Params
    chunk: Int32[Array, "P"]
    """The chunk each slot serves; negative for a free slot."""
    gains: Float32[Array, "P 3"]
    """act, learn, feel; all zero for a free slot."""


# --- chunks of an activation -----------------------------------------------------------------


def _columns(chunking: Chunking, chunk: Int32[Array, "n"]) -> Int32[Array, "n F"]:
    """Feature indices of chunks; padding and negative chunks point past the end."""
    safe = jnp.maximum(chunk, 0)
    columns = jnp.asarray(chunking.starts)[safe][:, None] + jnp.arange(chunking.widest)[None, :]
    real = jnp.asarray(chunk_mask(chunking))[safe] & (chunk >= 0)[:, None]
    return jnp.where(real, columns, chunking.features)


def _read(x: Float[Array, "... D"], chunking: Chunking, chunk: Int32[Array, "n"]) -> Array:
    """The chunks of `x`, `[n, ..., F]`, zero where padded."""
    if chunking.is_even:
        split = x.reshape(*x.shape[:-1], chunking.chunks, chunking.widest)
        return jnp.moveaxis(jnp.take(split, jnp.maximum(chunk, 0), axis=-2, mode="clip"), -2, 0)
    columns = _columns(chunking, chunk)
    return jnp.moveaxis(jnp.take(x, columns, axis=-1, mode="fill", fill_value=0), -2, 0)


def _write(
    x: Float[Array, "... D"],
    chunking: Chunking,
    chunk: Int32[Array, "n"],
    values: Float[Array, "n ... F"],
) -> Float[Array, "... D"]:
    """`x` with the chunks replaced; negative chunks are dropped."""
    if chunking.is_even:
        split = x.reshape(*x.shape[:-1], chunking.chunks, chunking.widest)
        rows = jnp.where(chunk >= 0, chunk, chunking.chunks)
        written = split.at[..., rows, :].set(jnp.moveaxis(values, 0, -2), mode="drop")
        return written.reshape(x.shape)
    columns = _columns(chunking, chunk)
    return x.at[..., columns].set(jnp.moveaxis(values, 0, -2), mode="drop")


def _split(per_feature: Float[Array, "D"], chunking: Chunking) -> Float[Array, "C F"]:
    """A vector over the features as rows of chunks, padded with zeros."""
    return _read(per_feature, chunking, jnp.arange(chunking.chunks))


def _over_rows(x: Float[Array, "... D"], measure: Callable[[Array], Array]) -> Float32[Array, "D"]:
    wide = x.astype(jnp.float32)
    return jnp.sum(measure(wide), axis=tuple(range(x.ndim - 1)))


# --- the operation ---------------------------------------------------------------------------


class _Live(NamedTuple):
    """The slots of one bank that this call computes."""

    order: Int32[Array, "n"] | None
    """Which slots; None for all of them."""
    bodies: Params
    chunk: Int32[Array, "n"]
    """Negative for a slot with nothing to do."""
    gains: Float32[Array, "n 3"]


def _pick(bank: BankView, max_live: int | None) -> _Live | None:
    num_slots = bank.chunk.shape[0]
    is_live = (bank.chunk >= 0) & jnp.any(bank.gains != 0, axis=-1)
    chunk = jnp.where(is_live, bank.chunk, -1)
    if max_live is None or max_live >= num_slots:
        return _Live(order=None, bodies=bank.bodies, chunk=chunk, gains=bank.gains)
    if max_live == 0:
        return None
    order = jnp.argsort(~is_live, stable=True)[:max_live].astype(jnp.int32)
    bodies, chunk, gains = jax.tree.map(lambda leaf: leaf[order], (bank.bodies, chunk, bank.gains))
    return _Live(order=order, bodies=bodies, chunk=chunk, gains=gains)


def _column(values: Array, like: Array) -> Array:
    """`[n]` shaped to broadcast against `[n, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _per_slot(values: Array, reduce: Callable[..., Array]) -> Array:
    return reduce(values, axis=tuple(range(1, values.ndim)))


def _run(blueprint: Blueprint, wiring: Wiring, live: _Live, bodies: Params, u: Array) -> Array:
    mask = jnp.asarray(chunk_mask(wiring.source))[jnp.maximum(live.chunk, 0)]
    return jax.vmap(lambda body, x, real: blueprint.apply(body, x, wiring.spec, real))(
        bodies, u, mask
    )


def _real_outputs(wiring: Wiring, live: _Live, r: Array) -> Array:
    """`r` with the padding of narrow chunks cut off."""
    if wiring.target.is_even:
        return r
    mask = jnp.asarray(chunk_mask(wiring.target))[jnp.maximum(live.chunk, 0)]
    return jnp.where(mask.reshape(mask.shape[0], *(1,) * (r.ndim - 2), -1), r, jnp.zeros_like(r))


def _lives(wiring: Wiring, banks: tuple[BankView, ...]) -> list[tuple[Blueprint, _Live]]:
    picked = [_pick(bank, wiring.max_live) for bank in banks]
    return [
        (blueprint, live)
        for blueprint, live in zip(wiring.blueprints, picked, strict=True)
        if live is not None
    ]


def _forward(
    wiring: Wiring, banks: tuple[BankView, ...], source: Array, target: Array
) -> Float[Array, "... D"]:
    y = target
    for blueprint, live in _lives(wiring, banks):
        u = _read(source, wiring.source, live.chunk)
        r = _run(blueprint, wiring, live, live.bodies, u)
        x = u if not wiring.is_span else _read(target, wiring.target, live.chunk)
        act = live.gains[:, 0]
        is_in = (act != 0) & _per_slot(jnp.isfinite(r), jnp.all)
        grown = x.astype(jnp.float32) + _column(act, x) * r.astype(jnp.float32)
        y = _write(
            y,
            wiring.target,
            live.chunk,
            jnp.where(_column(is_in, x), grown.astype(x.dtype), x),
        )
    return y


def _watch(wiring: Wiring, target: Array) -> Float32[Array, "C 5"]:
    """The channels that need no gradient."""
    chunking = wiring.target
    rows = target.size // chunking.features
    sizes = jnp.asarray(chunking.sizes, jnp.float32)
    square = _over_rows(target, jnp.square)
    dead = _split((square == 0).astype(jnp.float32), chunking)
    return jnp.stack(
        [
            sizes * rows,
            jnp.sum(_split(_over_rows(target, lambda x: x), chunking), axis=-1),
            jnp.sum(_split(square, chunking), axis=-1),
            sizes,
            jnp.sum(dead, axis=-1),
        ],
        axis=-1,
    )


class _Pulled(NamedTuple):
    """One bank's share of the backward pass."""

    bodies: Params
    dx: Array
    """`[n, ..., F]`: the gradient that the read chunk gets, `dy` included where it is the target."""
    channels: Float32[Array, "n 4"]


def _pull(
    wiring: Wiring, blueprint: Blueprint, live: _Live, u: Array, dy: Array
) -> _Pulled:
    run = partial(_run, blueprint, wiring, live)
    r, pull = jax.vjp(lambda bodies, x: _real_outputs(wiring, live, run(bodies, x)), live.bodies, u)
    d_bodies, d_u = pull(dy)
    learn, feel = live.gains[:, 1], live.gains[:, 2]
    is_sound = _per_slot(jnp.isfinite(r), jnp.all)
    is_flowing = is_sound & _per_slot(jnp.isfinite(d_u), jnp.all)
    for leaf in jax.tree.leaves(d_bodies):
        is_flowing = is_flowing & _per_slot(jnp.isfinite(leaf), jnp.all)

    def learned(leaf: Array) -> Array:
        is_taught = _column((learn != 0) & is_flowing, leaf)
        return jnp.where(is_taught, leaf * _column(learn, leaf).astype(leaf.dtype), 0)

    felt = _column(feel, d_u) * d_u.astype(jnp.float32)
    is_felt = _column((feel != 0) & is_flowing, d_u)
    if wiring.is_span:
        dx = jnp.where(is_felt, felt, 0.0).astype(u.dtype)
    else:
        dx = jnp.where(is_felt, (dy.astype(jnp.float32) + felt).astype(dy.dtype), dy)
    is_live = live.chunk >= 0
    given_finite = _per_slot(jnp.isfinite(u), jnp.all) & _per_slot(jnp.isfinite(dy), jnp.all)
    wide = jnp.where(_column(is_sound, r), r.astype(jnp.float32), 0.0)
    worth = jnp.where(wide != 0, -dy.astype(jnp.float32) * wide, 0.0)
    channels = jnp.stack(
        [
            jnp.ones_like(learn),
            _per_slot(jnp.square(wide), jnp.sum),
            _per_slot(worth, jnp.sum),
            (given_finite & ~is_flowing).astype(jnp.float32),
        ],
        axis=-1,
    )
    channels = jnp.where(is_live[:, None], channels, 0.0)
    return _Pulled(bodies=jax.tree.map(learned, d_bodies), dx=dx, channels=channels)


def _backward(
    wiring: Wiring, banks: tuple[BankView, ...], source: Array, dy: Array
) -> tuple[tuple[BankView, ...], Array, Array, Float32[Array, "C 4"]]:
    """Gradients of (banks, source, target) and the channels that need bodies."""
    d_target = dy
    d_source = jnp.zeros_like(source) if wiring.is_span else source
    channels = jnp.zeros((wiring.target.chunks, 4), jnp.float32)
    d_banks: list[BankView] = []
    lives = [_pick(bank, wiring.max_live) for bank in banks]
    for blueprint, bank, live in zip(wiring.blueprints, banks, lives, strict=True):
        d_bodies = jax.tree.map(jnp.zeros_like, bank.bodies)
        if live is not None:
            u = _read(source, wiring.source, live.chunk)
            pulled = _pull(wiring, blueprint, live, u, _read(dy, wiring.target, live.chunk))
            if wiring.is_span:
                d_source = _write(d_source, wiring.source, live.chunk, pulled.dx)
            else:
                d_target = _write(d_target, wiring.target, live.chunk, pulled.dx)
            rows = jnp.where(live.chunk >= 0, live.chunk, wiring.target.chunks)
            channels = channels.at[rows].add(pulled.channels, mode="drop")
            d_bodies = (
                pulled.bodies
                if live.order is None
                else jax.tree.map(
                    lambda zero, new, order=live.order: zero.at[order].set(new),
                    d_bodies,
                    pulled.bodies,
                )
            )
        d_banks.append(
            BankView(bodies=d_bodies, chunk=None, gains=jnp.zeros_like(bank.gains))  # type: ignore[arg-type]
        )
    return tuple(d_banks), d_source, d_target, channels


# Barriers keep XLA from fusing the host's operations across a site, so that the host's own part is
# compiled alike whichever bodies are computed: its bits do not depend on the seeds.
def _fence(x: Any) -> Any:
    return jax.lax.optimization_barrier(x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grow_in_place(
    wiring: Wiring, banks: tuple[BankView, ...], x: Array, tap: Float32[Array, "C K"]
) -> Float[Array, "... D"]:
    """`y` for a site whose bodies read what they write to."""
    del tap
    x = _fence(x)
    return _fence(_forward(wiring, banks, x, x))


def _in_place_fwd(wiring: Wiring, banks: tuple[BankView, ...], x: Array, tap: Array) -> Any:
    del tap
    x = _fence(x)
    y = _fence(_forward(wiring, banks, x, x))
    return y, (banks, x, _watch(wiring, x))


def _in_place_bwd(wiring: Wiring, kept: Any, dy: Array) -> Any:
    banks, x, watched = kept
    dy = _fence(dy)
    d_banks, _, d_x, channels = _backward(wiring, banks, x, dy)
    return d_banks, _fence(d_x), _tap_cotangent(wiring, watched, dy, channels)


def _tap_cotangent(wiring: Wiring, watched: Array, dy: Array, channels: Array) -> Array:
    slopes = jnp.sum(_split(_over_rows(dy, jnp.square), wiring.target), axis=-1, keepdims=True)
    return jnp.concatenate([watched, slopes, channels], axis=-1)


grow_in_place.defvjp(_in_place_fwd, _in_place_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grow_span(
    wiring: Wiring,
    banks: tuple[BankView, ...],
    source: Array,
    target: Array,
    tap: Float32[Array, "C K"],
) -> Float[Array, "... D"]:
    """`y` for a site whose bodies read `source` and write to `target`."""
    del tap
    source, target = _fence((source, target))
    return _fence(_forward(wiring, banks, source, target))


def _span_fwd(
    wiring: Wiring, banks: tuple[BankView, ...], source: Array, target: Array, tap: Array
) -> Any:
    del tap
    source, target = _fence((source, target))
    y = _fence(_forward(wiring, banks, source, target))
    return y, (banks, source, _watch(wiring, target))


def _span_bwd(wiring: Wiring, kept: Any, dy: Array) -> Any:
    banks, source, watched = kept
    dy = _fence(dy)
    d_banks, d_source, d_target, channels = _backward(wiring, banks, source, dy)
    d_source, d_target = _fence((d_source, d_target))
    return d_banks, d_source, d_target, _tap_cotangent(wiring, watched, dy, channels)


grow_span.defvjp(_span_fwd, _span_bwd)


# --- the survey's probe ----------------------------------------------------------------------


class Moments(NamedTuple):
    """Second moments of a chunk's input and of its gradient, summed over rows."""

    num_rows: Float32[Array, "C"]
    x_dy: Float32[Array, "C F G"]
    x_x: Float32[Array, "C F F"]
    dy_dy: Float32[Array, "C G G"]


def zero_moments(source: Chunking, target: Chunking) -> Moments:
    """The probe's tap for one layer of a site."""
    chunks, inputs, outputs = source.chunks, source.widest, target.widest
    return Moments(
        num_rows=jnp.zeros((chunks,), jnp.float32),
        x_dy=jnp.zeros((chunks, inputs, outputs), jnp.float32),
        x_x=jnp.zeros((chunks, inputs, inputs), jnp.float32),
        dy_dy=jnp.zeros((chunks, outputs, outputs), jnp.float32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def probe(wiring: Wiring, source: Array, target: Array, tap: Moments) -> Array:
    """The identity on `target`, whose tap receives the moments of `source` and of the gradient."""
    del source, tap
    return target


def _probe_fwd(wiring: Wiring, source: Array, target: Array, tap: Moments) -> Any:
    del tap
    return target, source


def _rows(x: Array, chunking: Chunking) -> Float32[Array, "C N F"]:
    rows = x.reshape(-1, chunking.features).astype(jnp.float32)
    return _read(rows, chunking, jnp.arange(chunking.chunks))


def _probe_bwd(wiring: Wiring, source: Array, dy: Array) -> Any:
    x, slope = _rows(source, wiring.source), _rows(dy, wiring.target)

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum("cnf,cng->cfg", a, b)

    moments = Moments(
        num_rows=jnp.full((x.shape[0],), x.shape[1], jnp.float32),
        x_dy=product(x, slope),
        x_x=product(x, x),
        dy_dy=product(slope, slope),
    )
    return jnp.zeros_like(source), dy, moments


probe.defvjp(_probe_fwd, _probe_bwd)


def has_body(gains: Float32[Array, "... 3"]) -> Bool[Array, "..."]:
    """Whether a slot with these gains has anything to compute."""
    return jnp.any(gains != 0, axis=-1)
