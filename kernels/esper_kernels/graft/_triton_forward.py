"""The forward pass: one read and one write of the activation, statistics on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import (
    activate,
    dot,
    find,
    fold,
    is_finite,
    load_matrix,
    load_up,
    locate,
    narrow,
)


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    gate_ptr,
    slot_ptr,
    gains_ptr,
    sums_ptr,  # [S, 2, D]
    watched_ptr,  # [C, 5], written here when there is one split
    N,
    D,
    CHUNKS,
    SLOTS,
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    TILES: tl.constexpr,  # of one split
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one chunk, one range of rows."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    split = pid // CHUNKS
    slot, act, _, _, is_live = find(slot_ptr, gains_ptr, chunk, SLOTS)
    if IN_PLACE and not is_live:
        if ONE_SPLIT:
            k = tl.arange(0, 8)
            tl.store(watched_ptr + chunk * 5 + k, tl.zeros([8], tl.float32), mask=k < 5)
        return

    start, width = locate(chunk, NARROW, NUM_WIDE)
    dtype = x_ptr.dtype.element_ty
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BF)
    ranks = tl.arange(0, BR)
    IS_FULL: tl.constexpr = ALL_ROWS and (NUM_WIDE == 0) and (BF == NARROW)
    is_real = cols < width
    begin = split * (TILES * BM)
    stride = tl.cast(D, tl.int64) * BM
    corner = begin.to(tl.int64) * D + start
    offsets = rows[:, None] * D + cols[None, :]
    total = tl.zeros([GROUP, BF], tl.float32)
    square = tl.zeros([GROUP, BF], tl.float32)

    if is_live & (act != 0):
        down = load_matrix(down_ptr, slot, width, cols, ranks, RANK, WIDTH, dtype)
        up = load_up(up_ptr, slot, width, cols, ranks, RANK, WIDTH, dtype)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + slot * RANK + ranks, mask=ranks < RANK, other=0.0)
            bias = narrow(bias, dtype).to(tl.float32)[None, :]
        if ACTIVATION == "gated":
            gate = load_matrix(gate_ptr, slot, width, cols, ranks, RANK, WIDTH, dtype)
        for tile in tl.range(0, TILES, num_stages=STAGES):
            at = corner + tile * stride
            is_row = begin + tile * BM + rows < N
            inside = is_row[:, None] & is_real[None, :]
            if IS_FULL:
                u = tl.load(x_ptr + at + offsets)
            else:
                u = tl.load(x_ptr + at + offsets, mask=inside, other=0.0)
            h = dot(u, down, PRECISION)
            if HAS_BIAS:
                h += bias
            if ACTIVATION == "gated":
                a = activate(dot(u, gate, PRECISION), "silu") * h
            else:
                a = activate(h, ACTIVATION)
            if BR != RANK:
                a = tl.where(ranks[None, :] < RANK, a, 0.0)
            r = dot(narrow(a, dtype), up, PRECISION)
            wide = u.to(tl.float32)
            y = tl.where(is_finite(r), narrow(wide + act * r, dtype), u)
            if IS_FULL:
                tl.store(y_ptr + at + offsets, y)
            else:
                tl.store(y_ptr + at + offsets, y, mask=inside)
            total += fold(wide, BM, GROUP, BF)
            square += fold(wide * wide, BM, GROUP, BF)
    else:
        for tile in tl.range(0, TILES, num_stages=STAGES):
            at = corner + tile * stride
            is_row = begin + tile * BM + rows < N
            inside = is_row[:, None] & is_real[None, :]
            if IS_FULL:
                u = tl.load(x_ptr + at + offsets)
            else:
                u = tl.load(x_ptr + at + offsets, mask=inside, other=0.0)
            if not IN_PLACE:
                if IS_FULL:
                    tl.store(y_ptr + at + offsets, u)
                else:
                    tl.store(y_ptr + at + offsets, u, mask=inside)
            wide = u.to(tl.float32)
            total += fold(wide, BM, GROUP, BF)
            square += fold(wide * wide, BM, GROUP, BF)

    totals = tl.sum(total, axis=0)
    squares = tl.sum(square, axis=0)
    if ONE_SPLIT:
        _store_watched(watched_ptr, chunk, N, width, is_real, totals, squares)
    else:
        at = sums_ptr + split.to(tl.int64) * 2 * D + start + cols
        tl.store(at, totals, mask=is_real)
        tl.store(at + D, squares, mask=is_real)


@triton.jit
def _store_watched(watched_ptr, chunk, N, width, is_real, totals, squares):
    at = watched_ptr + chunk * 5
    tl.store(at, (N * width).to(tl.float32))
    tl.store(at + 1, tl.sum(totals, axis=0))
    tl.store(at + 2, tl.sum(squares, axis=0))
    tl.store(at + 3, width.to(tl.float32))
    tl.store(at + 4, tl.sum(((squares == 0) & is_real).to(tl.float32), axis=0))


@triton.jit
def watch_kernel(
    sums_ptr,
    watched_ptr,
    slot_ptr,
    gains_ptr,
    N,
    D,
    SLOTS,
    SPLITS: tl.constexpr,
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    BS: tl.constexpr,
    BF: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """One program: one chunk's `watched` from the sums of all splits."""
    chunk = tl.program_id(0)
    _, _, _, _, is_live = find(slot_ptr, gains_ptr, chunk, SLOTS)
    if IN_PLACE and not is_live:
        k = tl.arange(0, 8)
        tl.store(watched_ptr + chunk * 5 + k, tl.zeros([8], tl.float32), mask=k < 5)
        return
    start, width = locate(chunk, NARROW, NUM_WIDE)
    cols = tl.arange(0, BF)
    splits = tl.arange(0, BS)
    inside = (splits < SPLITS)[:, None] & (cols < width)[None, :]
    at = sums_ptr + splits[:, None] * 2 * D + (start + cols)[None, :]
    totals = tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    squares = tl.sum(tl.load(at + D, mask=inside, other=0.0), axis=0)
    _store_watched(watched_ptr, chunk, N, width, cols < width, totals, squares)
