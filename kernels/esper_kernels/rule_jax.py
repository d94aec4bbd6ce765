"""The rule of four gains in JAX, its only definition there.

For the chunk `x` an adapter writes to, the chunk `u` it reads (`u = x` but over a span), its output
`r = run(adapter, u)`, the incoming gradient `dy` and its `Gains`::

    y       = x + output_scale * r
    d theta = param_grad_scale * (d r / d theta)^T (dy + output_damping * r)
    d u     = input_grad_scale * (d r / d u)^T dy             (added to `dy` where u = x)
    utility = -<dy, r>

`output_damping` is for adapters that learn without acting: the loss does not answer to them, so
`<dy, r>` alone is linear in `r` and has no minimum. It counts as 0 where `input_grad_scale` is not.
A gain of 0 selects the other operand and does not multiply: `y` is `x`, and `d x` is `dy`, bit for
bit, NaN and -0.0 included.

**Numbers that are not finite.** What reaches the host is decided entry by entry: where an entry of
`r` is not finite, that entry of `y` is `x`; where one of `(d r / d u)^T dy` is not finite, that
entry of `d x` is `dy`. So an adapter whose parameters are NaN reaches nothing. What is learned is
decided for the whole adapter: if any entry of `r`, `d theta` or `(d r / d u)^T dy` is not finite,
`d theta` is 0, and if its input and `dy` were finite the call counts as an error of the adapter.
If `r` is not finite anywhere, `output_square` and `utility` are 0. A sum of squares beyond the
accumulator (float32) counts as not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_kernels._records import BackwardStatistics, Gains

Array = jax.Array
Run = Callable[[Any, Array], Array]
"""`run(adapters, u) -> r` for n adapters at once; every array has a leading axis n."""


class Pullback(NamedTuple):
    """The backward pass of n adapters."""

    d_adapters: Any
    """Gradients of the parameters, scaled by `param_grad_scale`; 0 where an adapter breaks."""
    d_u: Array
    """`[n, ..., F]`: `(d r / d u)^T dy`, to be scaled by `input_grad_scale` where it is added."""
    statistics: BackwardStatistics
    """Float32 arrays `[n]`, as if every adapter were live."""
    is_flowing: Array
    """bool[n]: whether output and gradients are finite."""


def accumulator(dtype: Any) -> Any:
    """The dtype of sums over numbers of `dtype`: float32, and float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def per_adapter(values: Array, like: Array) -> Array:
    """`[n]` shaped to broadcast against `like`, `[n, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def bits(x: Array) -> Array:
    """`x`, or 16-bit numbers as integers.

    XLA on CPU may select 16-bit floats as float32 and flush subnormal ones to zero on the way; so
    would a loop whose carry a `vmap` selects.
    """
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


@jax.custom_jvp
def select(is_first: Array, first: Array, second: Array) -> Array:
    """`where(is_first, first, second)` on the bits."""
    selected: Array = jnp.where(is_first, bits(first), bits(second))
    return selected.view(first.dtype)


@select.defjvp
def _select_tangent(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    return select(*primals), jnp.where(primals[0], *tangents[1:])


def blend(base: Array, scale: Array, values: Array, is_own: Array | bool = True) -> Array:
    """`base + scale * values`, or `base` itself where the scale is 0 or a value is not finite.

    Args:
      base: any shape; `x` for the forward pass, `dy` for the backward pass.
      scale: one of the gains, shaped to broadcast against `base`.
      values: of the shape and dtype of `base`.
      is_own: entries that may change, shaped to broadcast against `base`.

    Returns:
      An array like `base`. The sum is computed in float32 at least.

    >>> blend(jnp.float32([1, 2, 3]), jnp.float32([2, 0, 2]), jnp.float32([1, 1, jnp.inf])).tolist()
    [3.0, 2.0, 3.0]
    """
    wide = accumulator(base.dtype)
    total = base.astype(wide) + scale.astype(wide) * values.astype(wide)
    is_changed = is_own & (scale != 0) & jnp.isfinite(values)
    return select(is_changed, total.astype(base.dtype), base)


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def _is_finite(values: Array) -> Array:
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))


def pullback(run: Run, gains: Gains, adapters: Any, u: Array, dy: Array) -> Pullback:
    """Gradients of n adapters and of what they read, and what the step measured of them.

    Args:
      run: what the adapters compute.
      gains: arrays `[n]`.
      adapters: a pytree with leaves `[n, ...]`.
      u: `[n, ..., F]`, what each adapter reads.
      dy: `[n, ..., G]`, the gradient of what each adapter writes to.

    Returns:
      See `Pullback`.

    >>> run = lambda scale, u: scale[:, None, None] * u
    >>> one, zero = jnp.ones(1), jnp.zeros(1)
    >>> pulled = pullback(run, Gains(one, one, one, zero), 3 * one, jnp.ones((1, 2, 4)),
    ...                   jnp.ones((1, 2, 4)))
    >>> pulled.d_adapters.tolist(), pulled.statistics.utility.tolist()
    ([8.0], [-24.0])
    """
    r, pull = jax.vjp(run, adapters, u)
    damping = jnp.where(gains.input_grad_scale == 0, gains.output_damping, 0.0)
    d_adapters, d_u = pull(blend(dy, per_adapter(damping, r), r))

    wide = accumulator(u.dtype)
    output, slope = r.astype(wide), dy.astype(wide)
    gradient_square, output_square = _sum(jnp.square(slope)), _sum(jnp.square(output))
    is_sound = jnp.isfinite(output_square)
    is_flowing = is_sound & _is_finite(d_u)
    for leaf in jax.tree.leaves(d_adapters):
        is_flowing &= _is_finite(leaf)
    was_fed = jnp.isfinite(_sum(jnp.square(u.astype(wide)))) & jnp.isfinite(gradient_square)
    scale = gains.param_grad_scale

    def scaled(leaf: Array) -> Array:
        wide = accumulator(leaf.dtype)
        product = (leaf.astype(wide) * per_adapter(scale, leaf).astype(wide)).astype(leaf.dtype)
        return jnp.where(per_adapter(is_flowing & (scale != 0), leaf), product, 0)

    return Pullback(
        d_adapters=jax.tree.map(scaled, d_adapters),
        d_u=d_u,
        statistics=BackwardStatistics(
            gradient_square=gradient_square,
            num_live=jnp.ones_like(gradient_square),
            output_square=jnp.where(is_sound, output_square, 0.0),
            utility=jnp.where(is_sound, _sum(-slope * output), 0.0),
            num_errors=(was_fed & ~is_flowing).astype(wide),
        ),
        is_flowing=is_flowing,
    )
