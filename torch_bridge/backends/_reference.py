"""The rule of `esper_kernels.rule_torch` for any blueprint, and for any number of live banks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from esper_kernels import Gains, rule_torch
from esper_kernels.rule_torch import Leaves, Pull
from torch_bridge._adapters import PHI, project_down, pull_dense
from torch_bridge._plan import BankPlan, SitePlan
from torch_bridge.backends._base import Adapters, Residual, SiteGradients, plain_numbers
from torch_bridge.backends._layout import gather, scatter_
from torch_bridge.backends._statistics import (
    GRADIENT_SQUARE,
    INPUT_SQUARE,
    OF_ADAPTERS,
    all_statistics,
    measure_forward,
    measure_gradient,
)


class Reference:
    """The definition; it serves every site."""

    name = "reference"

    def serves(self, plan: SitePlan, adapters: Adapters, x: Tensor) -> bool:
        """Always."""
        del plan, adapters, x
        return True

    def forward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, *, measures: bool
    ) -> tuple[Tensor, Residual | None]:
        """See `SiteBackend.forward`."""
        with plain_numbers(x):
            y = torch.empty_like(x).copy_(x)
            for bank in plan.banks:
                if bank.acts:
                    u = gather(plan.chunking, bank, x)
                    r = run(plan, bank, adapters[bank.name], u)
                    scale = _gains(plan, bank).output_scale
                    scatter_(plan.chunking, bank, y, rule_torch.blend(u, scale, r))
            return y, Residual(measure_forward(plan.chunking, x)) if measures else None

    def backward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, dy: Tensor, residual: Residual
    ) -> SiteGradients:
        """See `SiteBackend.backward`."""
        with plain_numbers(x):
            statistics = all_statistics(residual.statistics, measure_gradient(plan.chunking, dy))
            d_x, d_adapters = dy, {}
            for bank in plan.banks:
                leaves = adapters[bank.name]
                if not dy.numel():
                    d_adapters[bank.name] = {n: torch.zeros_like(p) for n, p in leaves.items()}
                    continue
                gains, slope = _gains(plan, bank), gather(plan.chunking, bank, dy)
                pulled = rule_torch.pullback(
                    partial(vjp, plan, bank),
                    gains,
                    leaves,
                    gather(plan.chunking, bank, x),
                    slope,
                    input_square=statistics[:, INPUT_SQUARE].index_select(0, bank.chunk),
                    gradient_square=statistics[:, GRADIENT_SQUARE].index_select(0, bank.chunk),
                    is_damped=bank.is_damped,
                )
                d_adapters[bank.name] = pulled.d_adapters
                columns = torch.stack(pulled.statistics[1:], dim=1)
                statistics[:, OF_ADAPTERS].index_copy_(0, bank.chunk, columns)
                if bank.is_felt:
                    d_x = dy.clone() if d_x is dy else d_x
                    d_u = rule_torch.blend(slope, gains.input_grad_scale, pulled.d_u)
                    scatter_(plan.chunking, bank, d_x, d_u)
            return SiteGradients(d_x, d_adapters, statistics)


REFERENCE = Reference()


def _gains(plan: SitePlan, bank: BankPlan) -> Gains:
    return Gains.from_columns(plan.gains.index_select(0, bank.chunk))


def run(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor) -> Tensor:
    """What each adapter of a bank adds to [n, ..., F], zero where padded."""
    r = bank.form.apply(leaves, u, bank.mask, plan.topology)
    if bank.columns is None:
        return r
    mask = bank.mask.reshape(len(bank.slots), *(1,) * (r.ndim - 2), -1)
    return torch.where(mask, r, 0.0)


def vjp(plan: SitePlan, bank: BankPlan, leaves: Leaves, u: Tensor) -> tuple[Tensor, Pull]:
    """`run` and its derivative, which is written out for dense adapters."""
    if bank.form.activation is None:
        pulled: tuple[Tensor, Pull] = torch.func.vjp(partial(run, plan, bank), leaves, u)
        return pulled
    mask = None if bank.columns is None else bank.mask
    return _dense_vjp(bank.form.activation, mask, leaves, u)


def _dense_vjp(
    activation: str, mask: Tensor | None, leaves: Leaves, u: Tensor
) -> tuple[Tensor, Pull]:
    """`r = phi(u down + bias) up`."""
    rows = u.reshape(u.shape[0], -1, u.shape[-1])
    up = leaves["up"].to(u.dtype)
    if mask is not None:
        up = torch.where(mask[:, None, :], up, 0.0)
    z = project_down(leaves, rows)
    a = PHI[activation](z)

    def pull(dr: Tensor) -> tuple[Leaves, Tensor]:
        slope = dr.reshape(rows.shape)
        gradients, d_rows = pull_dense(activation, leaves, up, rows, z, a, slope)
        d_leaves = {name: gradients[name].to(leaf.dtype) for name, leaf in leaves.items()}
        return d_leaves, d_rows.reshape(u.shape)

    return torch.bmm(a, up).reshape(u.shape), pull
