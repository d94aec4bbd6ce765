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
    find_seed,
    fold,
    load_matrices,
    load_tile,
    narrow,
    record,
    release,
    start_walk,
    store_tile,
    tile_of,
    zero_padding,
)
from esper_kernels.graft._triton_statistics import finish, leave_sums, store_statistics


@triton.jit
def _act(x_ptr, y_ptr, bank, seed, walk, GROUP: tl.constexpr, S: tl.constexpr):
    """Write `y` where an adapter acts, and return sums of x and of x^2, `[GROUP, BF]` each."""
    dtype: tl.constexpr = x_ptr.dtype if S.BULK else x_ptr.dtype.element_ty
    total = tl.zeros([GROUP, S.BF], tl.float32)
    square = tl.zeros([GROUP, S.BF], tl.float32)
    matrices = load_matrices(bank, seed.slot, walk.width, dtype, S)
    for number in tl.range(0, S.TILES, num_stages=S.STAGES):
        tile = tile_of(walk, number, S)
        u = load_tile(x_ptr, tile, S)
        h = dot(u, matrices.down, S.PRECISION)
        if S.HAS_BIAS:
            h += matrices.bias
        if S.ACTIVATION == "gated":
            a = activate(dot(u, matrices.gate, S.PRECISION), "silu") * h
        else:
            a = activate(h, S.ACTIVATION)
        r = dot(narrow(zero_padding(a, S), dtype), matrices.up, S.PRECISION)
        store_tile(y_ptr, tile, blend(u, r, seed.output_scale, float("inf")), S)
        wide = u.to(tl.float32)
        total += fold(wide, GROUP, S)
        square += fold(wide * wide, GROUP, S)
    return total, square


@triton.jit
def _pass_on(x_ptr, y_ptr, walk, COPIES: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr):
    """Copy `x` to `y`, or only read it, and return the same sums."""
    total = tl.zeros([GROUP, S.BF], tl.float32)
    square = tl.zeros([GROUP, S.BF], tl.float32)
    for number in tl.range(0, S.TILES, num_stages=S.STAGES):
        tile = tile_of(walk, number, S)
        u = load_tile(x_ptr, tile, S)
        if COPIES:
            store_tile(y_ptr, tile, u, S)
        wide = u.to(tl.float32)
        total += fold(wide, GROUP, S)
        square += fold(wide * wide, GROUP, S)
    return total, square


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
    statistics_ptr,  # [C, 5]
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
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONLY_READS: tl.constexpr,  # no adapter acts and nothing is written
    BULK: tl.constexpr,
    CHAINED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,
    IS_COUNTED: tl.constexpr,  # whether the last program of a chunk adds up
):
    """Each program serves one chunk and every SPLITS-th tile of its rows, side by side."""
    await_release(CHAINED)
    S: tl.constexpr = record("Shape")(NARROW, NUM_WIDE, WIDTH, RANK, BM, BF, BR, SPLITS * BM, TILES,
        STAGES, ACTIVATION, HAS_BIAS, BULK, ALL_ROWS, PRECISION)  # fmt: skip
    program = tl.program_id(0)
    chunk = program % CHUNKS
    seed = find_seed(slot_ptr, gains_ptr, chunk, SLOTS)
    walk = start_walk(chunk, (program // CHUNKS) * BM, N, D, S)
    if seed.is_live & (seed.output_scale != 0):
        bank = record("Bank")(down_ptr, up_ptr, bias_ptr, gate_ptr)
        total, square = _act(x_ptr, y_ptr, bank, seed, walk, GROUP, S)
    else:
        total, square = _pass_on(x_ptr, y_ptr, walk, not ONLY_READS, GROUP, S)
    total, squares = tl.sum(tl.sum(total, axis=0), axis=0), tl.sum(square, axis=0)
    release(CHAINED)
    if SPLITS == 1:
        store_statistics(statistics_ptr, chunk, N, walk.width, total, squares, BF)
    else:
        leave_sums(sums_ptr, program, total, squares, BF)
        if IS_COUNTED:
            finish(
                sums_ptr, statistics_ptr, arrivals_ptr, chunk, CHUNKS, SPLITS, N, walk.width, BS, BF
            )
