"""A site's activations as chunks, and what is measured of them.

Activations have their features in the last axis here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_bridge._bodies import Leaves
from torch_bridge._plan import NUM_CHANNELS, NUM_WATCHED, BankPlan, Cut


class Pulled(NamedTuple):
    """The backward pass of a site."""

    d_x: Tensor
    told: Tensor
    """float32[C, 10]: what the forward pass watched, then gradient_square, num_live,
    output_square, utility, num_errors."""
    d_bodies: Mapping[str, Leaves]


def take(cut: Cut, bank: BankPlan, x: Tensor) -> Tensor:
    """[..., D] as [n, ..., F], zero where padded; a view where every chunk is served."""
    if bank.columns is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        chunks = padded.index_select(-1, bank.columns).unflatten(-1, (-1, cut.widest))
        return chunks.movedim(-2, 0)
    split = x.unflatten(-1, (cut.chunks, cut.widest))
    if not bank.is_all:
        split = split.index_select(-2, bank.chunk)
    return split.movedim(-2, 0)


def put_(cut: Cut, bank: BankPlan, y: Tensor, values: Tensor) -> None:
    """Writes [n, ..., F] into the chunks of `y`."""
    laid = values.movedim(0, -2)
    if bank.columns is not None:
        is_real = bank.columns < cut.features
        y.index_copy_(-1, bank.columns[is_real], laid.flatten(-2)[..., is_real])
        return
    split = y.unflatten(-1, (cut.chunks, cut.widest))
    if bank.is_all:
        split.copy_(laid)
    else:
        split.index_copy_(-2, bank.chunk, laid)


def column(values: Tensor, like: Tensor) -> Tensor:
    """[n] shaped to broadcast against [n, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _over_rows(x: Tensor) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def squares(x: Tensor) -> Tensor:
    """[D]: sums of x^2, float32."""
    if x.device.type == "cpu":  # where torch's norm over leading axes takes seven times as long
        beside = x.movedim(-1, 1) if x.ndim > 2 else x
        if x.ndim > 2 and beside.is_contiguous():  # channels of images: the last axis is the pixels
            norms = torch.linalg.vector_norm(beside.flatten(2), dim=2, dtype=torch.float32)
            return norms.square().sum(0)
        return x.float().square().sum(_over_rows(x))
    return torch.linalg.vector_norm(x, dim=_over_rows(x), dtype=torch.float32).square()


def per_chunk(cut: Cut, of_features: Tensor) -> Tensor:
    """float32 [D] summed within the chunks, [C]."""
    if of_features.device.type == "cpu":  # where NumPy takes a tenth of the time for so few numbers
        with np.errstate(over="ignore", invalid="ignore"):
            return torch.from_numpy(np.add.reduceat(of_features.numpy(), cut.starts))
    if cut.is_even:
        return of_features.reshape(cut.chunks, cut.widest).sum(1)
    head = cut.features % cut.chunks * cut.widest
    wide = of_features[:head].reshape(-1, cut.widest).sum(1)
    narrow = of_features[head:].reshape(-1, cut.widest - 1).sum(1)
    return torch.cat([wide, narrow])


def watch(cut: Cut, x: Tensor) -> Tensor:
    """float32[C, 5]: num_values, total, square, num_features, num_dead."""
    rows = x.numel() // cut.features
    if not rows:
        return torch.zeros((cut.chunks, NUM_WATCHED), device=x.device)
    if x.ndim == 1:
        x = x[None]
    total, square = x.sum(_over_rows(x), dtype=torch.float32), squares(x)
    is_dead = (square == 0).to(torch.float32)
    sums = [per_chunk(cut, of) for of in (total, square, is_dead)]
    if x.device.type == "cpu":
        found = np.empty((cut.chunks, NUM_WATCHED), np.float32)
        found[:, 0], found[:, 3] = cut.sizes * rows, cut.sizes
        found[:, 1], found[:, 2], found[:, 4] = sums
        return torch.from_numpy(found)
    sizes = torch.from_numpy(cut.sizes).to(device=x.device, dtype=torch.float32, non_blocking=True)
    return torch.stack([sizes * rows, sums[0], sums[1], sizes, sums[2]], dim=1)


def slopes(cut: Cut, dy: Tensor) -> Tensor:
    """float32[C]: the gradient's sums of squares."""
    if not dy.numel():
        return torch.zeros((cut.chunks,), device=dy.device)
    return per_chunk(cut, squares(dy if dy.ndim > 1 else dy[None]))


def tell(watched: Tensor, slope_square: Tensor) -> Tensor:
    """float32[C, 10]: `Pulled.told` with no body alive."""
    told = watched.new_zeros((watched.shape[0], NUM_CHANNELS))
    told[:, :NUM_WATCHED] = watched
    told[:, NUM_WATCHED] = slope_square
    return told


def per_slot_square(values: Tensor) -> Tensor:
    """float32[n]: sums of [n, ...] squared."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float32).square()
