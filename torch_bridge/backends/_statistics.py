"""What is measured of a site's activations, whose features are in the last axis here."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import esper_kernels.torch as kernels
from esper_kernels import (
    NUM_FORWARD_STATISTICS,
    NUM_STATISTICS,
    Chunking,
    ForwardStatistics,
    Statistics,
)

INPUT_SQUARE = ForwardStatistics._fields.index("square")
GRADIENT_SQUARE = Statistics._fields.index("gradient_square")
OF_ADAPTERS = slice(GRADIENT_SQUARE + 1, NUM_STATISTICS)
"""The columns of `Statistics` that are measured of live adapters."""

KERNEL_DEVICES = {"cuda"}
"""Where the Triton kernels run."""
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
KERNEL_MAX_WIDTH = 128
"""Features up to which a chunk stays on a multiprocessor."""


def measure_forward(chunking: Chunking, x: Tensor) -> Tensor:
    """float32[C, 5]: `ForwardStatistics` of an activation, by a kernel where one serves."""
    measured = _by_kernel(chunking, x)
    if measured is not None:
        return measured
    return forward_statistics(chunking, x.numel() // chunking.features, totals(x), squares(x))


def measure_gradient(chunking: Chunking, dy: Tensor) -> Tensor:
    """float32[C]: the sums of squares of a gradient."""
    measured = _by_kernel(chunking, dy)
    if measured is not None:
        return measured[:, INPUT_SQUARE]
    return sum_chunks(chunking, squares(dy)[None])[0]


def _by_kernel(chunking: Chunking, x: Tensor) -> Tensor | None:
    is_served = x.device.type in KERNEL_DEVICES and x.dtype in KERNEL_DTYPES and x.is_contiguous()
    if not is_served or chunking.widest > KERNEL_MAX_WIDTH or x.ndim < 2:
        return None
    return kernels.watch(x, chunking.chunks)


def forward_statistics(chunking: Chunking, rows: int, total: Tensor, square: Tensor) -> Tensor:
    """float32[C, 5]: `ForwardStatistics` from the sums of x and of x^2 of each feature, [D]."""
    columns = total.new_zeros((chunking.chunks, NUM_FORWARD_STATISTICS))
    if not rows:
        return columns
    sizes = torch.from_numpy(chunking.sizes).to(total.device, torch.float32, non_blocking=True)
    columns[:, ::3] = torch.stack([sizes * rows, sizes], dim=1)
    sums = sum_chunks(chunking, torch.stack([total, square, (square == 0).float()]))
    columns[:, 1:3] = sums[:2].T
    columns[:, 4] = sums[2]
    return columns


def all_statistics(forward: Tensor, gradient_square: Tensor) -> Tensor:
    """float32[C, 10]: `Statistics` where no adapter lives."""
    columns = forward.new_zeros((forward.shape[0], NUM_STATISTICS), dtype=torch.float32)
    columns[:, :NUM_FORWARD_STATISTICS] = forward
    columns[:, GRADIENT_SQUARE] = gradient_square
    return columns


def sum_chunks(chunking: Chunking, values: Tensor) -> Tensor:
    """float32[K, C]: [K, D] summed within the chunks."""
    if values.device.type == "cpu":  # NumPy sums so few numbers in a tenth of torch's time
        with np.errstate(over="ignore", invalid="ignore"):
            return torch.from_numpy(np.add.reduceat(values.numpy(), chunking.starts, axis=1))
    if chunking.is_even:
        return values.unflatten(1, (chunking.chunks, chunking.widest)).sum(2)
    head = chunking.num_wide * chunking.widest
    wide = values[:, :head].unflatten(1, (-1, chunking.widest)).sum(2)
    narrow = values[:, head:].unflatten(1, (-1, chunking.widest - 1)).sum(2)
    return torch.cat([wide, narrow], dim=1)


def squares(x: Tensor) -> Tensor:
    """float32[D]: the sums of x^2 over all axes but the last."""
    if x.ndim == 1:
        x = x[None]
    if x.device.type == "cpu":  # torch's norm over leading axes takes seven times as long there
        beside = x.movedim(-1, 1) if x.ndim > 2 else x
        if x.ndim > 2 and beside.is_contiguous():  # channels of images: the last axis is the pixels
            norms = torch.linalg.vector_norm(beside.flatten(2), dim=2, dtype=torch.float32)
            return norms.square().sum(0)
        return x.float().square().sum(_row_axes(x))
    return torch.linalg.vector_norm(x, dim=_row_axes(x), dtype=torch.float32).square()


def totals(x: Tensor) -> Tensor:
    """float32[D]: the sums of x over all axes but the last, in memory of their own."""
    if x.ndim == 1:
        x = x[None]
    return x.sum(_row_axes(x), dtype=torch.float32)


def _row_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def sum_squares(values: Tensor) -> Tensor:
    """float32[n]: the sum of squares of each row of [n, ...]."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float32).square()
