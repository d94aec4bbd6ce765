"""A site on a CPU in few passes and few calls, where all that lives there is alike.

It serves float32 activations in equal chunks, each with a dense adapter of the same bank whose
gains are all in force and which is not damped.

An adapter is `r = phi(u down + bias) up` of [N, F] rows. Where `phi` is the identity, there is no
bias and the adapter is not much narrower than its chunk, `W = down up` comes first: `r = u W` and
`d u = dy W^T` are one product each, and `u^T dy` serves both parameters.

Nothing here tests whether numbers are finite. They are while the norms of what they are made of
are small, as the norm of a product is at most the product of its factors' norms. The definition
takes over where one is larger, or a parameter is in float16.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from esper_kernels import Chunking
from esper_kernels.rule_torch import Leaves
from torch_bridge._adapters import PHI, project_down, pull_dense
from torch_bridge._plan import SitePlan
from torch_bridge.backends._base import Adapters, Residual, SiteGradients, plain_numbers
from torch_bridge.backends._reference import REFERENCE
from torch_bridge.backends._statistics import (
    OF_ADAPTERS,
    all_statistics,
    forward_statistics,
    squares,
    sum_chunks,
    sum_squares,
    totals,
)

MAX_NORM = 1e6
"""The norm of activations and of a parameter below which all that the forward pass computes is far
from float32's end: `phi` and its derivative need `|z|^3` at most, and `|r|^2` is measured."""
MAX_GRADIENT_NORM = 1e18
"""The same for the incoming gradient."""


class DenseCpu:
    """Alike dense adapters in every chunk of a float32 activation on a CPU."""

    name = "dense_cpu"

    def serves(self, plan: SitePlan, adapters: Adapters, x: Tensor) -> bool:
        """See `SiteBackend.serves`."""
        del adapters
        if len(plan.banks) != 1:
            return False
        bank = plan.banks[0]
        is_dense = bank.form.activation is not None and bank.is_all and bank.is_full
        return is_dense and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0

    def forward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, *, measures: bool
    ) -> tuple[Tensor, Residual | None]:
        """See `SiteBackend.forward`."""
        with plain_numbers(x):
            activation, leaves = _only(plan, adapters)
            num_rows = x.numel() // plan.chunking.features
            x_square = squares(x) if measures else None
            square = _square_norm(x) if x_square is None else _sum(x_square)
            if not _are_small(leaves, square, num_rows):
                return REFERENCE.forward(plan, adapters, x, measures=measures)
            u = _rows(plan.chunking, x)
            if _is_merged(activation, leaves, u):
                intermediate = torch.bmm(leaves["down"], leaves["up"])
                r = torch.bmm(u, intermediate)
            else:
                intermediate = project_down(leaves, u)
                r = torch.bmm(PHI[activation](intermediate), leaves["up"].float())
            y = torch.empty_like(x)
            _blend(plan.chunking, y, u, plan.output_scale, r)
            if x_square is None:
                return y, None
            statistics = forward_statistics(plan.chunking, num_rows, totals(x), x_square)
            return y, Residual(statistics, sum_squares(r), intermediate)

    def backward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, dy: Tensor, residual: Residual
    ) -> SiteGradients:
        """See `SiteBackend.backward`."""
        output_square = residual.output_square
        if output_square is None or not math.isfinite(output_square.numpy()[0]):
            return REFERENCE.backward(plan, adapters, x, dy, residual)
        with plain_numbers(x):
            slope_square = squares(dy)
            if not _sum(slope_square) <= MAX_GRADIENT_NORM**2:
                return REFERENCE.backward(plan, adapters, x, dy, residual)
            activation, leaves = _only(plan, adapters)
            u, slope = _rows(plan.chunking, x), _rows(plan.chunking, dy)
            d_leaves, d_u, utility = _pull(activation, leaves, u, slope, residual.intermediate)
            d_x = torch.empty_like(dy)
            _blend(plan.chunking, d_x, slope, plan.input_grad_scale, d_u)
            gradient_square = sum_chunks(plan.chunking, slope_square[None])[0]
            statistics = all_statistics(residual.statistics, gradient_square)
            columns = torch.stack([output_square, utility], dim=1)
            statistics[:, OF_ADAPTERS.start] = 1
            statistics[:, OF_ADAPTERS.start + 1 : OF_ADAPTERS.start + 3] = columns
            own = {name: d_leaves[name].to(leaf.dtype) for name, leaf in leaves.items()}
            return SiteGradients(d_x, {plan.banks[0].name: own}, statistics)


def _pull(
    activation: str, leaves: Leaves, u: Tensor, slope: Tensor, intermediate: Tensor | None
) -> tuple[Leaves, Tensor, Tensor]:
    """Gradients of the parameters and of `u`, and the utility of each adapter."""
    if _is_merged(activation, leaves, u):
        down, up = leaves["down"], leaves["up"]
        matrix = torch.bmm(down, up) if intermediate is None else intermediate
        d_matrix = torch.bmm(u.mT, slope)
        d_leaves = {"down": torch.bmm(d_matrix, up.mT), "up": torch.bmm(down.mT, d_matrix)}
        d_u = torch.bmm(slope, matrix.mT)
    else:
        matrix = leaves["up"].float()
        z = project_down(leaves, u) if intermediate is None else intermediate
        a = PHI[activation](z)
        d_leaves, d_u = pull_dense(activation, leaves, matrix, u, z, a, slope)
        d_matrix = d_leaves["up"]
    # <dy, r> = <a^T dy, up> costs no pass over r.
    utility = torch.linalg.vecdot(d_matrix.flatten(1), matrix.flatten(1)).neg_()
    return d_leaves, d_u, utility


def _only(plan: SitePlan, adapters: Adapters) -> tuple[str, Leaves]:
    """The name of the only bank's activation function, and its adapters."""
    bank = plan.banks[0]
    return str(bank.form.activation), adapters[bank.name]


def _rows(chunking: Chunking, x: Tensor) -> Tensor:
    """[..., D] as [C, N, F], a view where it can be."""
    return x.reshape(-1, chunking.chunks, chunking.widest).transpose(0, 1)


def _sum(values: Tensor) -> float:
    return float(values.numpy().sum(dtype=np.float64))


def _square_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float32)) ** 2


def _are_small(leaves: Leaves, square: float, num_rows: int) -> bool:
    """Whether all that the adapters compute of activations with this sum of squares is finite."""
    if not square <= MAX_NORM**2:  # nor if it is not a number
        return False
    return all(
        leaf.dtype != torch.float16
        and _square_norm(leaf) * (num_rows if name == "bias" else 1) <= MAX_NORM**2
        for name, leaf in leaves.items()
    )


def _is_merged(activation: str, leaves: Leaves, u: Tensor) -> bool:
    """Whether `down up` first takes fewer operations, both passes together."""
    if activation != "none" or leaves.keys() != {"down", "up"}:
        return False
    width, rank = leaves["down"].shape[1:]
    is_fewer = u.shape[1] * (2 * rank - width) > rank * width
    return is_fewer and leaves["up"].dtype == torch.float32


def _blend(chunking: Chunking, out: Tensor, base: Tensor, scale: Tensor, values: Tensor) -> None:
    """`out = base + scale * values` of [C, N, F], in one pass where the features are adjacent."""
    if out.is_contiguous():
        torch.addcmul(base, scale, values, out=_rows(chunking, out))
    else:
        out.copy_(torch.addcmul(base, scale, values).transpose(0, 1).reshape(out.shape))
