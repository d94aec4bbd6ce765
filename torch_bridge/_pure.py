"""A site inside a transform of `torch.func`, or of forward-mode differentiation.

There its autograd function, which measures, cannot run. The same output and the same derivatives
come from operations that every transform knows; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from esper_kernels import Chunking
from torch_bridge._adapters import Leaves
from torch_bridge._chunks import column, take
from torch_bridge._layer import outputs
from torch_bridge._plan import BankPlan, SitePlan


def is_transformed() -> bool:
    """Whether a transform or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def grown(plan: SitePlan, axis: int, x: Tensor, adapters: Sequence[Leaves]) -> Tensor:
    """`x + act * r`, whose derivatives have the gains `learn` for adapters and `feel` for `x`."""
    last = x.movedim(axis, -1)
    y = last
    for bank, leaves in zip(plan.banks, adapters, strict=True):
        y = y + _laid(plan.cut, bank, _change(plan, bank, leaves, take(plan.cut, bank, last)), last)
    return y.movedim(-1, axis)


def _change(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor) -> Tensor:
    by_leaves = outputs(plan, bank, leaves, u.detach())
    by_input = outputs(plan, bank, {name: leaf.detach() for name, leaf in leaves.items()}, u)
    r = by_input.detach()
    is_sound = r.flatten(1).sum(1, dtype=torch.float32).isfinite()
    gains = plan.gains.index_select(0, bank.chunk)
    if bank.is_damped:
        damping = torch.where(gains[:, 2] == 0, gains[:, 3], 0.0)
        by_leaves = _Damped.apply(by_leaves, column(damping, r) * r.float())
    parts = (r, by_leaves - r, by_input - r)
    total = torch.zeros_like(u, dtype=torch.float32)
    for gain, part in zip(gains[:, :3].unbind(1), parts, strict=True):
        wide = column(gain, part)
        chosen = column(is_sound, part) & (wide != 0)
        total = total + torch.where(chosen, wide * part.float(), 0.0)
    return total.to(u.dtype)


class _Damped(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """The identity, whose backward pass adds what pulls an output back: `dy + damping * r`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor, pull: Tensor) -> Tensor:
        return r.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (pull,) = ctx.saved_tensors
        return (dy + pull).to(dy.dtype), None

    @staticmethod
    def jvp(ctx: Any, dr: Tensor, _: Any) -> Tensor:
        return dr.clone()


def _laid(cut: Chunking, bank: BankPlan, values: Tensor, like: Tensor) -> Tensor:
    """`[n, ..., F]` at the features of its chunks, zero elsewhere."""
    laid = values.movedim(0, -2)
    if bank.columns is not None:
        wide = torch.zeros_like(like[..., :1]).expand(*like.shape[:-1], cut.features + 1)
        return wide.index_add(-1, bank.columns, laid.flatten(-2))[..., :-1]
    if bank.is_all:
        return laid.flatten(-2)
    wide = torch.zeros_like(like).unflatten(-1, (cut.chunks, cut.widest))
    return wide.index_copy(-2, bank.chunk, laid).flatten(-2)
