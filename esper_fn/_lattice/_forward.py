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

So that time and memory follow the bodies alive, each site runs a loop over them, a few at a time,
that changes the activation in place. The host's own operations stand outside the loop, compiled
once, and a gain of 0 selects element by element: the host's bits cannot depend on its dormant or
learning seeds.

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

from esper_fn._control import once_if
from esper_fn._lattice._chunks import lay_out, per_feature, place, read, split, window
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
    at_once: int | None
    """Bodies a round computes; None for every slot in one go, dead or alive."""


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


# --- rounds over the live bodies ---------------------------------------------------------------


class _Live(NamedTuple):
    """The slots of one bank that one round computes."""

    slot: Int32[Array, "n"]
    """Which ones; beyond the bank where there is nothing to do."""
    bodies: Params
    chunk: Int32[Array, "n"]
    """Negative for a slot with nothing to do."""
    gains: Float32[Array, "n 3"]


def _rounds(wiring: Wiring, bank: BankView, run: Callable[[_Live, Any], Any], carry: Any) -> Any:
    """`carry` after `run(live, carry)` for a few live bodies at a time, in slot order."""
    num_slots, at_once = bank.chunk.shape[0], wiring.at_once
    is_live = _is_live(bank)
    chunk = jnp.where(is_live, bank.chunk, -1)
    if at_once is None:
        every = jnp.arange(num_slots, dtype=jnp.int32)
        return run(_Live(slot=every, bodies=bank.bodies, chunk=chunk, gains=bank.gains), carry)
    num_live = jnp.sum(is_live, dtype=jnp.int32)
    order = jnp.argsort(~is_live, stable=True).astype(jnp.int32)
    order = jnp.concatenate([order, jnp.full((at_once - 1,), num_slots, jnp.int32)])

    def once(state: Any) -> Any:
        done, carry = state
        slot = jax.lax.dynamic_slice_in_dim(order, done, at_once)
        safe = jnp.minimum(slot, num_slots - 1)
        bodies, gains = jax.tree.map(lambda leaf: _take(leaf, safe), (bank.bodies, bank.gains))
        here = jnp.where(slot < num_slots, chunk[safe], -1)
        return done + at_once, run(_Live(slot=slot, bodies=bodies, chunk=here, gains=gains), carry)

    _, carry = jax.lax.while_loop(lambda state: state[0] < num_live, once, (jnp.int32(0), carry))
    return carry


def _if_any_live(wiring: Wiring, banks: Banks, run: Callable[[Any], Any], carry: Any) -> Any:
    """`run(carry)` where a body lives, else `carry`."""
    if wiring.at_once is None:
        return run(carry)
    is_any = jnp.any(jnp.concatenate([_is_live(bank) for bank in banks]))
    return once_if(is_any, run, carry)


def _take(leaf: Array, rows: Int32[Array, "n"]) -> Array:
    return leaf.at[rows].get(mode="promise_in_bounds")


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


def _choose(is_first: Bool[Array, "..."], first: Array, second: Array) -> Array:
    """`where(is_first, first, second)` on the bits.

    XLA on CPU may select numbers of 16 bits as float32 and flush subnormal ones to zero on the way.
    """
    if first.dtype.itemsize != 2:
        return jnp.where(is_first, first, second)
    chosen: Array = jnp.where(is_first, first.view(jnp.uint16), second.view(jnp.uint16))
    return chosen.view(first.dtype)


def _add(
    base: Float[Array, "... D"], chunking: Chunking, chunk: Array, gain: Array, values: Array
) -> Float[Array, "... D"]:
    """`base + gain * values` in the slots' chunks, `base` itself where the gain is 0."""
    if chunk.shape[0] == 1:
        gain = jnp.where(chunk[0] >= 0, gain[0], 0.0)
        start, is_real, values = window(chunking, chunk[0], values[0])
        old = jax.lax.dynamic_slice_in_dim(base, start, chunking.widest, axis=-1)
        wide = old.astype(jnp.float32) + gain * values.astype(jnp.float32)
        new = _choose(is_real & (gain != 0), wide.astype(base.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(base, new, start, axis=-1)
    placed = place(chunking, chunk)
    factor = per_feature(gain, chunking, placed, base.ndim)
    wide = base.astype(jnp.float32) + factor * lay_out(values, chunking, placed).astype(jnp.float32)
    return _choose(factor != 0, wide.astype(base.dtype), base)


class _Pulled(NamedTuple):
    """One bank's share of the backward pass."""

    bodies: Params
    feel: Float32[Array, "n"]
    """How much of `d_u` the host feels."""
    d_u: Float[Array, "n ... F"]
    channels: Float32[Array, "n 5"]


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
            _per_slot(jnp.square(dy.astype(jnp.float32)), jnp.sum),
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


def _forward(wiring: Wiring, banks: Banks, source: Array, target: Array) -> Array:
    def run(y: Array) -> Array:
        for blueprint, bank in zip(wiring.blueprints, banks, strict=True):

            def act(live: _Live, y: Array, blueprint: Blueprint = blueprint) -> Array:
                u = read(source, wiring.source, live.chunk)
                r = _run(blueprint, wiring, live, live.bodies, u)
                gain = jnp.where(_is_finite(r), live.gains[:, 0], 0.0)
                return _add(y, wiring.target, live.chunk, gain, r)

            y = _rounds(wiring, bank, act, y)
        return y

    return _if_any_live(wiring, banks, run, target)


class _Pulling(NamedTuple):
    """What the rounds of the backward pass fill in."""

    d_source: Array
    channels: Float32[Array, "C 5"]
    d_bodies: tuple[Params, ...]
    """Of each bank."""


def _backward(wiring: Wiring, banks: Banks, source: Array, dy: Array) -> _Pulling:
    """Gradients of the bodies and of what they read, and the channels that need a gradient."""

    def pull(so_far: _Pulling) -> _Pulling:
        slope = dy if wiring.is_span else so_far.d_source
        for index in range(len(banks)):
            so_far = _rounds(
                wiring, banks[index], partial(_pull_into, wiring, index, source, slope), so_far
            )
        return so_far

    pulled = _if_any_live(
        wiring,
        banks,
        pull,
        _Pulling(
            d_source=jnp.zeros_like(source) if wiring.is_span else dy,
            channels=jnp.zeros_like(dy, shape=(wiring.target.chunks, 5), dtype=jnp.float32),
            d_bodies=tuple(jax.tree.map(jnp.zeros_like, bank.bodies) for bank in banks),
        ),
    )
    # Where no body lives `d_source` still is `dy`, and measuring it here, after the loop, leaves
    # XLA free to work in the buffer of `dy` and to go on with the host meanwhile.
    still = dy if wiring.is_span else pulled.d_source
    slopes = jnp.sum(split(_over_rows(still, jnp.square), wiring.target), axis=-1)
    slopes = jnp.where(pulled.channels[:, 1] > 0, pulled.channels[:, 0], slopes)
    return pulled._replace(channels=pulled.channels.at[:, 0].set(slopes))


def _pull_into(
    wiring: Wiring, index: int, source: Array, dy: Array, live: _Live, so_far: _Pulling
) -> _Pulling:
    """One round of bank `index`."""
    u, slope = read(source, wiring.source, live.chunk), read(dy, wiring.target, live.chunk)
    pulled = _pull(wiring, wiring.blueprints[index], live, u, slope)
    rows = jnp.where(live.chunk >= 0, live.chunk, wiring.target.chunks)
    filled = jax.tree.map(
        lambda old, new: old.at[live.slot].set(new, mode="drop"),
        so_far.d_bodies[index],
        pulled.bodies,
    )
    return _Pulling(
        d_source=_add(so_far.d_source, wiring.source, live.chunk, pulled.feel, pulled.d_u),
        channels=so_far.channels.at[rows].add(pulled.channels, mode="drop"),
        d_bodies=(*so_far.d_bodies[:index], filled, *so_far.d_bodies[index + 1 :]),
    )


def _over_rows(x: Float[Array, "... D"], measure: Callable[[Array], Array]) -> Float32[Array, "D"]:
    return jnp.sum(measure(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))


def _apart(banks: Banks, measure: Callable[[Array], Array], x: Array) -> Array:
    """`measure(x)`, in a computation of its own.

    A conditional that always holds, which XLA cannot know. Without it XLA would fuse whatever made
    `x` (a pooling, say) into each reduction and compute it several times.
    """
    always = jnp.all(banks[0].chunk >= jnp.iinfo(jnp.int32).min + 1)
    like = jax.eval_shape(measure, x)
    return jax.lax.cond(
        always, measure, lambda x: jnp.zeros_like(x, shape=like.shape, dtype=like.dtype), x
    )


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


def _pull_site(wiring: Wiring, kept: Any, dy: Array) -> Any:
    """Cotangents of the banks, of the source and of the tap."""
    banks, source, watched = kept
    pulled = _backward(wiring, banks, source, dy)
    d_banks = tuple(
        BankView(bodies=leaves, chunk=None, gains=jnp.zeros_like(bank.gains))  # type: ignore[arg-type]
        for leaves, bank in zip(pulled.d_bodies, banks, strict=True)
    )
    return d_banks, pulled.d_source, jnp.concatenate([watched, pulled.channels], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grow_in_place(
    wiring: Wiring, banks: Banks, x: Float[Array, "... D"], tap: Float32[Array, "C K"]
) -> Float[Array, "... D"]:
    """`y` for a site whose bodies read what they write to."""
    del tap
    return _forward(wiring, banks, x, x)


def _in_place_fwd(wiring: Wiring, banks: Banks, x: Array, tap: Array) -> Any:
    del tap
    watched = _apart(banks, partial(_watch, wiring), x)
    return _forward(wiring, banks, x, x), (banks, x, watched)


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
    return _forward(wiring, banks, source, target)


def _span_fwd(wiring: Wiring, banks: Banks, source: Array, target: Array, tap: Array) -> Any:
    del tap
    watched = _apart(banks, partial(_watch, wiring), target)
    return _forward(wiring, banks, source, target), (banks, source, watched)


def _span_bwd(wiring: Wiring, kept: Any, dy: Array) -> Any:
    d_banks, d_source, d_tap = _pull_site(wiring, kept, dy)
    return d_banks, d_source, dy, d_tap


grow_span.defvjp(_span_fwd, _span_bwd)
