"""Adding up what the splits of a backward pass leave, in a fixed order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import GAINS, await_release, find, is_finite


@triton.jit
def parts_of(left_ptr, CHUNKS, SPLITS: tl.constexpr):
    """Sums [S, C, 4] (dy^2, r^2, -dy r, not finite) and shares [S, C, K] of S splits.

    A share is down [F, R], up [R, F], bias [R], gate [F, R].
    """
    return left_ptr, left_ptr + tl.cast(CHUNKS, tl.int64) * (SPLITS * 4)


@triton.jit
def find_chunk(slot_ptr, slot, CHUNKS, BC: tl.constexpr):
    """The chunk that a slot serves, -1 for none."""
    found = tl.full([BC], -1, tl.int32)
    for first in range(0, CHUNKS, BC):
        chunks = first + tl.arange(0, BC)
        slots = tl.load(slot_ptr + chunks, mask=chunks < CHUNKS, other=-1)
        found = tl.where(slots == slot, chunks, found)
    return tl.max(found, axis=0)


@triton.jit
def add_up_channels(
    sums_ptr,
    watched_ptr,
    channels_ptr,
    chunk,
    is_live,
    CHUNKS,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """One chunk's row of `channels` from the splits' sums, `BESIDE` that of `watched`."""
    splits = tl.arange(0, BS)
    sums_at = sums_ptr + (splits * CHUNKS + chunk) * 4
    is_split = splits < SPLITS
    squares = tl.load(sums_at, mask=is_split, other=0.0, cache_modifier=".cg")
    slope_square = tl.sum(squares, axis=0)
    out = channels_ptr + chunk * 5
    if BESIDE:
        column = tl.arange(0, 8)
        row = tl.load(watched_ptr + chunk * 5 + column, mask=column < 5)
        tl.store(channels_ptr + chunk * 10 + column, row, mask=column < 5)
        out += chunk * 5 + 5
    tl.store(out, slope_square)
    if is_live:
        square, worth, broken = _sum_sums(sums_at, is_split)
        is_sound = is_finite(square)
        is_fed = is_finite(slope_square) & is_finite(tl.load(watched_ptr + chunk * 5 + 2))
        is_error = is_fed & ((broken != 0) | (not is_sound))
        tl.store(out + 1, 1.0)
        tl.store(out + 2, tl.where(is_sound, square, 0.0))
        tl.store(out + 3, tl.where(is_sound, worth, 0.0))
        tl.store(out + 4, is_error.to(tl.float32))
    else:
        k = tl.arange(0, 4)
        tl.store(out + 1 + k, tl.zeros([4], tl.float32))


@triton.jit
def add_up_gradients(
    shares_ptr,
    sums_ptr,
    chunk,
    learn,
    is_live,
    k,
    CHUNKS,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
):
    """Entries `k` of a chunk's share, over the splits in order; zeros where none is learned."""
    splits = tl.arange(0, BS)
    total = tl.zeros([BK], tl.float32)
    if is_live & (learn != 0):
        square, _, broken = _sum_sums(sums_ptr + (splits * CHUNKS + chunk) * 4, splits < SPLITS)
        if (broken == 0) & is_finite(square):
            share = shares_ptr + chunk.to(tl.int64) * K + k
            for _split in range(SPLITS):
                total += tl.load(share, mask=k < K, other=0.0, cache_modifier=".cg")
                share += CHUNKS * K
            total *= learn
    return total


@triton.jit
def store_gradients(
    d_down_ptr,
    d_up_ptr,
    d_bias_ptr,
    d_gate_ptr,
    slot,
    k,
    total,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """Entries `k` of a share into the gradients of one slot."""
    base = tl.cast(slot, tl.int64) * SIZE
    tl.store(d_down_ptr + base + k, total, mask=k < SIZE)
    tl.store(d_up_ptr + base + k - SIZE, total, mask=(k >= SIZE) & (k < 2 * SIZE))
    if HAS_BIAS:
        is_bias = (k >= 2 * SIZE) & (k < 2 * SIZE + RANK)
        tl.store(d_bias_ptr + slot * RANK + k - 2 * SIZE, total, mask=is_bias)
    if IS_GATED:
        is_gate = (k >= K - SIZE) & (k < K)
        tl.store(d_gate_ptr + base + k - (K - SIZE), total, mask=is_gate)


@triton.jit
def _sum_sums(at, is_real):
    """Sums over the splits: r^2, -dy r, and 0 or NaN."""
    square = tl.sum(tl.load(at + 1, mask=is_real, other=0.0, cache_modifier=".cg"), axis=0)
    worth = tl.sum(tl.load(at + 2, mask=is_real, other=0.0, cache_modifier=".cg"), axis=0)
    broken = tl.sum(tl.load(at + 3, mask=is_real, other=0.0, cache_modifier=".cg"), axis=0)
    return square, worth, broken


@triton.jit
def reduce_kernel(
    left_ptr,
    watched_ptr,
    slot_ptr,
    gains_ptr,
    d_down_ptr,
    d_up_ptr,
    d_bias_ptr,
    d_gate_ptr,
    channels_ptr,
    SLOTS,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,  # F * R
    RANK: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """The first C programs: one chunk's channels. The others: a piece of one slot's gradients."""
    pid = tl.program_id(0)
    sums_ptr, shares_ptr = parts_of(left_ptr, CHUNKS, SPLITS)
    if pid < CHUNKS:
        _, _, _, _, _, is_live = find(slot_ptr, gains_ptr, pid, SLOTS)
        await_release(CHAINED)
        add_up_channels(
            sums_ptr, watched_ptr, channels_ptr, pid, is_live, CHUNKS, SPLITS, BS, BESIDE
        )
    else:
        PIECES: tl.constexpr = (K + BK - 1) // BK
        slot = (pid - CHUNKS) // PIECES
        piece = (pid - CHUNKS) % PIECES
        chunk = find_chunk(slot_ptr, slot, CHUNKS, BC)
        await_release(CHAINED)
        k = piece * BK + tl.arange(0, BK)
        total = tl.zeros([BK], tl.float32)
        if chunk >= 0:
            learn = tl.load(gains_ptr + chunk * GAINS + 1)
            total = add_up_gradients(
                shares_ptr, sums_ptr, chunk, learn, learn != 0, k, CHUNKS, SPLITS, K, BK, BS
            )
        store_gradients(
            d_down_ptr,
            d_up_ptr,
            d_bias_ptr,
            d_gate_ptr,
            slot,
            k,
            total,
            K,
            SIZE,
            RANK,
            HAS_BIAS,
            IS_GATED,
        )
