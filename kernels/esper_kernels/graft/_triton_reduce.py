"""Adding up what the splits of a backward pass leave, in a fixed order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import await_release, find_seed, is_finite, record


@triton.jit
def parts(left_ptr, CHUNKS, H: tl.constexpr):
    """Sums [S, C, 4] (dy^2, r^2, -dy r, not finite) and shares [S, C, ENTRIES] of S splits."""
    return left_ptr, left_ptr + tl.cast(CHUNKS, tl.int64) * (H.SPLITS * 4)


@triton.jit
def find_chunk(slot_ptr, slot, CHUNKS, BC: tl.constexpr):
    """The chunk that a slot serves, -1 for none."""
    chunk = tl.full([BC], -1, tl.int32)
    for first in range(0, CHUNKS, BC):
        chunks = first + tl.arange(0, BC)
        slots = tl.load(slot_ptr + chunks, mask=chunks < CHUNKS, other=-1)
        chunk = tl.where(slots == slot, chunks, chunk)
    return tl.max(chunk, axis=0)


@triton.jit
def add_up_statistics(
    sums_ptr, statistics_ptr, out_ptr, chunk, is_live, CHUNKS, BESIDE: tl.constexpr,
    H: tl.constexpr,
):  # fmt: skip
    """Store one chunk's row of backward statistics, `BESIDE` that of the forward ones."""
    splits = tl.arange(0, H.BS)
    rows = sums_ptr + (splits * CHUNKS + chunk) * 4
    is_split = splits < H.SPLITS
    squares = tl.load(rows, mask=is_split, other=0.0, cache_modifier=".cg")
    slope_square = tl.sum(squares, axis=0)
    out = out_ptr + chunk * 5
    if BESIDE:
        column = tl.arange(0, 8)
        row = tl.load(statistics_ptr + chunk * 5 + column, mask=column < 5)
        tl.store(out_ptr + chunk * 10 + column, row, mask=column < 5)
        out += chunk * 5 + 5
    tl.store(out, slope_square)
    if is_live:
        square, worth, flaw = _sum_sums(rows, is_split)
        is_sound = is_finite(square)
        is_input_finite = is_finite(tl.load(statistics_ptr + chunk * 5 + 2))
        is_error = is_finite(slope_square) & is_input_finite & ((flaw != 0) | (not is_sound))
        tl.store(out + 1, 1.0)
        tl.store(out + 2, tl.where(is_sound, square, 0.0))
        tl.store(out + 3, tl.where(is_sound, worth, 0.0))
        tl.store(out + 4, is_error.to(tl.float32))
    else:
        k = tl.arange(0, 4)
        tl.store(out + 1 + k, tl.zeros([4], tl.float32))


@triton.jit
def add_up_gradients(
    shares_ptr, sums_ptr, chunk, param_grad_scale, is_live, k, CHUNKS, H: tl.constexpr
):
    """Add up entries `k` of a chunk's gradients: 0 where nothing learns or something is broken."""
    splits = tl.arange(0, H.BS)
    total = tl.zeros([H.BK], tl.float32)
    if is_live & (param_grad_scale != 0):
        rows = sums_ptr + (splits * CHUNKS + chunk) * 4
        square, _, flaw = _sum_sums(rows, splits < H.SPLITS)
        if (flaw == 0) & is_finite(square):
            share = shares_ptr + chunk.to(tl.int64) * H.ENTRIES + k
            for _split in range(H.SPLITS):
                total += tl.load(share, mask=k < H.ENTRIES, other=0.0, cache_modifier=".cg")
                share += CHUNKS * H.ENTRIES
            total *= param_grad_scale
    return total


@triton.jit
def store_gradients(gradients, slot, k, total, H: tl.constexpr):
    """Store entries `k` of a share into the gradients of one slot."""
    base = tl.cast(slot, tl.int64) * H.SIZE
    tl.store(gradients.down + base + k, total, mask=k < H.SIZE)
    tl.store(gradients.up + base + k - H.SIZE, total, mask=(k >= H.SIZE) & (k < 2 * H.SIZE))
    if H.HAS_BIAS:
        is_bias = (k >= 2 * H.SIZE) & (k < 2 * H.SIZE + H.RANK)
        tl.store(gradients.bias + slot * H.RANK + k - 2 * H.SIZE, total, mask=is_bias)
    if H.IS_GATED:
        is_gate = (k >= H.ENTRIES - H.SIZE) & (k < H.ENTRIES)
        tl.store(gradients.gate + base + k - (H.ENTRIES - H.SIZE), total, mask=is_gate)


@triton.jit
def _sum_sums(rows, is_split):
    """Sums over the splits: r^2, -dy r, and 0 or NaN."""
    square = tl.sum(tl.load(rows + 1, mask=is_split, other=0.0, cache_modifier=".cg"), axis=0)
    worth = tl.sum(tl.load(rows + 2, mask=is_split, other=0.0, cache_modifier=".cg"), axis=0)
    flaw = tl.sum(tl.load(rows + 3, mask=is_split, other=0.0, cache_modifier=".cg"), axis=0)
    return square, worth, flaw


@triton.jit
def zero_unused(slot_ptr, gradients, program, SLOTS, CHUNKS, H: tl.constexpr):
    """Zero the gradients of slots that serve no chunk; the programs share them."""
    for slot in range(program, SLOTS, CHUNKS * H.SPLITS):
        if find_chunk(slot_ptr, slot, CHUNKS, H.BC) < 0:
            for first in range(0, H.ENTRIES, H.BK):
                k = first + tl.arange(0, H.BK)
                store_gradients(gradients, slot, k, tl.zeros([H.BK], tl.float32), H)


@triton.jit
def finish(
    sums_ptr, shares_ptr, arrivals_ptr, statistics_ptr, out_ptr, gradients, seed, chunk,
    SLOTS, CHUNKS, BESIDE: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Add up in the last program of a chunk to arrive, which sets its counter back to 0."""
    tl.debug_barrier()  # all threads have stored what this program leaves
    before = tl.atomic_add(arrivals_ptr + chunk, 1, sem="acq_rel", scope="gpu")
    if before == H.SPLITS - 1:
        tl.store(arrivals_ptr + chunk, 0)
        add_up_statistics(sums_ptr, statistics_ptr, out_ptr, chunk, seed.is_live, CHUNKS, BESIDE, H)
        if (seed.slot >= 0) & (seed.slot < SLOTS):
            for first in range(0, H.ENTRIES, H.BK):
                k = first + tl.arange(0, H.BK)
                scale = seed.param_grad_scale
                total = add_up_gradients(
                    shares_ptr, sums_ptr, chunk, scale, seed.is_live, k, CHUNKS, H
                )
                store_gradients(gradients, seed.slot, k, total, H)


@triton.jit
def reduce_kernel(
    left_ptr,
    statistics_ptr,
    slot_ptr,
    gains_ptr,
    d_down_ptr,
    d_up_ptr,
    d_bias_ptr,
    d_gate_ptr,
    out_ptr,
    SLOTS,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    CHAINED: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """The first C programs add up a chunk's statistics, the others part of a slot's gradients."""
    H: tl.constexpr = record("Share")(ENTRIES, SIZE, RANK, HAS_BIAS, IS_GATED, SPLITS, BK, BS, BC)
    program = tl.program_id(0)
    sums_ptr, shares_ptr = parts(left_ptr, CHUNKS, H)
    if program < CHUNKS:
        seed = find_seed(slot_ptr, gains_ptr, program, SLOTS)
        await_release(CHAINED)
        add_up_statistics(
            sums_ptr, statistics_ptr, out_ptr, program, seed.is_live, CHUNKS, BESIDE, H
        )
    else:
        PIECES: tl.constexpr = (ENTRIES + BK - 1) // BK
        slot = (program - CHUNKS) // PIECES
        piece = (program - CHUNKS) % PIECES
        chunk = find_chunk(slot_ptr, slot, CHUNKS, BC)
        await_release(CHAINED)
        k = piece * BK + tl.arange(0, BK)
        total = tl.zeros([BK], tl.float32)
        if chunk >= 0:
            seed = find_seed(slot_ptr, gains_ptr, chunk, SLOTS)
            scale = seed.param_grad_scale
            total = add_up_gradients(shares_ptr, sums_ptr, chunk, scale, scale != 0, k, CHUNKS, H)
        store_gradients(
            record("Bank")(d_down_ptr, d_up_ptr, d_bias_ptr, d_gate_ptr), slot, k, total, H
        )
