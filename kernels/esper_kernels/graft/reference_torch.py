"""The definition of `graft` in plain torch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from esper_kernels._records import Adapter
from esper_kernels.graft._case import Case


def refuses(case: Case) -> str | None:
    """The reference serves every case."""
    del case
    return None


def split(case: Case, x: Tensor) -> Tensor:
    """[N, D] as [N, C, F], zero where a narrow chunk is padded."""
    if case.is_even:
        return x.reshape(x.shape[0], case.chunks, case.width)
    wide = case.num_wide * case.width
    head = x[:, :wide].reshape(x.shape[0], case.num_wide, case.width)
    tail = x[:, wide:].reshape(x.shape[0], case.chunks - case.num_wide, case.width - 1)
    return torch.cat([head, torch.nn.functional.pad(tail, (0, 1))], dim=1)


def _join(case: Case, parts: Tensor) -> Tensor:
    if case.is_even:
        return parts.reshape(parts.shape[0], case.features)
    head, tail = parts[:, : case.num_wide], parts[:, case.num_wide :, :-1]
    return torch.cat([head.flatten(1), tail.flatten(1)], dim=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _activate(activation: str, h: Tensor) -> Tensor:
    if activation == "relu":
        return torch.relu(h)
    if activation == "gelu":
        return torch.nn.functional.gelu(h, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(h)
    return h


def _run(activation: str, u: Tensor, down: Tensor, up: Tensor, *rest: Tensor) -> Tensor:
    """`r` of every chunk from matrices with one row a chunk."""
    bias, gate = (*rest, None, None)[:2]
    h = torch.einsum("ncf,cfr->ncr", u, down)
    if bias is not None and bias.numel():
        h = h + bias
    if gate is not None:
        a = torch.nn.functional.silu(torch.einsum("ncf,cfr->ncr", u, gate)) * h
    else:
        a = _activate(activation, h)
    return torch.einsum("ncr,crf->ncf", a, up)


def is_live(case: Case, slot: Tensor, gains: Tensor) -> Tensor:
    """[C]: chunks that have an adapter at work."""
    return (slot >= 0) & (slot < case.slots) & (gains != 0).any(dim=1)


def _gather(case: Case, adapter: Adapter, slot: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """down, up, bias (empty for none), and gate where there is one, a row a chunk."""
    rows = slot.clamp(0, case.slots - 1).long()
    bias = adapter.down.new_zeros((case.slots, 0)) if adapter.bias is None else adapter.bias
    leaves = [adapter.down, adapter.up, bias, *([] if adapter.gate is None else [adapter.gate])]
    down, up, bias, *gate = (leaf[rows].to(dtype) for leaf in leaves)
    if not case.is_even:
        # What a slot holds beyond a narrow chunk's width is nobody's.
        is_real = split(case, down.new_ones((1, case.features)))[0] != 0
        down, *gate = (torch.where(is_real[:, :, None], leaf, 0.0) for leaf in (down, *gate))
        up = torch.where(is_real[:, None, :], up, 0.0)
    return [down, up, bias, *gate]


def _add(base: Tensor, gain: Tensor, values: Tensor) -> Tensor:
    """`base + gain * values`; `base` itself where the gain is 0 or a value is not finite."""
    gain = gain.to(_wide(base.dtype))[None, :, None]
    wide = base.to(gain.dtype) + gain * values.to(gain.dtype)
    return torch.where((gain != 0) & values.isfinite(), wide.to(base.dtype), base)


def watch(case: Case, x: Tensor) -> Tensor:
    """[C, 5]: `num_values, total, square, num_features, num_dead`."""
    wide = x.to(_wide(x.dtype))
    total, square = wide.sum(0, keepdim=True), (wide * wide).sum(0, keepdim=True)
    narrow = case.chunks - case.num_wide if not case.is_even else 0
    widths = torch.full((case.chunks,), case.width, dtype=wide.dtype, device=x.device)
    widths[case.chunks - narrow :] -= 1
    is_dead = split(case, (square == 0).to(wide.dtype))
    sums = [split(case, of)[0].sum(1) for of in (total, square)]
    return torch.stack([widths * x.shape[0], *sums, widths, is_dead[0].sum(1)], dim=1)


def forward(
    case: Case, x: Tensor, adapter: Adapter, slot: Tensor, gains: Tensor
) -> tuple[Tensor, Tensor]:
    """`y` and `watched`; see the README beside this file."""
    act = torch.where(is_live(case, slot, gains), gains[:, 0], 0.0)
    u = split(case, x)
    r = _run(case.activation, u, *_gather(case, adapter, slot, x.dtype))
    return _join(case, _add(u, act, r)), watch(case, x)


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
    learn, feel, damping = (torch.where(live, gains[:, k], 0.0) for k in (1, 2, 3))
    u, slope = split(case, x), split(case, dy)
    narrow = _gather(case, adapter, slot, x.dtype)
    pulled = torch.func.vjp(partial(_run, case.activation), u, *narrow)
    r = pulled[0]
    # An adapter that is felt is not damped, so `d_u` is the host's own wherever it is read.
    damping = torch.where(feel == 0, damping, 0.0)
    d_u, *d_narrow = pulled[1](_add(slope, damping, r))

    wide = _wide(x.dtype)
    gradient_square = slope.to(wide).square().sum((0, 2))
    output_square = r.to(wide).square().sum((0, 2))
    utility = -(slope.to(wide) * r.to(wide)).sum((0, 2))
    is_sound = output_square.isfinite()
    is_flowing = is_sound & d_u.isfinite().all(2).all(0)
    for leaf in d_narrow:
        is_flowing = is_flowing & leaf.isfinite().flatten(1).all(1)
    fed = gradient_square.isfinite() & watched[:, 2].isfinite()

    rows = torch.where(live & is_flowing & (learn != 0), slot, case.slots).long()

    def learned(leaf: Tensor, of: Tensor) -> Tensor:
        share = leaf.to(wide) * learn.to(wide).reshape(-1, *(1,) * (leaf.ndim - 1))
        room = of.new_zeros((case.slots + 1, *of.shape[1:]))
        room[rows] = share.to(of.dtype)
        return room[:-1]

    down, up, bias, *rest = d_narrow
    d_adapter = Adapter(
        down=learned(down, adapter.down),
        up=learned(up, adapter.up),
        bias=None if adapter.bias is None else learned(bias, adapter.bias),
        gate=None if adapter.gate is None else learned(rest[0], adapter.gate),
    )
    channels = [
        live.to(wide),
        torch.where(live & is_sound, output_square, 0.0),
        torch.where(live & is_sound, utility, 0.0),
        (live & fed & ~is_flowing).to(wide),
    ]
    dx = _join(case, _add(slope, feel, d_u))
    return dx, d_adapter, torch.stack([gradient_square, *channels], dim=1)


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
        rows, slope = (of.reshape(-1, x.shape[-1]) for of in (x, dy))
        dx, d_adapter, channels = backward(self.case, rows, slope, adapter, slot, gains, watched)
        told = torch.cat([watched, channels], dim=1) if is_beside else channels
        return dx.reshape(x.shape), d_adapter, told


def bind(case: Case, x: Tensor) -> Calls:
    """What serves calls like this one."""
    del x
    return Calls(case)
