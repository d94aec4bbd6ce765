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

from esper_kernels import Gains
from esper_kernels.rule_torch import Leaves, per_adapter
from torch_bridge._plan import BankPlan, SitePlan
from torch_bridge.backends._layout import gather, scatter
from torch_bridge.backends._reference import run


def is_transformed() -> bool:
    """Whether a transform or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def grow(plan: SitePlan, axis: int, x: Tensor, adapters: Sequence[Leaves]) -> Tensor:
    """The grown activation; its derivatives have the gains of adapters and of what they read."""
    last = x.movedim(axis, -1)
    y = last
    for bank, leaves in zip(plan.banks, adapters, strict=True):
        change = _change(plan, bank, leaves, gather(plan.chunking, bank, last))
        y = y + scatter(plan.chunking, bank, change, last)
    return y.movedim(-1, axis)


def _change(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor) -> Tensor:
    by_leaves = run(plan, bank, leaves, u.detach())
    by_input = run(plan, bank, {name: leaf.detach() for name, leaf in leaves.items()}, u)
    r = by_input.detach()
    gains = Gains.from_columns(plan.gains.index_select(0, bank.chunk))
    if bank.is_damped:
        damping = torch.where(gains.input_grad_scale == 0, gains.output_damping, 0.0)
        by_leaves = _Damped.apply(by_leaves, per_adapter(damping, r) * r.float())
    parts = (r, by_leaves - r, by_input - r)
    total = torch.zeros_like(u, dtype=torch.float32)
    for gain, part in zip(gains[:3], parts, strict=True):
        scale = per_adapter(gain, part)
        total = total + torch.where((scale != 0) & r.isfinite(), scale * part.float(), 0.0)
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
