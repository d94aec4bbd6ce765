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

So that time follows the bodies alive, each site switches between variants that compute none, few or
all of its slots. The host's own operations stand outside the switch, compiled once, and a gain of 0
selects element by element: the host's bits cannot depend on its dormant or learning seeds.

**How the measurements leave a pure loss function.** Every call takes a *tap*, a zero array with one
row a chunk, on which its output does not depend. The derivative rule returns the measurements as
the tap's cotangent. Cotangents add up over every use of an input, and all channels are sums, so
readings are right under `jax.checkpoint`, `scan`, `vmap` and `shard_map`, and a site that the loss
does not reach reads zero rows: not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._lattice._chunks import lay_out, per_feature, place, read, split
from esper_fn._lattice._site import Chunking, chunk_mask
from esper_fn._typing import Array, Bool, Float, Float32, Int32, Params
from esper_fn.base import Blueprint, BodySpec


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


class Wiring(NamedTuple):
    """The static part of a site's forward."""

    source: Chunking
    target: Chunking
    is_span: bool
    spec: BodySpec
    blueprints: tuple[Blueprint, ...]
    """Of the site's banks, in order."""
    levels: tuple[int, ...]
    """Bodies computed per bank, one variant each, increasing; the last one holds every slot."""


class BankView(NamedTuple):
    """One bank at one layer of a site, as the forward needs it."""

    bodies: Params
    chunk: Int32[Array, "P"]
    """The chunk each slot serves; negative for a free slot."""
    gains: Float32[Array, "P 3"]
    """act, learn, feel; all zero for a free slot."""


Banks = tuple[BankView, ...]


def _is_live(bank: BankView) -> Bool[Array, "P"]:
    return (bank.chunk >= 0) & jnp.any(bank.gains != 0, axis=-1)


# --- variants by the number of live bodies ---------------------------------------------------


@lru_cache(maxsize=512)
def _variants(operation: Callable[..., Any], wiring: Wiring) -> tuple[Callable[..., Any], ...]:
    return tuple(partial(operation, wiring, level) for level in wiring.levels)


def _at_level(operation: Callable[..., Any], wiring: Wiring, banks: Banks, *operands: Array) -> Any:
    """`operation` in the smallest variant that holds the fullest bank."""
    variants = _variants(operation, wiring)
    if len(variants) == 1:
        return variants[0](banks, *operands)
    counts = [jnp.sum(_is_live(bank), dtype=jnp.int32) for bank in banks]
    fullest = jnp.max(jnp.stack(counts))
    level = jnp.sum(jnp.asarray(wiring.levels, jnp.int32) < fullest, dtype=jnp.int32)
    return jax.lax.switch(level, variants, banks, *operands)


class _Live(NamedTuple):
    """The slots of one bank that a variant computes."""

    order: Int32[Array, "n"] | None
    """Which slots; None for all of them."""
    bodies: Params
    chunk: Int32[Array, "n"]
    """Negative for a slot with nothing to do."""
    gains: Float32[Array, "n 3"]


def _pick(bank: BankView, max_live: int) -> _Live:
    is_live = _is_live(bank)
    chunk = jnp.where(is_live, bank.chunk, -1)
    if max_live >= bank.chunk.shape[0]:
        return _Live(order=None, bodies=bank.bodies, chunk=chunk, gains=bank.gains)
    order = jnp.argsort(~is_live, stable=True)[:max_live].astype(jnp.int32)
    bodies, chunk, gains = jax.tree.map(lambda leaf: leaf[order], (bank.bodies, chunk, bank.gains))
    return _Live(order=order, bodies=bodies, chunk=chunk, gains=gains)


# --- one bank --------------------------------------------------------------------------------


def _column(values: Array, like: Array) -> Array:
    """`[n]` shaped to broadcast against `[n, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _per_slot(values: Array, reduce: Callable[..., Array]) -> Array:
    return reduce(values, axis=tuple(range(1, values.ndim)))


def _is_finite(values: Array) -> Bool[Array, "n"]:
    return _per_slot(jnp.isfinite(values), jnp.all)


def _run(
    blueprint: Blueprint, wiring: Wiring, live: _Live, bodies: Params, u: Float[Array, "n ... F"]
) -> Float[Array, "n ... G"]:
    """The bodies' outputs, zero in the padding of narrow chunks."""
    chunk = jnp.maximum(live.chunk, 0)
    mask = jnp.asarray(chunk_mask(wiring.source))[chunk]
    r = jax.vmap(lambda body, x, real: blueprint.apply(body, x, wiring.spec, real))(bodies, u, mask)
    if wiring.target.is_even:
        return r
    is_real = jnp.asarray(chunk_mask(wiring.target))[chunk]
    return jnp.where(is_real.reshape(-1, *(1,) * (r.ndim - 2), r.shape[-1]), r, jnp.zeros_like(r))


def _add(
    base: Float[Array, "... D"], chunking: Chunking, chunk: Array, gain: Array, values: Array
) -> Float[Array, "... D"]:
    """`base + gain * values` in the slots' chunks, `base` itself where the gain is 0."""
    placed = place(chunking, chunk)
    factor = per_feature(gain, chunking, placed, base.ndim)
    wide = base.astype(jnp.float32) + factor * lay_out(values, chunking, placed).astype(jnp.float32)
    return jnp.where(factor != 0, wide.astype(base.dtype), base)


class _Pulled(NamedTuple):
    """One bank's share of the backward pass."""

    bodies: Params
    feel: Float32[Array, "n"]
    """How much of `d_u` the host feels."""
    d_u: Float[Array, "n ... F"]
    channels: Float32[Array, "n 4"]


def _pull(wiring: Wiring, blueprint: Blueprint, live: _Live, u: Array, dy: Array) -> _Pulled:
    r, pull = jax.vjp(partial(_run, blueprint, wiring, live), live.bodies, u)
    d_bodies, d_u = pull(dy)
    learn, feel = live.gains[:, 1], live.gains[:, 2]
    is_sound = _is_finite(r)
    is_flowing = is_sound & _is_finite(d_u)
    for leaf in jax.tree.leaves(d_bodies):
        is_flowing = is_flowing & _is_finite(leaf)

    def learned(leaf: Array) -> Array:
        is_taught = _column((learn != 0) & is_flowing, leaf)
        return jnp.where(is_taught, leaf * _column(learn, leaf).astype(leaf.dtype), 0)

    was_fed_soundly = _is_finite(u) & _is_finite(dy)
    wide = jnp.where(_column(is_sound, r), r.astype(jnp.float32), 0.0)
    worth = jnp.where(wide != 0, -dy.astype(jnp.float32) * wide, 0.0)
    channels = jnp.stack(
        [
            jnp.ones_like(learn),
            _per_slot(jnp.square(wide), jnp.sum),
            _per_slot(worth, jnp.sum),
            (was_fed_soundly & ~is_flowing).astype(jnp.float32),
        ],
        axis=-1,
    )
    return _Pulled(
        bodies=jax.tree.map(learned, d_bodies),
        feel=jnp.where(is_flowing, feel, 0.0),
        d_u=d_u,
        channels=jnp.where((live.chunk >= 0)[:, None], channels, 0.0),
    )


# --- one site --------------------------------------------------------------------------------


def _forward(wiring: Wiring, max_live: int, banks: Banks, source: Array, target: Array) -> Array:
    y = target
    if max_live == 0:
        return y
    for blueprint, bank in zip(wiring.blueprints, banks, strict=True):
        live = _pick(bank, max_live)
        r = _run(blueprint, wiring, live, live.bodies, read(source, wiring.source, live.chunk))
        act = jnp.where(_is_finite(r), live.gains[:, 0], 0.0)
        y = _add(y, wiring.target, live.chunk, act, r)
    return y


def _backward(wiring: Wiring, max_live: int, banks: Banks, source: Array, dy: Array) -> Any:
    """Gradients of the bodies and of what they read, and the channels that need a gradient."""
    d_source = jnp.zeros_like(source) if wiring.is_span else dy
    channels = jnp.zeros_like(dy, shape=(wiring.target.chunks, 4), dtype=jnp.float32)
    d_bodies = [jax.tree.map(jnp.zeros_like, bank.bodies) for bank in banks]
    for index, bank in enumerate(banks if max_live else ()):
        live = _pick(bank, max_live)
        u, slope = read(source, wiring.source, live.chunk), read(dy, wiring.target, live.chunk)
        pulled = _pull(wiring, wiring.blueprints[index], live, u, slope)
        d_source = _add(d_source, wiring.source, live.chunk, pulled.feel, pulled.d_u)
        rows = jnp.where(live.chunk >= 0, live.chunk, wiring.target.chunks)
        channels = channels.at[rows].add(pulled.channels, mode="drop")
        d_bodies[index] = (
            pulled.bodies
            if live.order is None
            else jax.tree.map(
                lambda zero, new, order=live.order: zero.at[order].set(new),
                d_bodies[index],
                pulled.bodies,
            )
        )
    slopes = jnp.sum(split(_over_rows(dy, jnp.square), wiring.target), axis=-1, keepdims=True)
    return tuple(d_bodies), d_source, jnp.concatenate([slopes, channels], axis=-1)


def _over_rows(x: Float[Array, "... D"], measure: Callable[[Array], Array]) -> Float32[Array, "D"]:
    return jnp.sum(measure(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))


def _watch(wiring: Wiring, target: Array) -> Float32[Array, "C 5"]:
    """The channels that need no gradient."""
    chunking = wiring.target
    rows = target.size // chunking.features
    sizes = jnp.asarray(chunking.sizes, jnp.float32)
    square = _over_rows(target, jnp.square)
    dead = split((square == 0).astype(jnp.float32), chunking)
    return jnp.stack(
        [
            sizes * rows,
            jnp.sum(split(_over_rows(target, lambda x: x), chunking), axis=-1),
            jnp.sum(split(square, chunking), axis=-1),
            sizes,
            jnp.sum(dead, axis=-1),
        ],
        axis=-1,
    )


def _forward_and_watch(
    wiring: Wiring, max_live: int, banks: Banks, source: Array, target: Array
) -> tuple[Array, Float32[Array, "C 5"]]:
    # Measured inside the variant, where `target` is a buffer: outside, XLA fuses whatever made it
    # (a pooling, say) into each reduction and computes it several times.
    return _forward(wiring, max_live, banks, source, target), _watch(wiring, target)


def _pull_site(wiring: Wiring, kept: Any, dy: Array) -> Any:
    """Cotangents of the banks, of the source and of the tap."""
    banks, source, watched = kept
    d_bodies, d_source, channels = _at_level(_backward, wiring, banks, source, dy)
    d_banks = tuple(
        BankView(bodies=leaves, chunk=None, gains=jnp.zeros_like(bank.gains))  # type: ignore[arg-type]
        for leaves, bank in zip(d_bodies, banks, strict=True)
    )
    return d_banks, d_source, jnp.concatenate([watched, channels], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grow_in_place(
    wiring: Wiring, banks: Banks, x: Float[Array, "... D"], tap: Float32[Array, "C K"]
) -> Float[Array, "... D"]:
    """`y` for a site whose bodies read what they write to."""
    del tap
    y: Array = _at_level(_forward, wiring, banks, x, x)
    return y


def _in_place_fwd(wiring: Wiring, banks: Banks, x: Array, tap: Array) -> Any:
    del tap
    y, watched = _at_level(_forward_and_watch, wiring, banks, x, x)
    return y, (banks, x, watched)


grow_in_place.defvjp(_in_place_fwd, _pull_site)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grow_span(
    wiring: Wiring,
    banks: Banks,
    source: Float[Array, "... E"],
    target: Float[Array, "... D"],
    tap: Float32[Array, "C K"],
) -> Float[Array, "... D"]:
    """`y` for a site whose bodies read `source` and write to `target`."""
    del tap
    y: Array = _at_level(_forward, wiring, banks, source, target)
    return y


def _span_fwd(wiring: Wiring, banks: Banks, source: Array, target: Array, tap: Array) -> Any:
    del tap
    y, watched = _at_level(_forward_and_watch, wiring, banks, source, target)
    return y, (banks, source, watched)


def _span_bwd(wiring: Wiring, kept: Any, dy: Array) -> Any:
    d_banks, d_source, d_tap = _pull_site(wiring, kept, dy)
    return d_banks, d_source, dy, d_tap


grow_span.defvjp(_span_fwd, _span_bwd)
