"""The forward pass: one read and one write of the activation, statistics on the way."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import (
    activate,
    await_release,
    blend,
    dot,
    find,
    fold,
    load_matrix,
    load_up,
    locate,
    narrow,
    release,
)


@triton.jit
def _graft_range(
    x_ptr,
    y_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    gate_ptr,
    slot,
    act,
    start,
    width,
    begin,
    does_act,
    N,
    D,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BULK: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y` of TILES tiles of one chunk, STEP rows apart; each feature's sums of x and of x^2."""
    dtype = x_ptr.dtype if BULK else x_ptr.dtype.element_ty
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BF)
    ranks = tl.arange(0, BR)
    is_real = cols < width
    stride = tl.cast(D, tl.int64) * STEP
    corner = begin.to(tl.int64) * D + start
    offsets = rows[:, None] * D + cols[None, :]
    total = tl.zeros([GROUP, BF], tl.float32)
    square = tl.zeros([GROUP, BF], tl.float32)
    if does_act:
        down = load_matrix(down_ptr, slot, width, cols, ranks, RANK, WIDTH, dtype)
        up = load_up(up_ptr, slot, width, cols, ranks, RANK, WIDTH, dtype)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + slot * RANK + ranks, mask=ranks < RANK, other=0.0)
            bias = narrow(bias, dtype).to(tl.float32)[None, :]
        if ACTIVATION == "gated":
            gate = load_matrix(gate_ptr, slot, width, cols, ranks, RANK, WIDTH, dtype)
        for tile in tl.range(0, TILES, num_stages=STAGES):
            at = corner + tile * stride
            inside = (begin + tile * STEP + rows < N)[:, None]
            if not ALL_COLS:  # a mask over columns would keep loads from being wide
                inside = inside & is_real[None, :]
            if BULK:
                u = x_ptr.load([begin + tile * STEP, start])
            elif ALL_ROWS and ALL_COLS:
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
            y = blend(u, r, act, float("inf"))
            if BULK:
                y_ptr.store([begin + tile * STEP, start], y)
            elif ALL_ROWS and ALL_COLS:
                tl.store(y_ptr + at + offsets, y)
            else:
                tl.store(y_ptr + at + offsets, y, mask=inside)
            wide = u.to(tl.float32)
            total += fold(wide, BM, GROUP, BF)
            square += fold(wide * wide, BM, GROUP, BF)
    else:
        for tile in tl.range(0, TILES, num_stages=STAGES):
            at = corner + tile * stride
            inside = (begin + tile * STEP + rows < N)[:, None]
            if not ALL_COLS:
                inside = inside & is_real[None, :]
            if BULK:
                u = x_ptr.load([begin + tile * STEP, start])
            elif ALL_ROWS and ALL_COLS:
                u = tl.load(x_ptr + at + offsets)
            else:
                u = tl.load(x_ptr + at + offsets, mask=inside, other=0.0)
            if not IN_PLACE:
                if BULK:
                    y_ptr.store([begin + tile * STEP, start], u)
                elif ALL_ROWS and ALL_COLS:
                    tl.store(y_ptr + at + offsets, u)
                else:
                    tl.store(y_ptr + at + offsets, u, mask=inside)
            wide = u.to(tl.float32)
            total += fold(wide, BM, GROUP, BF)
            square += fold(wide * wide, BM, GROUP, BF)
    return tl.sum(total, axis=0), tl.sum(square, axis=0)


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
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,  # of one split
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BULK: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one chunk, every SPLITS-th tile of rows, so that all work side by side."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    split = pid // CHUNKS
    slot, act, _, _, is_live = find(slot_ptr, gains_ptr, chunk, SLOTS)
    if IN_PLACE and not is_live:
        if SPLITS == 1:
            _store_nothing(watched_ptr, chunk)
        return
    start, width = locate(chunk, NARROW, NUM_WIDE)
    totals, squares = _graft_range(
        x_ptr,
        y_ptr,
        down_ptr,
        up_ptr,
        bias_ptr,
        gate_ptr,
        slot,
        act,
        start,
        width,
        split * BM,
        is_live & (act != 0),
        N,
        D,
        WIDTH,
        RANK,
        TILES,
        SPLITS * BM,
        BM,
        BF,
        BR,
        GROUP,
        STAGES,
        ACTIVATION,
        HAS_BIAS,
        IN_PLACE,
        BULK,
        ALL_ROWS,
        (NUM_WIDE == 0) and (BF == NARROW),
        PRECISION,
    )
    release(BULK)
    is_real = tl.arange(0, BF) < width
    if SPLITS == 1:
        _store_watched(watched_ptr, chunk, N, width, is_real, totals, squares)
    else:
        at = sums_ptr + split.to(tl.int64) * 2 * D + start + tl.arange(0, BF)
        tl.store(at, totals, mask=is_real)
        tl.store(at + D, squares, mask=is_real)


@triton.jit
def in_place_kernel(
    x_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    gate_ptr,
    slot_ptr,
    gains_ptr,
    sums_ptr,  # [S, 2, D], written for live chunks
    N,
    D,
    SLOTS,
    CHUNKS: tl.constexpr,
    BC: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,  # of one split
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The programs share the row ranges of the live chunks; nobody starts for a dormant one."""
    chunks = tl.arange(0, BC)
    inside = chunks < CHUNKS
    slots = tl.load(slot_ptr + chunks, mask=inside, other=-1)
    acts = tl.load(gains_ptr + chunks * 3, mask=inside, other=0.0)
    gain = acts != 0
    gain = gain | (tl.load(gains_ptr + chunks * 3 + 1, mask=inside, other=0.0) != 0)
    gain = gain | (tl.load(gains_ptr + chunks * 3 + 2, mask=inside, other=0.0) != 0)
    live = ((slots >= 0) & (slots < SLOTS) & gain).to(tl.int32)
    place = tl.cumsum(live, axis=0) * live
    num_live = tl.sum(live, axis=0)
    item = tl.program_id(0)
    release(BULK)
    while item < num_live * SPLITS:
        is_it = place == item % num_live + 1
        chunk = tl.sum(tl.where(is_it, chunks, 0), axis=0)
        slot = tl.sum(tl.where(is_it, slots, 0), axis=0)
        act = tl.sum(tl.where(is_it, acts, 0.0), axis=0)
        split = item // num_live
        start, width = locate(chunk, NARROW, NUM_WIDE)
        totals, squares = _graft_range(
            x_ptr,
            x_ptr,
            down_ptr,
            up_ptr,
            bias_ptr,
            gate_ptr,
            slot,
            act,
            start,
            width,
            split * BM,
            act != 0,
            N,
            D,
            WIDTH,
            RANK,
            TILES,
            SPLITS * BM,
            BM,
            BF,
            BR,
            GROUP,
            STAGES,
            ACTIVATION,
            HAS_BIAS,
            True,
            BULK,
            ALL_ROWS,
            (NUM_WIDE == 0) and (BF == NARROW),
            PRECISION,
        )
        is_real = tl.arange(0, BF) < width
        at = sums_ptr + split.to(tl.int64) * 2 * D + start + tl.arange(0, BF)
        tl.store(at, totals, mask=is_real)
        tl.store(at + D, squares, mask=is_real)
        item += PROGRAMS


@triton.jit
def _store_nothing(watched_ptr, chunk):
    k = tl.arange(0, 8)
    tl.store(watched_ptr + chunk * 5 + k, tl.zeros([8], tl.float32), mask=k < 5)


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
    BULK: tl.constexpr,
):
    """One program: one chunk's `watched` from the sums of all splits."""
    chunk = tl.program_id(0)
    _, _, _, _, is_live = find(slot_ptr, gains_ptr, chunk, SLOTS)
    if IN_PLACE and not is_live:
        _store_nothing(watched_ptr, chunk)
        return
    start, width = locate(chunk, NARROW, NUM_WIDE)
    cols = tl.arange(0, BF)
    splits = tl.arange(0, BS)
    inside = (splits < SPLITS)[:, None] & (cols < width)[None, :]
    await_release(BULK)
    at = sums_ptr + splits[:, None] * 2 * D + (start + cols)[None, :]
    totals = tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    squares = tl.sum(tl.load(at + D, mask=inside, other=0.0), axis=0)
    _store_watched(watched_ptr, chunk, N, width, cols < width, totals, squares)
