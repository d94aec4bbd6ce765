"""The rule of four gains in torch, its only definition there; `rule_jax` is the same in JAX.

For the chunk `u` that an adapter reads and writes to, its output `r = run(adapter, u)`, the
incoming gradient `dy` and its `Gains`::

    y       = u + output_scale * r
    d theta = param_grad_scale * (d r / d theta)^T (dy + output_damping * r)
    d u     = dy + input_grad_scale * (d r / d u)^T dy
    utility = -<dy, r>

`output_damping` counts as 0 where `input_grad_scale` is not. A gain of 0 selects the other operand
and does not multiply: `y` is `u`, and `d u` is `dy`, bit for bit.

**Numbers that are not finite.** What reaches the host is decided entry by entry: where an entry of
`r` is not finite, that entry of `y` is `u`; where one of `(d r / d u)^T dy` is not finite, that
entry of `d u` is `dy`. What is learned is decided for the whole adapter: if any entry of `r`,
`d theta` or `(d r / d u)^T dy` is not finite, `d theta` is 0, and if its input and `dy` were finite
the call counts as an error of the adapter. If `r` is not finite anywhere, `output_square` and
`utility` are 0. A sum of squares beyond the accumulator (float32) counts as not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels._records import BackwardStatistics, Gains

Leaves = dict[str, Tensor]
"""The parameters of n adapters; each has a leading axis n."""
Pull = Callable[[Tensor], tuple[Leaves, Tensor]]
"""`pull(dr) -> (d theta, d u)`."""
Vjp = Callable[[Leaves, Tensor], tuple[Tensor, Pull]]
"""`vjp(adapters, u) -> (r, pull)`; `functools.partial(torch.func.vjp, run)` is one."""


class Pullback(NamedTuple):
    """The backward pass of n adapters."""

    d_adapters: Leaves
    """Gradients of the parameters, scaled by `param_grad_scale`; 0 where an adapter breaks."""
    d_u: Tensor
    """`[n, ..., F]`: `(d r / d u)^T dy`, to be scaled by `input_grad_scale` where it is added."""
    statistics: BackwardStatistics
    """Float32 arrays `[n]`, as if every adapter were live."""
    is_flowing: Tensor
    """bool[n]: whether output and gradients are finite."""


def per_adapter(values: Tensor, like: Tensor) -> Tensor:
    """`[n]` shaped to broadcast against `like`, `[n, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def blend(base: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """`base + scale * values`, or `base` itself where the scale is 0 or a value is not finite.

    Args:
      base: `[n, ...]`; `u` for the forward pass, `dy` for the backward pass.
      scale: `[n]`, one of the gains.
      values: of the shape of `base`.

    Returns:
      A tensor like `base`. The sum is computed in float32 at least.

    >>> base, scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 0.0])
    >>> blend(base, scale, torch.tensor([[1.0, torch.inf], [1.0, 1.0]])).tolist()
    [[3.0, 2.0], [3.0, 4.0]]
    """
    wide = _wide(base.dtype)
    scale = per_adapter(scale, values).to(wide)
    total = base.to(wide) + scale * values.to(wide)
    return torch.where((scale != 0) & values.isfinite(), total.to(base.dtype), base)


def pullback(
    vjp: Vjp,
    gains: Gains,
    adapters: Leaves,
    u: Tensor,
    dy: Tensor,
    *,
    input_square: Tensor,
    gradient_square: Tensor,
    is_damped: bool = True,
) -> Pullback:
    """Gradients of n adapters and of what they read, and what the step measured of them.

    Args:
      vjp: what the adapters compute, with its derivative.
      gains: tensors `[n]`.
      adapters: their parameters, `[n, ...]`.
      u: `[n, ..., F]`, what each adapter reads and writes to.
      dy: `[n, ..., F]`, the gradient of what it writes to.
      input_square: `[n]`, the sum of squares of each `u`.
      gradient_square: `[n]`, that of each `dy`.
      is_damped: whether any adapter may be damped; False spares the work.

    Returns:
      See `Pullback`.

    >>> one, zero, run = torch.ones(1), torch.zeros(1), lambda p, u: p["scale"] * u
    >>> u = torch.ones(1, 2)
    >>> pulled = pullback(lambda *inputs: torch.func.vjp(run, *inputs), Gains(one, one, one, zero),
    ...                   {"scale": torch.full((1, 1), 3.0)}, u, u, input_square=2 * one,
    ...                   gradient_square=2 * one)
    >>> pulled.d_adapters["scale"].tolist(), pulled.statistics.utility.tolist()
    ([[2.0]], [-6.0])
    """
    r, pull = vjp(adapters, u)
    damping = torch.where(gains.input_grad_scale == 0, gains.output_damping, 0.0)
    d_adapters, d_u = pull(blend(dy, damping, r) if is_damped else dy)

    wide = _wide(u.dtype)
    output_square = r.to(wide).square().flatten(1).sum(1)
    utility = -(dy.to(wide) * r.to(wide)).flatten(1).sum(1)
    is_sound = output_square.isfinite()
    is_flowing = is_sound & _is_finite(d_u)
    for leaf in d_adapters.values():
        is_flowing = is_flowing & _is_finite(leaf)
    was_fed = input_square.isfinite() & gradient_square.isfinite()
    return Pullback(
        d_adapters=_scaled(d_adapters, gains.param_grad_scale, is_flowing),
        d_u=d_u,
        statistics=BackwardStatistics(
            gradient_square=gradient_square,
            num_live=torch.ones_like(output_square),
            output_square=torch.where(is_sound, output_square, 0.0),
            utility=torch.where(is_sound, utility, 0.0),
            num_errors=(was_fed & ~is_flowing).to(wide),
        ),
        is_flowing=is_flowing,
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)


def _scaled(leaves: Mapping[str, Tensor], scale: Tensor, is_flowing: Tensor) -> Leaves:
    is_learning = is_flowing & (scale != 0)

    def scaled(leaf: Tensor) -> Tensor:
        wide = _wide(leaf.dtype)
        product = (leaf.to(wide) * per_adapter(scale, leaf).to(wide)).to(leaf.dtype)
        return torch.where(per_adapter(is_learning, leaf), product, 0.0)

    return {name: scaled(leaf) for name, leaf in leaves.items()}
