"""`graft` in plain torch: the rule of `esper_kernels.rule_torch`, one adapter a chunk."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from esper_kernels import rule_torch
from esper_kernels._records import Adapter, BackwardStatistics, Gains
from esper_kernels.graft._case import Case
from esper_kernels.rule_torch import Leaves


def refuses(case: Case) -> str | None:
    """The reference serves every case."""
    del case
    return None


def split(case: Case, x: Tensor) -> Tensor:
    """[N, D] as [C, N, F], zero where a narrow chunk is padded."""
    if case.is_even:
        return x.reshape(x.shape[0], case.chunks, case.width).movedim(1, 0)
    wide = case.num_wide * case.width
    head = x[:, :wide].reshape(x.shape[0], case.num_wide, case.width)
    tail = x[:, wide:].reshape(x.shape[0], case.chunks - case.num_wide, case.width - 1)
    return torch.cat([head, torch.nn.functional.pad(tail, (0, 1))], dim=1).movedim(1, 0)


def _join(case: Case, parts: Tensor) -> Tensor:
    """The inverse of `split`."""
    rows = parts.movedim(0, 1)
    if case.is_even:
        return rows.reshape(rows.shape[0], case.features)
    head, tail = rows[:, : case.num_wide], rows[:, case.num_wide :, :-1]
    return torch.cat([head.flatten(1), tail.flatten(1)], dim=1)


def _activate(activation: str, h: Tensor) -> Tensor:
    if activation == "relu":
        return torch.relu(h)
    if activation == "gelu":
        return torch.nn.functional.gelu(h, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(h)
    return h


def _run(case: Case, leaves: Leaves, u: Tensor) -> Tensor:
    """`r` of every chunk, [C, N, F], from matrices with one row a chunk."""
    own = {name: leaf.to(u.dtype) for name, leaf in leaves.items()}
    if not case.is_even:
        # What a slot holds beyond a narrow chunk's width is nobody's.
        is_real = split(case, u.new_ones((1, case.features)))[:, 0] != 0
        own["up"] = torch.where(is_real[:, None, :], own["up"], 0.0)
        for name in own.keys() & {"down", "gate"}:
            own[name] = torch.where(is_real[:, :, None], own[name], 0.0)
    h = torch.bmm(u, own["down"])
    if "bias" in own:
        h = h + own["bias"][:, None, :]
    if "gate" in own:
        a = torch.nn.functional.silu(torch.bmm(u, own["gate"])) * h
    else:
        a = _activate(case.activation, h)
    return torch.bmm(a, own["up"])


def is_live(case: Case, slot: Tensor, gains: Tensor) -> Tensor:
    """[C]: chunks that have an adapter at work."""
    return (slot >= 0) & (slot < case.slots) & (gains != 0).any(dim=1)


def _gather(case: Case, adapter: Adapter, slot: Tensor) -> Leaves:
    """The matrices that there are, a row a chunk."""
    rows = slot.clamp(0, case.slots - 1).long()
    leaves = adapter._asdict().items()
    return {name: leaf[rows] for name, leaf in leaves if leaf is not None}


def watch(case: Case, x: Tensor) -> Tensor:
    """[C, 5]: the columns of `ForwardStatistics`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total, square = wide.sum(0, keepdim=True), (wide * wide).sum(0, keepdim=True)
    narrow = case.chunks - case.num_wide if not case.is_even else 0
    widths = torch.full((case.chunks,), case.width, dtype=wide.dtype, device=x.device)
    widths[case.chunks - narrow :] -= 1
    is_dead = (square == 0).to(wide.dtype)
    totals, squares, num_dead = (split(case, row).sum((1, 2)) for row in (total, square, is_dead))
    return torch.stack([widths * x.shape[0], totals, squares, widths, num_dead], dim=1)


def forward(
    case: Case, x: Tensor, adapter: Adapter, slot: Tensor, gains: Tensor
) -> tuple[Tensor, Tensor]:
    """`y` and `watched`; see the README beside this file."""
    scale = torch.where(is_live(case, slot, gains), Gains.from_columns(gains).output_scale, 0.0)
    u = split(case, x)
    r = _run(case, _gather(case, adapter, slot), u)
    return _join(case, rule_torch.blend(u, scale, r)), watch(case, x)


def backward(
    case: Case,
    x: Tensor,
    dy: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    watched: Tensor,
) -> tuple[Tensor, Adapter, Tensor]:
    """`dx`, the adapter's gradients and `channels`; see the README beside this file."""
    live = is_live(case, slot, gains)
    own = Gains.from_columns(torch.where(live[:, None], gains, 0.0))
    u, slope = split(case, x), split(case, dy)
    wide = torch.promote_types(x.dtype, torch.float32)
    pulled = rule_torch.pullback(
        partial(torch.func.vjp, partial(_run, case)),
        own,
        _gather(case, adapter, slot),
        u,
        slope,
        input_square=watched[:, 2],
        gradient_square=slope.to(wide).square().sum((1, 2)),
    )
    is_learning = live & pulled.is_flowing & (own.param_grad_scale != 0)
    rows = torch.where(is_learning, slot, case.slots).long()

    def scattered(leaf: Tensor, gradient: Tensor) -> Tensor:
        slots = leaf.new_zeros((case.slots + 1, *leaf.shape[1:]))
        slots[rows] = gradient.to(leaf.dtype)
        return slots[:-1]

    d_adapter = {
        name: scattered(getattr(adapter, name), leaf) for name, leaf in pulled.d_adapters.items()
    }
    first, *rest = pulled.statistics
    measured = BackwardStatistics(first, *(torch.where(live, column, 0.0) for column in rest))
    dx = _join(case, rule_torch.blend(slope, own.input_grad_scale, pulled.d_u))
    return dx, Adapter(**d_adapter), torch.stack(measured, dim=1)


class Calls:
    """The passes of one case for activations of any leading shape."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def forward(
        self, x: Tensor, adapter: Adapter, slot: Tensor, gains: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`y` and `watched`."""
        y, watched = forward(self.case, x.reshape(-1, x.shape[-1]), adapter, slot, gains)
        return torch.ops.aten._unsafe_view(y, x.shape), watched

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        adapter: Adapter,
        slot: Tensor,
        gains: Tensor,
        watched: Tensor,
        *,
        is_beside: bool = False,
    ) -> tuple[Tensor, Adapter, Tensor]:
        """`dx`, the adapter's gradients and `channels`, where `is_beside` with `watched` before
        it.
        """
        rows, slope = (activation.reshape(-1, x.shape[-1]) for activation in (x, dy))
        dx, d_adapter, channels = backward(self.case, rows, slope, adapter, slot, gains, watched)
        statistics = torch.cat([watched, channels], dim=1) if is_beside else channels
        return dx.reshape(x.shape), d_adapter, statistics


def bind(case: Case, x: Tensor) -> Calls:
    """What serves calls like this one."""
    del x
    return Calls(case)
