"""Both passes of a site whose features may lie along any axis, by the first backend that serves."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_bridge._plan import SitePlan
from torch_bridge.backends._base import Adapters, Residual, SiteBackend, SiteGradients
from torch_bridge.backends._dense_cpu import DenseCpu
from torch_bridge.backends._reference import REFERENCE
from torch_bridge.backends._triton import Triton

BACKENDS: list[SiteBackend] = [Triton(), DenseCpu(), REFERENCE]
"""All backends, in order of preference."""


def select(plan: SitePlan, adapters: Adapters, x: Tensor) -> SiteBackend:
    """The first backend that serves a site; the same for both of its passes."""
    if plan.banks:
        for backend in BACKENDS:
            if backend.serves(plan, adapters, x):
                return backend
    return REFERENCE


def forward(
    plan: SitePlan, axis: int, adapters: Adapters, x: Tensor, *, measures: bool
) -> tuple[Tensor, Residual | None]:
    """`y` in memory of its own, and what `backward` needs.

    Args:
      plan: who lives at the site.
      axis: of the features of `x`.
      adapters: the live ones.
      x: the activation.
      measures: whether `backward` may follow.
    """
    last = x if axis == -1 else x.movedim(axis, -1)
    y, residual = select(plan, adapters, last).forward(plan, adapters, last, measures=measures)
    return y if axis == -1 else _moved(y, axis, x), residual


def _moved(y: Tensor, axis: int, x: Tensor) -> Tensor:
    """`y` with its features along `axis`, laid out like `x`, and no view for autograd."""
    moved = y.movedim(-1, axis)
    if moved.stride() != x.stride():
        return torch.empty_like(x).copy_(moved)
    memory = moved.untyped_storage()
    return y.new_empty(0).set_(memory, moved.storage_offset(), moved.shape, moved.stride())


def backward(
    plan: SitePlan, axis: int, adapters: Adapters, x: Tensor, dy: Tensor, residual: Residual
) -> SiteGradients:
    """The gradients of `x` and of the adapters, and what both passes measured.

    Args:
      plan: as in `forward`, as are `axis`, `adapters` and `x`.
      axis: see there.
      adapters: see there.
      x: see there.
      dy: the gradient of `y`.
      residual: what `forward` returned.
    """
    if axis == -1:
        backend = select(plan, adapters, x)
        return backend.backward(plan, adapters, x, dy, residual)
    last, slope = x.movedim(axis, -1), dy.movedim(axis, -1)
    gradients = select(plan, adapters, last).backward(plan, adapters, last, slope, residual)
    return gradients._replace(d_x=gradients.d_x.movedim(-1, axis))
