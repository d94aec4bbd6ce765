"""Forward statistics from the sums of a chunk's ranges of rows, always added in the same order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import await_release, locate

PAD = 32
"""Floats behind the sums of squares by feature; the first is the sum of values."""
_PAD = tl.constexpr(PAD)


@triton.jit
def store_statistics(statistics_ptr, chunk, N, width, total, squares, BF: tl.constexpr):
    """Store the row of a chunk from the sum of x and each feature's sum of x^2."""
    is_column = tl.arange(0, BF) < width
    row = statistics_ptr + chunk * 5
    tl.store(row, (N * width).to(tl.float32))
    tl.store(row + 1, total)
    tl.store(row + 2, tl.sum(squares, axis=0))
    tl.store(row + 3, width.to(tl.float32))
    tl.store(row + 4, tl.sum(((squares == 0) & is_column).to(tl.float32), axis=0))


@triton.jit
def leave_sums(sums_ptr, program, total, squares, BF: tl.constexpr):
    """Store a program's sums, `[programs, BF + PAD]`: of x^2 by feature, then of x."""
    row = sums_ptr + program.to(tl.int64) * (BF + _PAD)
    tl.store(row + tl.arange(0, BF), squares)
    tl.store(row + BF, total)


@triton.jit
def add_up(
    sums_ptr,
    statistics_ptr,
    chunk,
    CHUNKS,
    SPLITS: tl.constexpr,
    N,
    width,
    BS: tl.constexpr,
    BF: tl.constexpr,
):
    """Store a chunk's row from what its programs left."""
    cols = tl.arange(0, BF)
    split = tl.arange(0, BS)
    is_split = split < SPLITS
    rows = sums_ptr + (chunk + split * CHUNKS).to(tl.int64) * (BF + _PAD)
    inside = is_split[:, None] & (cols < width)[None, :]
    square = tl.load(rows[:, None] + cols[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    total = tl.load(rows + BF, mask=is_split, other=0.0, cache_modifier=".cg")
    squares, total = tl.sum(square, axis=0), tl.sum(total, axis=0)
    store_statistics(statistics_ptr, chunk, N, width, total, squares, BF)


@triton.jit
def finish(
    sums_ptr,
    statistics_ptr,
    arrivals_ptr,
    chunk,
    CHUNKS,
    SPLITS: tl.constexpr,
    N,
    width,
    BS: tl.constexpr,
    BF: tl.constexpr,
):
    """Add up in the last program of a chunk to arrive, which sets its counter back to 0."""
    tl.debug_barrier()  # all threads have stored what this program leaves
    before = tl.atomic_add(arrivals_ptr + chunk, 1, sem="acq_rel", scope="gpu")
    if before == SPLITS - 1:
        tl.store(arrivals_ptr + chunk, 0)
        add_up(sums_ptr, statistics_ptr, chunk, CHUNKS, SPLITS, N, width, BS, BF)


@triton.jit
def statistics_kernel(
    sums_ptr,
    statistics_ptr,
    N,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    BS: tl.constexpr,
    BF: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Each program adds up one chunk's row, where there are no counters."""
    chunk = tl.program_id(0)
    _, width = locate(chunk, NARROW, NUM_WIDE)
    await_release(CHAINED)
    add_up(sums_ptr, statistics_ptr, chunk, CHUNKS, SPLITS, N, width, BS, BF)
