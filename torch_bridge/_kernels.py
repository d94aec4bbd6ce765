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


def _call(plan: SitePlan, bodies: Mapping[str, Leaves]) -> tuple[Body, str]:
    bank = plan.banks[0]
    leaves = {name: leaf.contiguous() for name, leaf in bodies[bank.bank].items()}
    return Body(**leaves), str(bank.form.kernel)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def forward(plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor) -> tuple[Tensor, Tensor]:
    """`y` as rows, [N, D], and what was measured of `x`."""
    body, activation = _call(plan, bodies)
    return kernels.graft(_rows(x), body, plan.row, plan.gains, activation=activation)


def backward(
    plan: SitePlan, bodies: Mapping[str, Leaves], x: Tensor, dy: Tensor, watched: Tensor
) -> Pulled:
    """Gradients and channels; see `_layer.backward`."""
    bank = plan.banks[0]
    body, activation = _call(plan, bodies)
    d_x, d_down, d_up, d_bias, d_gate, channels = torch.ops.esper.graft_backward(
        _rows(x), _rows(dy), *body, plan.row, plan.gains, watched, activation, "auto"
    )
    grads = {"down": d_down, "up": d_up, "bias": d_bias, "gate": d_gate}
    own = {name: grads[name] for name in bodies[bank.bank]}
    return Pulled(d_x.reshape(x.shape), channels, {bank.bank: own})
