"""Where the GPU kernels of `esper_kernels` compute a site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import esper_kernels.torch as kernels
from esper_kernels import Body
from torch_bridge._bodies import Leaves
from torch_bridge._layer import Pulled
from torch_bridge._plan import SitePlan

DEVICES = {"cuda"}
_DTYPES = (torch.bfloat16, torch.float32)
MAX_SIDE = 128
MAX_MATRIX = 8192
"""Widths, and their product, up to which a body stays on a multiprocessor, padded or not."""


def serves(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor) -> bool:
    """Whether a kernel computes all of a site: one live bank of a known form, on a GPU."""
    if len(plan.banks) != 1 or x.device.type not in DEVICES or not x.numel():
        return False
    bank = plan.banks[0]
    if bank.form.kernel is None or x.dtype not in _DTYPES:
        return False
    up = bodies[bank.bank]["up"]
    rank, width = up.shape[1], plan.cut.widest
    is_small = max(rank, width) <= MAX_SIDE and rank * width <= MAX_MATRIX
    return is_small and up.dtype in _DTYPES


def _call(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor) -> tuple[Body, kernels.Calls]:
    bank = plan.banks[0]
    leaves = bodies[bank.bank]
    body = Body(**{name: leaf.contiguous() for name, leaf in leaves.items()})
    key = x.shape[:-1].numel(), x.dtype, body.up.dtype
    calls = plan.bound.get(key)
    if calls is None:
        activation = str(bank.form.kernel)
        calls = kernels.bind(x, body, plan.row, plan.gains, activation=activation)
        plan.bound[key] = calls
    return body, calls


def forward(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor) -> tuple[Tensor, Tensor]:
    """`y`, in memory of its own, and what was measured of `x`."""
    x = x.contiguous()
    body, calls = _call(plan, bodies, x)
    return calls.forward(x, body, plan.row, plan.gains)


def backward(
    plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor, dy: Tensor, watched: Tensor
) -> Pulled:
    """Gradients and channels; see `_layer.backward`."""
    x, dy = x.contiguous(), dy.contiguous()
    body, calls = _call(plan, bodies, x)
    d_x, d_body, channels = calls.backward(x, dy, body, plan.row, plan.gains, watched)
    bank = plan.banks[0]
    own = {name: getattr(d_body, name) for name in bank.leaves}
    return Pulled(d_x, channels, {bank.bank: own})
