"""The GPU kernels of `esper_kernels`, for sites with one live bank of a kind that they know."""

from __future__ import annotations

from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import esper_kernels.torch as kernels
from esper_kernels import Adapter
from esper_kernels.rule_torch import Leaves
from torch_bridge._plan import SitePlan
from torch_bridge.backends._base import Adapters, Residual, SiteGradients
from torch_bridge.backends._statistics import KERNEL_DEVICES, KERNEL_DTYPES, KERNEL_MAX_WIDTH

MAX_MATRIX = 8192
"""The product of width and rank up to which an adapter stays on a multiprocessor, padded or not."""

CallKey: TypeAlias = tuple[torch.Size, torch.dtype, int, torch.dtype]
"""The shape, dtype and device of an activation, and the adapters' dtype."""


class Triton:
    """One live bank of `low_rank`, `bottleneck` or `gated` adapters on a GPU."""

    name = "triton"

    def __init__(self) -> None:
        self.calls: WeakKeyDictionary[SitePlan, dict[CallKey, kernels.Calls]] = WeakKeyDictionary()
        """What was looked up of each plan's kernels, as that takes longer than to start one."""

    def serves(self, plan: SitePlan, adapters: Adapters, x: Tensor) -> bool:
        """See `SiteBackend.serves`."""
        if x.device.type not in KERNEL_DEVICES or len(plan.banks) != 1:
            return False
        bank = plan.banks[0]
        if bank.form.kernel is None or x.dtype not in KERNEL_DTYPES or not x.numel():
            return False
        up = adapters[bank.name]["up"]
        return up.dtype in KERNEL_DTYPES and _is_small(up.shape[1], plan.chunking.widest)

    def forward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, *, measures: bool
    ) -> tuple[Tensor, Residual | None]:
        """See `SiteBackend.forward`."""
        del measures  # the kernel does so on its way
        x, adapter = x.contiguous(), _adapter(adapters[plan.banks[0].name])
        y, statistics = self._bound(plan, adapter, x).forward(x, adapter, plan.row, plan.gains)
        return y, Residual(statistics)

    def backward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, dy: Tensor, residual: Residual
    ) -> SiteGradients:
        """See `SiteBackend.backward`."""
        bank = plan.banks[0]
        x, adapter = x.contiguous(), _adapter(adapters[bank.name])
        d_x, d_adapter, statistics = self._bound(plan, adapter, x).backward(
            x,
            dy.contiguous(),
            adapter,
            plan.row,
            plan.gains,
            residual.statistics,
            is_beside=True,
        )
        own = {name: getattr(d_adapter, name) for name in bank.leaves}
        return SiteGradients(d_x, {bank.name: own}, statistics)

    def _bound(self, plan: SitePlan, adapter: Adapter, x: Tensor) -> kernels.Calls:
        calls = self.calls.setdefault(plan, {})
        key = x.shape, x.dtype, x.get_device(), adapter.up.dtype
        bound = calls.get(key)
        if bound is None:
            activation = str(plan.banks[0].form.kernel)
            bound = kernels.bind(x, adapter, plan.row, plan.gains, activation=activation)
            calls[key] = bound
        return bound


def grow_compiled(
    activation: str, leaves: Leaves, x: Tensor, slot: Tensor, gains: Tensor, tap: Tensor
) -> Tensor | None:
    """`y` of a site for a compiler, which launches the kernels among its own; None if none serve.

    Args:
      activation: of the site's only bank, as `esper_kernels` calls it.
      leaves: all parameters of the bank, `[P, ...]`.
      x: [..., D].
      slot: int32[C], -1 where nobody lives.
      gains: float32[C, 4].
      tap: [C, 10], whose gradient is what both passes measure.
    """
    is_known = x.device.type in KERNEL_DEVICES and x.dtype in KERNEL_DTYPES and x.is_contiguous()
    up = leaves["up"]
    if not is_known or x.ndim < 2 or up.dtype not in KERNEL_DTYPES:
        return None
    if not _is_small(up.shape[1], up.shape[2]):
        return None
    rows = x.reshape(-1, x.shape[-1])
    y, _ = kernels.graft(rows, _adapter(leaves), slot, gains, tap, activation=activation)
    return y.view_as(x)


def _is_small(rank: int, width: int) -> bool:
    return max(rank, width) <= KERNEL_MAX_WIDTH and rank * width <= MAX_MATRIX


def _adapter(leaves: Leaves) -> Adapter:
    return Adapter(**{name: leaf.contiguous() for name, leaf in leaves.items()})
