"""Where the GPU kernels of `esper_kernels` compute a site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import esper_kernels.torch as kernels
from esper_kernels import Adapter, Chunking
from torch_bridge._adapters import Leaves
from torch_bridge._chunks import Pulled
from torch_bridge._plan import SitePlan

DEVICES = {"cuda"}
_DTYPES = (torch.bfloat16, torch.float32)
MAX_SIDE = 128
MAX_MATRIX = 8192
"""Widths, and their product, up to which an adapter stays on a multiprocessor, padded or not."""


def grow_compiled(
    activation: str | None, bank: Leaves, x: Tensor, slot: Tensor, gains: Tensor, tap: Tensor
) -> Tensor | None:
    """`y` of a site for a compiler, which launches the kernels among its own; None if none serve.

    Args:
      activation: of the site's only bank, as `esper_kernels` calls it, if it does.
      bank: all its parameters, `[P, ...]`.
      x: [..., D].
      slot: int32[C], -1 where nobody lives.
      gains: float32[C, 4].
      tap: [C, 10], whose gradient is what both passes measure.
    """
    is_known = x.device.type in DEVICES and x.dtype in _DTYPES and x.is_contiguous()
    if activation is None or not is_known or x.ndim < 2:
        return None
    up = bank["up"]
    if up.dtype not in _DTYPES or not _is_small(up.shape[1], up.shape[2]):
        return None
    rows = x.reshape(-1, x.shape[-1])
    y, _ = kernels.graft(rows, _adapter(bank), slot, gains, tap, activation=activation)
    return y.view_as(x)


def calls_for(plan: SitePlan, adapters: Mapping[str, Leaves], x: Tensor) -> kernels.Calls | None:
    """What computes all of a site, if a kernel can; remembered by the plan."""
    if x.device.type not in DEVICES:
        return None
    leaf = next(iter(adapters[plan.banks[0].bank].values()), None)
    of_adapter = None if leaf is None else (leaf.dtype, leaf.get_device())
    key = x.shape, x.dtype, x.get_device(), of_adapter
    if key not in plan.bound:
        plan.bound[key] = _bind(plan, adapters, x) if _serves(plan, adapters, x) else None
    found: kernels.Calls | None = plan.bound[key]
    return found


def watch(cut: Chunking, x: Tensor) -> Tensor | None:
    """As `_chunks.watch`, if a kernel can."""
    is_known = x.device.type in DEVICES and x.dtype in _DTYPES and x.is_contiguous()
    if not is_known or cut.widest > MAX_SIDE or x.ndim < 2:
        return None
    return kernels.watch(x, cut.chunks)


def _serves(plan: SitePlan, adapters: Mapping[str, Leaves], x: Tensor) -> bool:
    """One live bank of a known form, small enough for a multiprocessor."""
    if len(plan.banks) != 1 or not x.numel():
        return False
    bank = plan.banks[0]
    if bank.form.kernel is None or x.dtype not in _DTYPES:
        return False
    up = adapters[bank.bank]["up"]
    return _is_small(up.shape[1], plan.cut.widest) and up.dtype in _DTYPES


def _is_small(rank: int, width: int) -> bool:
    return max(rank, width) <= MAX_SIDE and rank * width <= MAX_MATRIX


def _bind(plan: SitePlan, adapters: Mapping[str, Leaves], x: Tensor) -> kernels.Calls:
    activation = str(plan.banks[0].form.kernel)
    adapter = _adapter(adapters[plan.banks[0].bank])
    return kernels.bind(x.contiguous(), adapter, plan.row, plan.gains, activation=activation)


def _adapter(leaves: Leaves) -> Adapter:
    return Adapter(**{name: leaf.contiguous() for name, leaf in leaves.items()})


def forward(
    calls: kernels.Calls, plan: SitePlan, adapters: Mapping[str, Leaves], x: Tensor
) -> tuple[Tensor, Tensor]:
    """`y`, in memory of its own, and what was measured of `x`."""
    adapter = _adapter(adapters[plan.banks[0].bank])
    return calls.forward(x.contiguous(), adapter, plan.row, plan.gains)


def backward(
    calls: kernels.Calls,
    plan: SitePlan,
    adapters: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    watched: Tensor,
) -> Pulled:
    """See `_layer.backward`."""
    bank = plan.banks[0]
    adapter, row, gains = _adapter(adapters[bank.bank]), plan.row, plan.gains
    d_x, d_adapter, told = calls.backward(
        x.contiguous(), dy.contiguous(), adapter, row, gains, watched, is_beside=True
    )
    own = {name: getattr(d_adapter, name) for name in bank.leaves}
    return Pulled(d_x, told, {bank.bank: own})
