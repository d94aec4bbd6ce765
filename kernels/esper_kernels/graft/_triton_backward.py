"""The backward pass: `x` and `dy` read once, `dx` written once, the adapter recomputed."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from esper_kernels.graft._triton_parts import (
    activate_with_slope,
    await_release,
    blend,
    dot,
    find_seed,
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
from esper_kernels.graft._triton_reduce import finish, parts, zero_unused


@triton.jit
def _recompute(u, dy, matrices, seed, tile, DAMPED: tl.constexpr, S: tl.constexpr):
    """Compute the adapter of one tile, forward and back to its hidden layer."""
    dtype: tl.constexpr = u.dtype
    h = dot(u, matrices.down, S.PRECISION)
    if not DAMPED:
        slope_a = dot(dy, tl.trans(matrices.up), S.PRECISION)
    if S.HAS_BIAS:
        h += matrices.bias
    if S.ACTIVATION == "gated":
        a_slope, g_slope = activate_with_slope(dot(u, matrices.gate, S.PRECISION), "silu")
        a = a_slope * h
    else:
        a, a_slope = activate_with_slope(h, S.ACTIVATION)
    a = zero_padding(a, S)
    if not S.ALL_ROWS:
        # Rows beyond the batch hold phi(bias), which is no output.
        a = tl.where(tile.is_row[:, None], a, 0.0)
    if DAMPED:
        a = narrow(a, dtype)
        r = dot(a, matrices.up, S.PRECISION)
        wide = dy.to(tl.float32)
        worth = tl.sum(wide * r, axis=1)
        slope = narrow(wide + seed.output_damping * r, dtype)
        slope_a = dot(slope, tl.trans(matrices.up), S.PRECISION)
    else:
        worth = tl.sum(slope_a * a, axis=1)
        slope = dy
    slope_h = zero_padding(slope_a * a_slope, S)
    slope_z = slope_h
    if S.ACTIVATION == "gated":
        slope_z = zero_padding(slope_a * h * g_slope, S)
    if not DAMPED:
        a = narrow(a, dtype)
        r = dot(a, matrices.up, S.PRECISION)
    return record("Hidden")(a, r, slope, slope_h, slope_z, worth)


@triton.jit
def _pull(
    x_ptr, dy_ptr, dx_ptr, bank, seed, walk, STAGES: tl.constexpr, DAMPED: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Write `dx` of a live chunk, and return its gradients and sums.

    `DAMPED` adapters descend `dy + output_damping r`; `dx` does not follow them.
    """
    dtype: tl.constexpr = x_ptr.dtype if S.BULK else x_ptr.dtype.element_ty
    matrices = load_matrices(bank, seed.slot, walk.width, dtype, S)
    slope_square = tl.zeros([S.BM], tl.float32)
    d_down = tl.zeros([S.BF, S.BR], tl.float32)
    d_up = tl.zeros([S.BF, S.BR], tl.float32)
    d_gate = tl.zeros([S.BF, S.BR], tl.float32)
    d_bias = tl.zeros([S.BM // 16, 8, S.BR], tl.float32)
    output_square = tl.zeros([S.BM], tl.float32)
    worth = tl.zeros([S.BM], tl.float32)
    flaw = tl.zeros([S.BM], tl.float32)
    limit = tl.where(seed.input_grad_scale != 0, float("inf"), 0.0)  # from which on d_u is left out
    for number in tl.range(0, S.TILES, num_stages=STAGES):
        tile = tile_of(walk, number, S)
        u = load_tile(x_ptr, tile, S)
        dy = load_tile(dy_ptr, tile, S)
        hidden = _recompute(u, dy, matrices, seed, tile, DAMPED, S)
        worth -= hidden.worth
        output_square += tl.sum(hidden.r * hidden.r, axis=1)
        d_h = narrow(hidden.slope_h, dtype)
        d_up += dot(tl.trans(hidden.slope), hidden.a, S.PRECISION)
        d_down += dot(tl.trans(u), d_h, S.PRECISION)
        if S.HAS_BIAS:
            # A thread of a matrix product holds rows 8 apart: this sum stays within it.
            d_bias += tl.sum(tl.reshape(hidden.slope_h, [S.BM // 16, 2, 8, S.BR]), axis=1)
        d_u = dot(d_h, tl.trans(matrices.down), S.PRECISION)
        if S.ACTIVATION == "gated":
            d_z = narrow(hidden.slope_z, dtype)
            d_gate += dot(tl.trans(u), d_z, S.PRECISION)
            d_u += dot(d_z, tl.trans(matrices.gate), S.PRECISION)
        wide = dy.to(tl.float32)
        slope_square += tl.sum(wide * wide, axis=1)
        flaw += tl.sum(d_u * 0.0, axis=1)
        store_tile(dx_ptr, tile, blend(dy, d_u, seed.input_grad_scale, limit), S)
    gradients = record("Gradients")(d_down, d_up, d_bias, d_gate)
    return gradients, record("Sums")(slope_square, output_square, worth, flaw)


@triton.jit
def _pull_and_leave(
    x_ptr, dy_ptr, dx_ptr, bank, seed, walk, share_ptr, sums_ptr, STAGES: tl.constexpr,
    DAMPED: tl.constexpr, CHAINED: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Do the same, leave a share of the gradients and all sums but that of dy^2, and return it."""
    gradients, sums = _pull(x_ptr, dy_ptr, dx_ptr, bank, seed, walk, STAGES, DAMPED, S)
    release(CHAINED)
    cols, ranks = tl.arange(0, S.BF), tl.arange(0, S.BR)
    is_share = (cols[:, None] < S.WIDTH) & (ranks[None, :] < S.RANK)
    by_row = share_ptr + cols[:, None] * S.RANK + ranks[None, :]
    by_rank = share_ptr + H.SIZE + ranks[None, :] * S.WIDTH + cols[:, None]
    tl.store(by_row, gradients.down, mask=is_share)
    tl.store(by_rank, gradients.up, mask=is_share)
    flaw = tl.sum(sums.flaw, axis=0)
    flaw += tl.sum(tl.sum(gradients.down * 0.0 + gradients.up * 0.0, axis=1), axis=0)
    if S.HAS_BIAS:
        d_bias = tl.sum(tl.sum(gradients.bias, axis=1), axis=0)
        tl.store(share_ptr + 2 * H.SIZE + ranks, d_bias, mask=ranks < S.RANK)
        flaw += tl.sum(d_bias * 0.0, axis=0)
    if S.ACTIVATION == "gated":
        tl.store(by_row + H.ENTRIES - H.SIZE, gradients.gate, mask=is_share)
        flaw += tl.sum(tl.sum(gradients.gate * 0.0, axis=1), axis=0)
    tl.store(sums_ptr + 1, tl.sum(sums.output_square, axis=0))
    tl.store(sums_ptr + 2, tl.sum(sums.worth, axis=0))
    tl.store(sums_ptr + 3, flaw)
    return sums.slope_square


@triton.jit
def _pass_on(dy_ptr, dx_ptr, walk, S: tl.constexpr):
    """Copy `dy` to `dx`, and return the sums of dy^2."""
    slope_square = tl.zeros([S.BM], tl.float32)
    for number in tl.range(0, S.TILES, num_stages=S.STAGES):
        tile = tile_of(walk, number, S)
        dy = load_tile(dy_ptr, tile, S)
        store_tile(dx_ptr, tile, dy, S)
        wide = dy.to(tl.float32)
        slope_square += tl.sum(wide * wide, axis=1)
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
    left_ptr,  # what every split leaves: see `parts`
    statistics_ptr,
    d_down_ptr,
    d_up_ptr,
    d_bias_ptr,
    d_gate_ptr,
    out_ptr,  # backward statistics
    arrivals_ptr,  # [C], zeros before and after
    N,
    D,
    CHUNKS,
    SLOTS,
    ENTRIES: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    IS_COUNTED: tl.constexpr,  # whether the last program of a chunk adds up
    BESIDE: tl.constexpr,  # whether the forward statistics stand before them
    NARROW: tl.constexpr,
    NUM_WIDE: tl.constexpr,
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
    OPENS: tl.constexpr,  # whether activations are arrays, whose tiles are described here
    CHAINED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program serves one chunk and every SPLITS-th tile of its rows."""
    await_release(CHAINED)
    S: tl.constexpr = record("Shape")(NARROW, NUM_WIDE, WIDTH, RANK, BM, BF, BR, SPLITS * BM, TILES,
        STAGES, ACTIVATION, HAS_BIAS, BULK, ALL_ROWS, PRECISION)  # fmt: skip
    H: tl.constexpr = record("Share")(
        ENTRIES, WIDTH * RANK, RANK, HAS_BIAS, ACTIVATION == "gated", SPLITS, BK, BS, BC
    )
    program = tl.program_id(0)
    chunk = program % CHUNKS
    split = program // CHUNKS
    seed = find_seed(slot_ptr, gains_ptr, chunk, SLOTS)
    if OPENS:
        x_ptr = tl.make_tensor_descriptor(x_ptr, [N, D], [D, 1], [BM, BF])
        dy_ptr = tl.make_tensor_descriptor(dy_ptr, [N, D], [D, 1], [BM, BF])
        dx_ptr = tl.make_tensor_descriptor(dx_ptr, [N, D], [D, 1], [BM, BF])
    walk = start_walk(chunk, split * BM, N, D, S)
    bank = record("Bank")(down_ptr, up_ptr, bias_ptr, gate_ptr)
    sums_ptr, shares_ptr = parts(left_ptr, CHUNKS, H)
    own_sums_ptr = sums_ptr + program * 4
    own_share_ptr = shares_ptr + program.to(tl.int64) * ENTRIES
    if seed.is_live & (seed.output_damping != 0) & (seed.input_grad_scale == 0):
        # One tile in flight: a damped chunk takes no shared memory from the others.
        slope_square = _pull_and_leave(
            x_ptr, dy_ptr, dx_ptr, bank, seed, walk, own_share_ptr, own_sums_ptr,
            1, True, CHAINED, S, H,
        )  # fmt: skip
    elif seed.is_live:
        slope_square = _pull_and_leave(
            x_ptr, dy_ptr, dx_ptr, bank, seed, walk, own_share_ptr, own_sums_ptr,
            STAGES, False, CHAINED, S, H,
        )  # fmt: skip
    else:
        slope_square = _pass_on(dy_ptr, dx_ptr, walk, S)
    tl.store(own_sums_ptr, tl.sum(slope_square, axis=0))
    if IS_COUNTED:
        gradients = record("Bank")(d_down_ptr, d_up_ptr, d_bias_ptr, d_gate_ptr)
        zero_unused(slot_ptr, gradients, program, SLOTS, CHUNKS, H)
        finish(
            sums_ptr, shares_ptr, arrivals_ptr, statistics_ptr, out_ptr, gradients, seed, chunk,
            SLOTS, CHUNKS, BESIDE, H,
        )  # fmt: skip
