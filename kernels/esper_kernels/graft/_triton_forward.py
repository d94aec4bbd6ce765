"""The forward pass: one read and one write of the activation, statistics on the way."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import (
    activate,
    blend,
    dot,
    find,
    fold,
    load_adapter,
    load_tile,
    locate,
    narrow,
    release,
    store_tile,
)
from esper_kernels.graft._triton_watch import (
    finish,
    leave_sums,
    store_watched,
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
    TILES,
    STEP,
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
    """`y` of TILES tiles of one chunk, STEP rows apart; the sum of x, each feature's of x^2."""
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
        down, up, bias, gate = load_adapter(
            down_ptr,
            up_ptr,
            bias_ptr,
            gate_ptr,
            slot,
            width,
            cols,
            ranks,
            RANK,
            WIDTH,
            HAS_BIAS,
            ACTIVATION,
            dtype,
        )
        for tile in tl.range(0, TILES, num_stages=STAGES):
            row = begin + tile * STEP
            at = corner + tile * stride + offsets
            is_row = row + rows < N
            u = load_tile(x_ptr, row, start, at, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
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
            store_tile(y_ptr, row, start, at, y, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
            wide = u.to(tl.float32)
            total += fold(wide, BM, GROUP, BF)
            square += fold(wide * wide, BM, GROUP, BF)
    else:
        for tile in tl.range(0, TILES, num_stages=STAGES):
            row = begin + tile * STEP
            at = corner + tile * stride + offsets
            is_row = row + rows < N
            u = load_tile(x_ptr, row, start, at, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
            if not IN_PLACE:
                store_tile(y_ptr, row, start, at, u, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
            wide = u.to(tl.float32)
            total += fold(wide, BM, GROUP, BF)
            square += fold(wide * wide, BM, GROUP, BF)
    return tl.sum(tl.sum(total, axis=0), axis=0), tl.sum(square, axis=0)


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
    sums_ptr,  # [programs, BF + PAD]
    watched_ptr,  # [C, 5]
    arrivals_ptr,  # [C], zeros before and after
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
    IN_PLACE: tl.constexpr,  # only measured: no adapter acts and nothing is written
    BULK: tl.constexpr,
    CHAINED: tl.constexpr,  # whether a second kernel adds up, and waits for this one
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,
    PAD: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    """One program: one chunk, every SPLITS-th tile of rows, so that all work side by side."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    split = pid // CHUNKS
    slot, act, _, _, _, is_live = find(slot_ptr, gains_ptr, chunk, SLOTS)
    start, width = locate(chunk, NARROW, NUM_WIDE)
    total, squares = _graft_range(
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
    release(CHAINED)
    if SPLITS == 1:
        is_real = tl.arange(0, BF) < width
        store_watched(watched_ptr, chunk, N, width, is_real, total, squares)
    else:
        leave_sums(sums_ptr, pid, total, squares, BF, PAD)
        if IS_COUNTED:
            finish(
                sums_ptr,
                watched_ptr,
                arrivals_ptr,
                chunk,
                chunk,
                CHUNKS,
                SPLITS,
                N,
                width,
                BS,
                BF,
                PAD,
            )
