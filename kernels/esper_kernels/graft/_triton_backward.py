"""The backward pass: `x` and `dy` read once, `dx` written once, the adapter recomputed."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import (
    activate_with_slope,
    blend,
    dot,
    find,
    load_adapter,
    load_tile,
    locate,
    narrow,
    release,
    store_tile,
)
from esper_kernels.graft._triton_reduce import (
    add_up_channels,
    add_up_gradients,
    find_chunk,
    parts_of,
    store_gradients,
)


@triton.jit
def _pull_range(
    x_ptr,
    dy_ptr,
    dx_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    gate_ptr,
    shares_ptr,
    sums_at,
    slot,
    chunk,
    split,
    feel,
    damping,
    start,
    width,
    N,
    D,
    CHUNKS,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK: tl.constexpr,
    CHAINED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    DAMPED: tl.constexpr,
):
    """One split of one live chunk: writes `dx`, leaves a share of the gradients and all sums but
    that of dy^2, which it returns by row. `DAMPED` adapters descend `dy + damping r`; none is felt.
    """
    dtype = x_ptr.dtype if BULK else x_ptr.dtype.element_ty
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BF)
    ranks = tl.arange(0, BR)
    is_real = cols < width
    begin = split * BM
    STEP: tl.constexpr = SPLITS * BM
    stride = tl.cast(D, tl.int64) * STEP
    corner = begin.to(tl.int64) * D + start
    offsets = rows[:, None] * D + cols[None, :]
    slope_square = tl.zeros([BM], tl.float32)
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
    d_down = tl.zeros([BF, BR], tl.float32)
    d_up = tl.zeros([BF, BR], tl.float32)  # transposed: 64 rows fill a warp group's product
    d_gate = tl.zeros([BF, BR], tl.float32)
    if HAS_BIAS:
        d_bias = tl.zeros([BM // 16, 8, BR], tl.float32)
    output_square = tl.zeros([BM], tl.float32)
    worth = tl.zeros([BM], tl.float32)
    limit = tl.where(feel != 0, float("inf"), 0.0)  # beyond it d_u is not felt
    blight = tl.zeros([BM], tl.float32)  # 0, or NaN once something was not finite
    for tile in tl.range(0, TILES, num_stages=STAGES):
        row = begin + tile * STEP
        at = corner + tile * stride + offsets
        is_row = row + rows < N
        u = load_tile(x_ptr, row, start, at, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
        dy = load_tile(dy_ptr, row, start, at, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
        h = dot(u, down, PRECISION)
        if not DAMPED:
            slope_a = dot(dy, tl.trans(up), PRECISION)
        if HAS_BIAS:
            h += bias
        if ACTIVATION == "gated":
            a_slope, g_slope = activate_with_slope(dot(u, gate, PRECISION), "silu")
            a = a_slope * h
        else:
            a, a_slope = activate_with_slope(h, ACTIVATION)
        if BR != RANK:
            a = tl.where(ranks[None, :] < RANK, a, 0.0)
        if not ALL_ROWS:
            # Rows beyond the batch hold phi(bias), which is no output.
            a = tl.where(is_row[:, None], a, 0.0)
        if DAMPED:
            a = narrow(a, dtype)
            r = dot(a, up, PRECISION)
            wide = dy.to(tl.float32)
            worth -= tl.sum(wide * r, axis=1)
            slope = narrow(wide + damping * r, dtype)
            slope_a = dot(slope, tl.trans(up), PRECISION)
        else:
            worth -= tl.sum(slope_a * a, axis=1)
            slope = dy
        slope_h = slope_a * a_slope
        if BR != RANK:
            slope_h = tl.where(ranks[None, :] < RANK, slope_h, 0.0)
        d_h = narrow(slope_h, dtype)
        if not DAMPED:
            a = narrow(a, dtype)
            r = dot(a, up, PRECISION)
        output_square += tl.sum(r * r, axis=1)
        d_up += dot(tl.trans(slope), a, PRECISION)
        d_down += dot(tl.trans(u), d_h, PRECISION)
        if HAS_BIAS:
            # A thread of a matrix product holds rows 8 apart: this sum stays within it.
            d_bias += tl.sum(tl.reshape(slope_h, [BM // 16, 2, 8, BR]), axis=1)
        d_u = dot(d_h, tl.trans(down), PRECISION)
        if ACTIVATION == "gated":
            slope_z = slope_a * h * g_slope
            if BR != RANK:
                slope_z = tl.where(ranks[None, :] < RANK, slope_z, 0.0)
            d_z = narrow(slope_z, dtype)
            d_gate += dot(tl.trans(u), d_z, PRECISION)
            d_u += dot(d_z, tl.trans(gate), PRECISION)
        wide = dy.to(tl.float32)
        slope_square += tl.sum(wide * wide, axis=1)
        blight += tl.sum(d_u * 0.0, axis=1)
        dx = blend(dy, d_u, feel, limit)
        store_tile(dx_ptr, row, start, at, dx, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
    release(CHAINED)
    share = shares_ptr + (split * CHUNKS + chunk).to(tl.int64) * K
    is_share = (cols[:, None] < WIDTH) & (ranks[None, :] < RANK)
    by_row = share + cols[:, None] * RANK + ranks[None, :]
    by_rank = share + WIDTH * RANK + ranks[None, :] * WIDTH + cols[:, None]
    tl.store(by_row, d_down, mask=is_share)
    tl.store(by_rank, d_up, mask=is_share)
    broken = tl.sum(blight, axis=0)
    broken += tl.sum(tl.sum(d_down * 0.0 + d_up * 0.0, axis=1), axis=0)
    if HAS_BIAS:
        of_ranks = tl.sum(tl.sum(d_bias, axis=1), axis=0)
        tl.store(share + 2 * WIDTH * RANK + ranks, of_ranks, mask=ranks < RANK)
        broken += tl.sum(of_ranks * 0.0, axis=0)
    if ACTIVATION == "gated":
        tl.store(by_row + K - WIDTH * RANK, d_gate, mask=is_share)
        broken += tl.sum(tl.sum(d_gate * 0.0, axis=1), axis=0)
    tl.store(sums_at + 1, tl.sum(output_square, axis=0))
    tl.store(sums_at + 2, tl.sum(worth, axis=0))
    tl.store(sums_at + 3, broken)
    return slope_square


@triton.jit
def backward_kernel(
    x_ptr,
    dy_ptr,
    dx_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    gate_ptr,
    slot_ptr,
    gains_ptr,
    left_ptr,  # what every split leaves: see `parts_of`
    watched_ptr,
    d_down_ptr,
    d_up_ptr,
    d_bias_ptr,
    d_gate_ptr,
    channels_ptr,
    arrivals_ptr,  # [C], zeros before and after
    N,
    D,
    CHUNKS,
    SLOTS,
    K: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    IS_COUNTED: tl.constexpr,  # whether the last program of a chunk adds up
    BESIDE: tl.constexpr,  # whether `channels` have `watched` before them
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,  # of one split
    BM: tl.constexpr,
    BF: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK: tl.constexpr,
    OPENS: tl.constexpr,  # whether activations are arrays, whose tiles are described here
    CHAINED: tl.constexpr,  # whether a second kernel adds up, and waits for this one
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one chunk, every SPLITS-th tile of rows."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    split = pid // CHUNKS
    slot, _, learn, feel, damping, is_live = find(slot_ptr, gains_ptr, chunk, SLOTS)
    start, width = locate(chunk, NARROW, NUM_WIDE)
    if OPENS:
        x_ptr = tl.make_tensor_descriptor(x_ptr, [N, D], [D, 1], [BM, BF])
        dy_ptr = tl.make_tensor_descriptor(dy_ptr, [N, D], [D, 1], [BM, BF])
        dx_ptr = tl.make_tensor_descriptor(dx_ptr, [N, D], [D, 1], [BM, BF])
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BF)
    ALL_COLS: tl.constexpr = (NUM_WIDE == 0) and (BF == NARROW)
    is_real = cols < width
    begin = split * BM
    STEP: tl.constexpr = SPLITS * BM
    stride = tl.cast(D, tl.int64) * STEP
    corner = begin.to(tl.int64) * D + start
    offsets = rows[:, None] * D + cols[None, :]
    sums_ptr, shares_ptr = parts_of(left_ptr, CHUNKS, SPLITS)
    sums_at = sums_ptr + (split * CHUNKS + chunk) * 4
    slope_square = tl.zeros([BM], tl.float32)

    if is_live & (damping != 0) & (feel == 0):
        slope_square = _pull_range(
            x_ptr,
            dy_ptr,
            dx_ptr,
            down_ptr,
            up_ptr,
            bias_ptr,
            gate_ptr,
            shares_ptr,
            sums_at,
            slot,
            chunk,
            split,
            feel,
            damping,
            start,
            width,
            N,
            D,
            CHUNKS,
            K,
            WIDTH,
            RANK,
            SPLITS,
            TILES,
            BM,
            BF,
            BR,
            1,  # a damped chunk is not to cost the others registers or shared memory
            ACTIVATION,
            HAS_BIAS,
            BULK,
            CHAINED,
            ALL_ROWS,
            ALL_COLS,
            PRECISION,
            DAMPED=True,
        )
    elif is_live:
        slope_square = _pull_range(
            x_ptr,
            dy_ptr,
            dx_ptr,
            down_ptr,
            up_ptr,
            bias_ptr,
            gate_ptr,
            shares_ptr,
            sums_at,
            slot,
            chunk,
            split,
            feel,
            damping,
            start,
            width,
            N,
            D,
            CHUNKS,
            K,
            WIDTH,
            RANK,
            SPLITS,
            TILES,
            BM,
            BF,
            BR,
            STAGES,
            ACTIVATION,
            HAS_BIAS,
            BULK,
            CHAINED,
            ALL_ROWS,
            ALL_COLS,
            PRECISION,
            DAMPED=False,
        )
    else:
        for tile in tl.range(0, TILES, num_stages=STAGES):
            row = begin + tile * STEP
            at = corner + tile * stride + offsets
            is_row = row + rows < N
            dy = load_tile(dy_ptr, row, start, at, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
            store_tile(dx_ptr, row, start, at, dy, is_row, is_real, BULK, ALL_ROWS, ALL_COLS)
            wide = dy.to(tl.float32)
            slope_square += tl.sum(wide * wide, axis=1)
    tl.store(sums_at, tl.sum(slope_square, axis=0))
    if IS_COUNTED:
        SIZE: tl.constexpr = WIDTH * RANK
        for other in range(pid, SLOTS, CHUNKS * SPLITS):
            if find_chunk(slot_ptr, other, CHUNKS, BC) < 0:
                for first in range(0, K, BK):
                    k = first + tl.arange(0, BK)
                    store_gradients(
                        d_down_ptr,
                        d_up_ptr,
                        d_bias_ptr,
                        d_gate_ptr,
                        other,
                        k,
                        tl.zeros([BK], tl.float32),
                        K,
                        SIZE,
                        RANK,
                        HAS_BIAS,
                        ACTIVATION == "gated",
                    )
        tl.debug_barrier()  # all threads have stored what this program leaves
        before = tl.atomic_add(arrivals_ptr + chunk, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            tl.store(arrivals_ptr + chunk, 0)
            add_up_channels(
                sums_ptr, watched_ptr, channels_ptr, chunk, is_live, CHUNKS, SPLITS, BS, BESIDE
            )
            if (slot >= 0) & (slot < SLOTS):
                for first in range(0, K, BK):
                    k = first + tl.arange(0, BK)
                    total = add_up_gradients(
                        shares_ptr, sums_ptr, chunk, learn, is_live, k, CHUNKS, SPLITS, K, BK, BS
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
                        ACTIVATION == "gated",
                    )
