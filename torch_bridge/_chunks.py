"""A site's activations as chunks, and what is measured of them.

Activations have their features in the last axis here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_kernels import NUM_FORWARD_STATISTICS, NUM_STATISTICS, Chunking
from torch_bridge._adapters import Leaves
from torch_bridge._plan import BankPlan


class Sums(NamedTuple):
    """What both passes measured on a CPU, before it is summed within the chunks.

    `bridge.step` sums them up for all sites at once: among large arrays, caches hold neither so few
    numbers nor the code that sums them.
    """

    rows: int
    total: Tensor
    """float32[D]: sums of `x`."""
    square: Tensor
    """float32[D]: of its squares."""
    slope_square: Tensor
    """float32[D]: of the incoming gradient's squares."""
    r_square: Tensor | None = None
    """[C], where every chunk holds an adapter: of its output's squares."""
    utility: Tensor | None = None
    """[C]."""

    def copy(self) -> Sums:
        """The same in memory of its own."""
        return Sums(self.rows, *(of if of is None else of.clone() for of in self[1:]))


def told_of(cuts: Sequence[Chunking], sums: Sequence[Sums]) -> np.ndarray:
    """float32[S, 10]: `Pulled.told` of some sites, one behind the other."""
    every = zip(*((of.total, of.square, of.slope_square) for of in sums), strict=True)
    total, square, slope_square = (np.concatenate([of.numpy() for of in row]) for row in every)
    sizes = np.concatenate([cut.sizes for cut in cuts])
    rows = np.repeat([of.rows for of in sums], [cut.chunks for cut in cuts])
    of_features = np.stack([total, square, square == 0, slope_square])
    with np.errstate(over="ignore", invalid="ignore"):
        of_chunks = np.add.reduceat(of_features, np.cumsum(sizes) - sizes, axis=1)
    found = np.zeros((len(sizes), NUM_STATISTICS), np.float32)
    for channel, column in enumerate([sizes * rows, *of_chunks[:2], sizes, *of_chunks[2:]]):
        found[:, channel] = column
    found[rows == 0] = 0
    end = 0
    for cut, of in zip(cuts, sums, strict=True):
        start, end = end, end + cut.chunks
        if of.r_square is not None and of.utility is not None:
            found[start:end, NUM_FORWARD_STATISTICS + 1] = 1
            found[start:end, NUM_FORWARD_STATISTICS + 2] = of.r_square.numpy()
            found[start:end, NUM_FORWARD_STATISTICS + 3] = of.utility.numpy()
    return found


def summed(cut: Chunking, told: Tensor | Sums | None, place: torch.device) -> Tensor:
    """float32[C, 10]: `Pulled.told` within the chunks; zeros where nothing was measured."""
    if told is None:
        return torch.zeros((cut.chunks, NUM_STATISTICS), device=place, dtype=torch.float32)
    return torch.from_numpy(told_of([cut], [told])) if isinstance(told, Sums) else told


class Pulled(NamedTuple):
    """The backward pass of a site."""

    d_x: Tensor
    told: Tensor | Sums
    """float32[C, 10]: what the forward pass watched, then gradient_square, num_live,
    output_square, utility, num_errors; or the sums that `summed` makes them of."""
    d_adapters: Mapping[str, Leaves]


def take(cut: Chunking, bank: BankPlan, x: Tensor) -> Tensor:
    """[..., D] as [n, ..., F], zero where padded; a view where every chunk is served."""
    if bank.columns is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        chunks = padded.index_select(-1, bank.columns).unflatten(-1, (-1, cut.widest))
        return chunks.movedim(-2, 0)
    split = x.unflatten(-1, (cut.chunks, cut.widest))
    if not bank.is_all:
        split = split.index_select(-2, bank.chunk)
    return split.movedim(-2, 0)


def put_(cut: Chunking, bank: BankPlan, y: Tensor, values: Tensor) -> None:
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
    if x.ndim == 1:
        x = x[None]
    if x.device.type == "cpu":  # where torch's norm over leading axes takes seven times as long
        beside = x.movedim(-1, 1) if x.ndim > 2 else x
        if x.ndim > 2 and beside.is_contiguous():  # channels of images: the last axis is the pixels
            norms = torch.linalg.vector_norm(beside.flatten(2), dim=2, dtype=torch.float32)
            return norms.square().sum(0)
        return x.float().square().sum(_over_rows(x))
    return torch.linalg.vector_norm(x, dim=_over_rows(x), dtype=torch.float32).square()


def totals(x: Tensor) -> Tensor:
    """[D]: sums of x, float32, in memory of their own."""
    if x.ndim == 1:
        x = x[None]
    return x.sum(_over_rows(x), dtype=torch.float32)


def per_chunk(cut: Chunking, of_features: Tensor) -> Tensor:
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


def watch(cut: Chunking, x: Tensor) -> Tensor:
    """float32[C, 5]: num_values, total, square, num_features, num_dead."""
    return watched_of(cut, x.numel() // cut.features, totals(x), squares(x))


def watched_of(cut: Chunking, rows: int, total: Tensor, square: Tensor) -> Tensor:
    """`watch` from sums of [D]."""
    device = total.device
    sizes = torch.from_numpy(cut.sizes).to(device=device, dtype=torch.float32, non_blocking=True)
    is_dead = (square == 0).to(torch.float32)
    if not rows:
        return torch.zeros((cut.chunks, NUM_FORWARD_STATISTICS), device=device)
    sums = [per_chunk(cut, of) for of in (total, square, is_dead)]
    return torch.stack([sizes * rows, sums[0], sums[1], sizes, sums[2]], dim=1)


def slopes(cut: Chunking, dy: Tensor) -> Tensor:
    """float32[C]: the gradient's sums of squares."""
    return per_chunk(cut, squares(dy))


def tell(watched: Tensor, slope_square: Tensor) -> Tensor:
    """float32[C, 10]: `Pulled.told` with no adapter alive."""
    told = watched.new_zeros((watched.shape[0], NUM_STATISTICS))
    told[:, :NUM_FORWARD_STATISTICS] = watched
    told[:, NUM_FORWARD_STATISTICS] = slope_square
    return told


def per_slot_square(values: Tensor) -> Tensor:
    """float32[n]: sums of [n, ...] squared."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float32).square()
