"""`watched` from the sums of a chunk's ranges of rows, always added in the same order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import await_release, locate


@triton.jit
def store_watched(watched_ptr, chunk, N, width, is_real, total, squares):
    """The row of a chunk from the sum of x and each feature's sum of x^2."""
    at = watched_ptr + chunk * 5
    tl.store(at, (N * width).to(tl.float32))
    tl.store(at + 1, total)
    tl.store(at + 2, tl.sum(squares, axis=0))
    tl.store(at + 3, width.to(tl.float32))
    tl.store(at + 4, tl.sum(((squares == 0) & is_real).to(tl.float32), axis=0))


@triton.jit
def leave_sums(sums_ptr, program, total, squares, BF: tl.constexpr, PAD: tl.constexpr):
    """A program's sums, `[programs, BF + PAD]`: of x^2 by feature, then of x."""
    at = sums_ptr + program.to(tl.int64) * (BF + PAD)
    tl.store(at + tl.arange(0, BF), squares)
    tl.store(at + BF, total)


@triton.jit
def add_up(
    sums_ptr,
    watched_ptr,
    chunk,
    first,
    stride,
    parts,
    N,
    width,
    BS: tl.constexpr,
    BF: tl.constexpr,
    PAD: tl.constexpr,
):
    """A chunk's row from what programs `first + k stride`, `k < parts`, left."""
    cols = tl.arange(0, BF)
    part = tl.arange(0, BS)
    is_part = part < parts
    at = sums_ptr + (first + part * stride).to(tl.int64) * (BF + PAD)
    inside = is_part[:, None] & (cols < width)[None, :]
    square = tl.load(at[:, None] + cols[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    total = tl.load(at + BF, mask=is_part, other=0.0, cache_modifier=".cg")
    squares = tl.sum(square, axis=0)
    store_watched(watched_ptr, chunk, N, width, cols < width, tl.sum(total, axis=0), squares)


@triton.jit
def finish(
    sums_ptr,
    watched_ptr,
    arrivals_ptr,
    chunk,
    first,
    stride,
    parts,
    N,
    width,
    BS: tl.constexpr,
    BF: tl.constexpr,
    PAD: tl.constexpr,
):
    """The last program of a chunk to arrive adds up; its counter is 0 again afterwards."""
    tl.debug_barrier()  # all threads have stored what this program leaves
    before = tl.atomic_add(arrivals_ptr + chunk, 1, sem="acq_rel", scope="gpu")
    if before == parts - 1:
        tl.store(arrivals_ptr + chunk, 0)
        add_up(sums_ptr, watched_ptr, chunk, first, stride, parts, N, width, BS, BF, PAD)


@triton.jit
def watch_kernel(
    sums_ptr,
    watched_ptr,
    N,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    BS: tl.constexpr,
    BF: tl.constexpr,
    PAD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program: one chunk's row, where no counters are at hand."""
    chunk = tl.program_id(0)
    _, width = locate(chunk, NARROW, NUM_WIDE)
    await_release(CHAINED)
    add_up(sums_ptr, watched_ptr, chunk, chunk, CHUNKS, SPLITS, N, width, BS, BF, PAD)
