"""The definition of `potential` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from esper_kernels.potential._case import PotentialCase


def potential(case: PotentialCase, x: Tensor, dy: Tensor, is_asked: Tensor) -> Tensor:
    """[C]: the squared size of `x^T dy`, summed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cut = case.num_wide * case.width
    parts = [
        (x[:, :cut], dy[:, :cut], case.num_wide),
        (x[:, cut:], dy[:, cut:], case.chunks - case.num_wide),
    ]
    sizes = []
    for a, b, chunks in parts:
        if chunks:
            shape = (case.rows, chunks, a.shape[1] // chunks)
            u, slope = (of.to(wide).reshape(shape).transpose(0, 1) for of in (a, b))
            sizes.append(torch.bmm(u.transpose(1, 2), slope).square().sum((1, 2)))
    return torch.where(is_asked, torch.cat(sizes), 0.0)
