"""A site on a CPU in few passes and few calls, where all that lives there is alike.

It serves float32 activations in equal chunks, each with a dense adapter of the same bank that acts,
learns, is felt and is not damped.

An adapter is `r = phi(u down + bias) up` of [N, F] rows. Where `phi` is the identity, there is no
bias and the adapter is not much narrower than its chunk, `W = down up` comes first: `r = u W` and
`d x = dy (1 + feel W)^T` are one product each, and `u^T dy` serves both parameters.

Nothing here asks numbers whether they are finite. They are while the norms of what they are made of
are small, as the norm of a product is at most the product of its factors' norms; larger ones, and
parameters in float16, go the way of `_layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from esper_kernels import Chunking
from torch_bridge._adapters import PHI, Leaves, inner, through
from torch_bridge._chunks import Pulled, Sums, per_slot_square, squares, totals
from torch_bridge._plan import SitePlan

_FAR = 1e6
"""The norm of activations and of a parameter below which all that the forward pass computes is far
from float32's end: `phi` and its derivative need `|z|^3` at most, and `|r|^2` is measured."""
_STEEP = 1e18
"""The same for the incoming gradient."""


def serves(plan: SitePlan, x: Tensor) -> bool:
    """Whether this is such a site."""
    if len(plan.banks) != 1:
        return False
    bank = plan.banks[0]
    is_dense = bank.form.activation is not None and bank.is_all and bank.is_full
    return is_dense and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def forward(
    plan: SitePlan, adapters: Mapping[str, Leaves], x: Tensor, y: Tensor, *, watches: bool
) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Writes the grown activation into `y`.

    Args:
      plan: of the site.
      adapters: the live ones.
      x: [..., D].
      y: alike.
      watches: whether anything is measured.

    Returns:
      What was measured: sums of `x` and of `x^2`, [D] each, and of `r^2`, [C]. And what spares
      `backward` work: `W`, or what the activation function took. None where a norm is large; `y`
      means nothing then.
    """
    name, leaves = _only(plan, adapters)
    x_square = squares(x) if watches else None
    square = _square_norm(x) if x_square is None else _sum(x_square)
    if not _are_small(leaves, square, x.numel() // plan.cut.features):
        return None
    u = _rows(plan.cut, x)
    if _is_merged(name, leaves, u):
        kept = torch.bmm(leaves["down"], leaves["up"])
        r = torch.bmm(u, kept)
    else:
        kept = inner(leaves, u)
        r = torch.bmm(PHI[name](kept), leaves["up"].float())
    _write(plan.cut, y, u, plan.act, r)
    return () if x_square is None else (totals(x), x_square, per_slot_square(r)), kept


def backward(
    plan: SitePlan,
    adapters: Mapping[str, Leaves],
    x: Tensor,
    dy: Tensor,
    stats: Sequence[Tensor],
    kept: Tensor | None = None,
) -> Pulled | None:
    """As `_layer.backward`, after `forward`; None where the gradient is large.

    Args:
      plan: of the site.
      adapters: the live ones.
      x: [..., D].
      dy: alike.
      stats: what `forward` measured.
      kept: what it returned then; computed again where it was not kept.
    """
    name, leaves = _only(plan, adapters)
    bank = plan.banks[0].bank
    slope_square = squares(dy)
    if not _sum(slope_square) <= _STEEP**2:
        return None
    u, slope = _rows(plan.cut, x), _rows(plan.cut, dy)
    if _is_merged(name, leaves, u):
        down, up = leaves["down"], leaves["up"]
        matrix = torch.bmm(down, up) if kept is None else kept
        d_matrix = torch.bmm(u.mT, slope)
        d_leaves = {"down": torch.bmm(d_matrix, up.mT), "up": torch.bmm(down.mT, d_matrix)}
        d_u = torch.bmm(slope, matrix.mT)
    else:
        matrix = leaves["up"].float()
        z = inner(leaves, u) if kept is None else kept
        a = PHI[name](z)
        d_matrix = torch.bmm(a.mT, slope)
        d_z = through(name, z, a, torch.bmm(slope, matrix.mT))
        d_leaves = {"down": torch.bmm(u.mT, d_z), "up": d_matrix}
        if "bias" in leaves:
            d_leaves["bias"] = d_z.sum(1)
        d_u = torch.bmm(d_z, leaves["down"].float().mT)
    d_x = torch.empty_like(dy)
    _write(plan.cut, d_x, slope, plan.feel, d_u)
    utility = torch.linalg.vecdot(d_matrix.flatten(1), matrix.flatten(1)).neg_()
    total, square, r_square = stats
    told = Sums(x.numel() // plan.cut.features, total, square, slope_square, r_square, utility)
    own = {of: d_leaves[of].to(leaf.dtype) for of, leaf in leaves.items()}
    return Pulled(d_x, told, {bank: own})


def _only(plan: SitePlan, adapters: Mapping[str, Leaves]) -> tuple[str, Leaves]:
    """The name of the only bank's activation function, and its adapters."""
    bank = plan.banks[0]
    return str(bank.form.activation), adapters[bank.bank]


def _rows(cut: Chunking, x: Tensor) -> Tensor:
    """[..., D] as [C, N, F], a view where it can be."""
    return x.reshape(-1, cut.chunks, cut.widest).transpose(0, 1)


def _sum(of: Tensor) -> float:
    return float(of.numpy().sum(dtype=np.float64))


def _square_norm(of: Tensor) -> float:
    return float(torch.linalg.vector_norm(of, dtype=torch.float32)) ** 2


def _are_small(leaves: Leaves, square: float, rows: int) -> bool:
    """Whether all that the adapters compute of activations with this sum of squares is finite."""
    if not square <= _FAR**2:  # nor if it is not a number
        return False
    return all(
        leaf.dtype != torch.float16
        and _square_norm(leaf) * (rows if name == "bias" else 1) <= _FAR**2
        for name, leaf in leaves.items()
    )


def _is_merged(name: str, leaves: Leaves, u: Tensor) -> bool:
    """Whether `down up` first takes fewer operations, both passes together."""
    if name != "none" or leaves.keys() != {"down", "up"} or leaves["up"].dtype != torch.float32:
        return False
    width, rank = leaves["down"].shape[1:]
    return u.shape[1] * (2 * rank - width) > rank * width


def _write(cut: Chunking, out: Tensor, base: Tensor, gain: Tensor, values: Tensor) -> None:
    """`out = base + gain * values` of [C, N, F], in one pass where the features are adjacent."""
    if out.is_contiguous():
        torch.addcmul(base, gain, values, out=_rows(cut, out))
    else:
        out.copy_(torch.addcmul(base, gain, values).transpose(0, 1).reshape(out.shape))
