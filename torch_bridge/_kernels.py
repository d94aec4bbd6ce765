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
    if (
        x.device.type not in DEVICES
        or len(plan.banks) != 1
        or x.dtype not in _DTYPES
        or not x.numel()
    ):
        return False
    bank = plan.banks[0]
    if bank.form.kernel is None or plan.cut.widest > MAX_SIDE:
        return False
    up = bodies[bank.bank]["up"]
    rank = up.shape[1]
    return rank <= MAX_SIDE and rank * plan.cut.widest <= MAX_MATRIX and up.dtype in _DTYPES


def _call(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor) -> tuple[Body, kernels.Bound]:
    bank = plan.banks[0]
    body = Body(**{name: leaf.contiguous() for name, leaf in bodies[bank.bank].items()})
    key = x.shape[0], x.dtype, body.up.dtype
    bound = plan.bound.get(key)
    if bound is None:
        activation = str(bank.form.kernel)
        bound = kernels.bind(x, body, plan.row, plan.gains, activation=activation)
        plan.bound[key] = bound
    return body, bound


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def forward(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor) -> tuple[Tensor, Tensor]:
    """`y` as rows, [N, D], and what was measured of `x`."""
    rows = _rows(x)
    body, bound = _call(plan, bodies, rows)
    return bound.forward(rows, body, plan.row, plan.gains)


def backward(
    plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor, dy: Tensor, watched: Tensor
) -> Pulled:
    """Gradients and channels; see `_layer.backward`."""
    rows, slope = _rows(x), _rows(dy)
    body, bound = _call(plan, bodies, rows)
    d_x, d_body, channels = bound.backward(rows, slope, body, plan.row, plan.gains, watched)
    bank = plan.banks[0].bank
    own = {name: getattr(d_body, name) for name in bodies[bank]}
    return Pulled(d_x.reshape(x.shape), channels, {bank: own})
