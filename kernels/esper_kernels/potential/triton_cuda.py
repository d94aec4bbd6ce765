"""`potential` in Triton: `x` and `dy` read once, nothing of size N written."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.graft._triton_parts import IS_INTERPRETED, dot, locate
from esper_kernels.potential import reference_torch
from esper_kernels.potential._case import PotentialCase

MAX_WIDTH = 128
_PROGRAMS = 4 * 132


def refuses(case: PotentialCase) -> str | None:
    """Why Triton cannot serve a case, None if it can."""
    if case.device == "cpu" and not IS_INTERPRETED:
        return (
            "x is on the CPU; Triton needs a CUDA device (TRITON_INTERPRET=1 interprets, for tests)"
        )
    if case.width > MAX_WIDTH:
        return f"a chunk is {case.width} wide; at most {MAX_WIDTH} stay on a multiprocessor"
    return None


@triton.jit
def _product_kernel(
    x_ptr,
    dy_ptr,
    is_asked_ptr,
    shares_ptr,  # [S, C, BF, BF]
    N,
    D,
    CHUNKS,
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one chunk, one range of rows."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    split = pid // CHUNKS
    if tl.load(is_asked_ptr + chunk) == 0:
        return
    start, width = locate(chunk, NARROW, NUM_WIDE)
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BF)
    begin = split * (TILES * BM)
    stride = tl.cast(D, tl.int64) * BM
    corner = begin.to(tl.int64) * D + start
    offsets = rows[:, None] * D + cols[None, :]
    product = tl.zeros([BF, BF], tl.float32)
    for tile in tl.range(0, TILES, num_stages=3):
        at = corner + tile * stride
        inside = (begin + tile * BM + rows < N)[:, None]
        if NUM_WIDE > 0 or BF != NARROW:
            inside = inside & (cols < width)[None, :]
        u = tl.load(x_ptr + at + offsets, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at + offsets, mask=inside, other=0.0)
        product += dot(tl.trans(u), dy, PRECISION)
    share = shares_ptr + (split * CHUNKS + chunk).to(tl.int64) * (BF * BF)
    tl.store(share + cols[:, None] * BF + cols[None, :], product)


@triton.jit
def _size_kernel(
    shares_ptr,
    is_asked_ptr,
    sizes_ptr,
    CHUNKS,
    SPLITS: tl.constexpr,
    AREA: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: one chunk."""
    chunk = tl.program_id(0)
    size = tl.zeros([BK], tl.float32)
    if tl.load(is_asked_ptr + chunk) != 0:
        for first in range(0, AREA, BK):
            at = shares_ptr + chunk.to(tl.int64) * AREA + first + tl.arange(0, BK)
            total = tl.zeros([BK], tl.float32)
            for _split in range(SPLITS):
                total += tl.load(at)
                at += tl.cast(CHUNKS, tl.int64) * AREA
            size += total * total
    tl.store(sizes_ptr + chunk, tl.sum(size, axis=0))


def potential(case: PotentialCase, x: Tensor, dy: Tensor, is_asked: Tensor) -> Tensor:
    """[C]: the squared size of `x^T dy`."""
    if case.rows == 0:
        return reference_torch.potential(case, x, dy, is_asked)
    width = max(16, triton.next_power_of_2(case.width))
    rows = 64 if case.dtype == "bfloat16" else 32
    num_tiles = triton.cdiv(case.rows, rows)
    splits = max(1, min(_PROGRAMS // case.chunks, num_tiles, 16))
    shares = x.new_empty((splits, case.chunks, width, width), dtype=torch.float32)
    sizes = x.new_empty((case.chunks,), dtype=torch.float32)
    _product_kernel[(case.chunks * splits,)](
        x,
        dy,
        is_asked,
        shares,
        case.rows,
        case.features,
        case.chunks,
        NARROW=case.features // case.chunks,
        NUM_WIDE=case.num_wide,
        TILES=triton.cdiv(num_tiles, splits),
        BM=rows,
        BF=width,
        PRECISION="ieee" if case.dtype == "float32" else "tf32",
        num_warps=4 if width <= 64 else 8,
    )
    _size_kernel[(case.chunks,)](
        shares, is_asked, sizes, case.chunks, SPLITS=splits, AREA=width * width, BK=256
    )
    return sizes
