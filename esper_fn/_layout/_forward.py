"""The forward of four gains with its exact derivative, and the measurements it makes on the way.

For the chunk `x` a seed writes to, the chunk `u` it reads (`u = x` but over a span), the adapter's
output `r = adapter(u)` and the incoming gradient `dy`::

    y       = x + output_scale * r
    d theta = param_grad_scale * (d r / d theta)^T (dy + output_damping * r)
    d x     = dy                    (+ input_grad_scale * (d r / d u)^T dy where u = x)
    d u     = input_grad_scale * (d r / d u)^T dy
    utility = -<dy, r>

`output_damping` belongs to adapters that learn without acting: the loss does not answer to them, so
`<dy, r>` alone is linear in `r` and has no minimum.

A gain of exactly 0 selects the other operand instead of multiplying, so `y` is `x` and `d x` is
`dy` bit for bit, NaN and -0.0 included, and an adapter that is not finite reaches nothing.

So that time and memory follow the adapters alive, each site runs a loop over them, a few at a time,
that changes the activation in place. The host's own operations stand outside the loop, compiled
once, and a gain of 0 selects element by element: the host's bits cannot depend on its dormant or
learning seeds.

**How the measurements leave a pure loss function.** Every call takes a *tap*, a zero array with one
row a chunk, on which its output does not depend. The derivative rule returns the measurements as
the tap's cotangent. Cotangents add up over every use of an input, and all channels are sums, so
statistics are right under `jax.checkpoint`, `scan`, `vmap` and `shard_map`, and a site that the
loss does not reach reads zero rows: not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._control import cond
from esper_fn._layout import _kernels
from esper_fn._layout._adapters import add, bits, is_finite, outputs, pull
from esper_fn._layout._chunks import read, split
from esper_fn._layout._rounds import Banks, BankView, Live, Wiring, if_any_live, is_live, rounds
from esper_fn._typing import Array, Float, Float32, Params
from esper_fn.base import Blueprint
from esper_kernels import (
    NUM_BACKWARD_STATISTICS,
    NUM_FORWARD_STATISTICS,
    ForwardStatistics,
    Gains,
)


def _forward(
    wiring: Wiring, banks: Banks, source: Array, target: Array
) -> tuple[Array, Float32[Array, "C 5"] | None]:
    """`y`, and the channels that need no gradient where a kernel measured them on its way."""
    served, rest = _kernels.divide(wiring, banks, target)
    y, watched = _kernels.forward(wiring, banks, served, target)

    def run(y: Array) -> Array:
        for index in rest:

            def act(live: Live, y: Array, blueprint: Blueprint = wiring.blueprints[index]) -> Array:
                u = read(source, wiring.source, live.chunk)
                r = outputs(blueprint, wiring, live, live.adapters, u)
                scale = Gains.from_columns(live.gains).output_scale
                gain = jnp.where(is_finite(r), scale, 0.0)
                return add(y, wiring.target, live.chunk, gain, r)

            y = rounds(wiring, banks[index], act, y)
        return y

    return if_any_live(wiring, [banks[index] for index in rest], run, bits(y)).view(
        y.dtype
    ), watched


class _Pulling(NamedTuple):
    """What the backward pass fills in, bank by bank."""

    d_source: Array
    channels: Float32[Array, "C 5"]
    d_adapters: tuple[Params, ...]
    """Of each bank."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(wiring: Wiring, banks: Banks, source: Array, watched: Array, dy: Array) -> _Pulling:
    """Gradients of the adapters and of what they read, and the channels that need a gradient."""
    served, rest = _kernels.divide(wiring, banks, dy)
    begun = _Pulling(
        d_source=jnp.zeros_like(source) if wiring.is_span else dy,
        channels=jnp.zeros_like(
            dy, shape=(wiring.target.chunks, NUM_BACKWARD_STATISTICS), dtype=jnp.float32
        ),
        d_adapters=tuple(jax.tree.map(jnp.zeros_like, bank.adapters) for bank in banks),
    )
    if not dy.size:
        return begun
    if served:
        begun = _Pulling(*_kernels.backward(wiring, banks, served, source, watched, dy))

    def pull_rest(so_far: _Pulling) -> _Pulling:
        for index in rest:
            step = partial(_pull_into, wiring, index, source, dy)
            so_far = rounds(wiring, banks[index], step, so_far)
        return so_far

    begun = begun._replace(d_source=bits(begun.d_source))
    pulled = if_any_live(wiring, [banks[index] for index in rest], pull_rest, begun)
    pulled = pulled._replace(d_source=pulled.d_source.view(source.dtype))
    if served:
        # The kernel measured all of `dy`, the loops once more what they serve.
        slopes = begun.channels[:, 0]
        return pulled._replace(channels=pulled.channels.at[:, 0].set(slopes))
    # Where no adapter lives `d_source` still is `dy`, and measuring it here, after the loop, leaves
    # XLA free to work in the buffer of `dy` and to go on with the host meanwhile.
    still = dy if wiring.is_span else pulled.d_source
    slopes = jnp.sum(split(_over_rows(still, jnp.square), wiring.target), axis=-1)
    slopes = jnp.where(pulled.channels[:, 1] > 0, pulled.channels[:, 0], slopes)
    return pulled._replace(channels=pulled.channels.at[:, 0].set(slopes))


@_backward.defjvp
def _backward_tangent(wiring: Wiring, primals: Any, tangents: Any) -> Any:
    """What is measured counts as constant."""
    pulled = _backward(wiring, *primals)
    banks, source, _, dy = primals
    d_banks, d_source, _, d_dy = tangents
    _, (moved, d_adapters) = jax.jvp(
        partial(_pull_slots, wiring), (banks, source, dy), (d_banks, d_source, d_dy)
    )
    still = jnp.zeros_like(pulled.channels)
    return pulled, _Pulling(d_source=moved, channels=still, d_adapters=d_adapters)


def _pull_slots(
    wiring: Wiring, banks: Banks, source: Array, dy: Array
) -> tuple[Array, tuple[Params, ...]]:
    """The gradients of `_backward` by a loop over all slots, which has a reverse derivative.

    An adapter that is not alive, or breaks, is left out by a conditional: selecting afterwards
    would leave `0 * inf` in its derivative.
    """
    d_source = jnp.zeros_like(source) if wiring.is_span else dy
    all_adapters = []
    for blueprint, bank in zip(wiring.blueprints, banks, strict=True):

        def step(
            d_source: Array, at: BankView, blueprint: Blueprint = blueprint
        ) -> tuple[Array, Params]:
            slot = jnp.zeros((1,), jnp.int32)
            live = Live(slot, *jax.tree.map(lambda leaf: leaf[None], at))
            u = read(source, wiring.source, live.chunk)
            given = (live.adapters, u, read(dy, wiring.target, live.chunk))
            adapters, u, slope = jax.lax.stop_gradient(given)
            checked = pull(wiring, blueprint, live._replace(adapters=adapters), u, slope)
            moves = checked.is_flowing[0] & (at.chunk >= 0)
            # Safe numbers where it does not: under `vmap` the conditional computes both sides.
            given = jax.tree.map(lambda leaf: jnp.where(moves, leaf, 0), given)

            def move(d_source: Array, given: Any) -> tuple[Array, Params]:
                adapters, u, slope = given
                pulled = pull(wiring, blueprint, live._replace(adapters=adapters), u, slope)
                moved = add(
                    d_source, wiring.source, live.chunk, pulled.input_grad_scale, pulled.d_u
                )
                return moved, pulled.adapters

            def rest(d_source: Array, given: Any) -> tuple[Array, Params]:
                return d_source, jax.tree.map(jnp.zeros_like, given[0])

            d_source, d_adapters = cond(moves, move, rest, d_source, given)
            return d_source, jax.tree.map(lambda leaf: leaf[0], d_adapters)

        at_work = bank._replace(chunk=jnp.where(is_live(bank), bank.chunk, -1))
        d_source, d_adapters = jax.lax.scan(step, d_source, at_work)
        all_adapters.append(d_adapters)
    return d_source, tuple(all_adapters)


def _pull_into(
    wiring: Wiring, index: int, source: Array, dy: Array, live: Live, so_far: _Pulling
) -> _Pulling:
    """One round of bank `index`."""
    u = read(source, wiring.source, live.chunk)
    # No other seed has written to the chunk, and so no copy of `dy` need be kept.
    slope = read(dy if wiring.is_span else so_far.d_source, wiring.target, live.chunk)
    pulled = pull(wiring, wiring.blueprints[index], live, u, slope.view(dy.dtype))
    rows = jnp.where(live.chunk >= 0, live.chunk, wiring.target.chunks)
    filled = jax.tree.map(
        lambda old, new: old.at[live.slot].set(new, mode="drop"),
        so_far.d_adapters[index],
        pulled.adapters,
    )
    return _Pulling(
        d_source=add(
            so_far.d_source, wiring.source, live.chunk, pulled.input_grad_scale, pulled.d_u
        ),
        channels=so_far.channels.at[rows].add(pulled.channels, mode="drop"),
        d_adapters=(*so_far.d_adapters[:index], filled, *so_far.d_adapters[index + 1 :]),
    )


def _zeros(like: Array, *shape: int) -> Array:
    return jnp.zeros_like(like, shape=shape, dtype=jnp.float32)


def _over_rows(x: Float[Array, "... D"], measure: Callable[[Array], Array]) -> Float32[Array, "D"]:
    return jnp.sum(measure(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))


def _apart(banks: Banks, measure: Callable[[Array], Array], x: Array) -> Array:
    """`measure(x)`, in a computation of its own.

    A conditional that always holds, which XLA cannot know. Without it XLA would fuse whatever made
    `x` (a pooling, say) into each reduction and compute it several times.
    """
    always = jnp.all(banks[0].chunk >= jnp.iinfo(jnp.int32).min + 1)
    like = jax.eval_shape(measure, x)
    return cond(always, measure, lambda x: jnp.zeros_like(x, shape=like.shape, dtype=like.dtype), x)


def _watch(wiring: Wiring, target: Array) -> Float32[Array, "C 5"]:
    """The channels that need no gradient; none in an empty call."""
    chunking = wiring.target
    rows = target.size // chunking.features
    if not rows:
        return jnp.zeros_like(
            target, shape=(chunking.chunks, NUM_FORWARD_STATISTICS), dtype=jnp.float32
        )
    sizes = jnp.asarray(chunking.sizes, jnp.float32)
    square = _over_rows(target, jnp.square)
    dead = split((square == 0).astype(jnp.float32), chunking)
    statistics = ForwardStatistics(
        num_values=sizes * rows,
        total=jnp.sum(split(_over_rows(target, lambda x: x), chunking), axis=-1),
        square=jnp.sum(split(square, chunking), axis=-1),
        num_features=sizes,
        num_dead=jnp.sum(dead, axis=-1),
    )
    return jnp.stack(statistics, axis=-1)


def _grow(
    wiring: Wiring, banks: Banks, source: Array, target: Array
) -> tuple[Array, Float32[Array, "C 5"]]:
    """`y` and the channels that need no gradient."""
    y, watched = _forward(wiring, banks, source, target)
    if watched is None:
        watched = _apart(banks, partial(_watch, wiring), target)
    return y, watched


def _pull_site(wiring: Wiring, kept: Any, dy: Array) -> Any:
    """Cotangents of the banks, of the source and of the tap."""
    banks, source, watched = kept
    pulled = _backward(wiring, banks, source, watched, dy)
    d_banks = tuple(
        BankView(adapters=leaves, chunk=None, gains=jnp.zeros_like(bank.gains))  # type: ignore[arg-type]
        for leaves, bank in zip(pulled.d_adapters, banks, strict=True)
    )
    return d_banks, pulled.d_source, jnp.concatenate([watched, pulled.channels], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_place(wiring: Wiring, banks: Banks, x: Array, tap: Array) -> tuple[Array, Array]:
    del tap
    return _grow(wiring, banks, x, x)


def _in_place_fwd(wiring: Wiring, banks: Banks, x: Array, tap: Array) -> Any:
    # Itself, so that an outer derivative goes by the same rule.
    y, watched = _in_place(wiring, banks, x, tap)
    return (y, watched), (banks, x, watched)


def _in_place_bwd(wiring: Wiring, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    return _pull_site(wiring, kept, cotangents[0])


_in_place.defvjp(_in_place_fwd, _in_place_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _span(
    wiring: Wiring, banks: Banks, source: Array, target: Array, tap: Array
) -> tuple[Array, Array]:
    del tap
    return _grow(wiring, banks, source, target)


def _span_fwd(wiring: Wiring, banks: Banks, source: Array, target: Array, tap: Array) -> Any:
    y, watched = _span(wiring, banks, source, target, tap)
    return (y, watched), (banks, source, watched)


def _span_bwd(wiring: Wiring, kept: Any, cotangents: tuple[Array, Array]) -> Any:
    d_banks, d_source, d_tap = _pull_site(wiring, kept, cotangents[0])
    return d_banks, d_source, cotangents[0], d_tap


_span.defvjp(_span_fwd, _span_bwd)


def grow_in_place(
    wiring: Wiring, banks: Banks, x: Float[Array, "... D"], tap: Float32[Array, "C K"]
) -> Float[Array, "... D"]:
    """`y` for a site whose adapters read what they write to."""
    return _in_place(wiring, banks, x, tap)[0]


def grow_span(
    wiring: Wiring,
    banks: Banks,
    source: Float[Array, "... E"],
    target: Float[Array, "... D"],
    tap: Float32[Array, "C K"],
) -> Float[Array, "... D"]:
    """`y` for a site whose adapters read `source` and write to `target`."""
    return _span(wiring, banks, source, target, tap)[0]
