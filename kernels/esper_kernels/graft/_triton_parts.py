"""Pieces that the Triton kernels share."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import os

import triton
import triton.language as tl

from esper_kernels._records import NUM_GAINS

GAINS = tl.constexpr(NUM_GAINS)
"""From the gains of one chunk to those of the next."""

# Triton's interpreter multiplies bfloat16 as if it were integers (in float32 the products are the
# same, for those of two bfloat16 numbers are exact there), and cuts off instead of rounding to it.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_IS_INTERPRETED = tl.constexpr(IS_INTERPRETED)

# To the right of tensors: Triton 3.7's interpreter makes a constant of the product otherwise.
_GELU = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBE = tl.constexpr(0.044715)


@triton.constexpr_function
def record(name):
    """A class of `_triton_records`: a compiler that copies a kernel's source copies no classes."""
    from esper_kernels.graft import _triton_records

    return getattr(_triton_records, name)


@triton.jit
def locate(chunk, NARROW: tl.constexpr, NUM_WIDE: tl.constexpr):
    """Return the first feature and the width of a chunk, split as `numpy.array_split` does."""
    start = chunk * NARROW
    width = tl.where(chunk < NUM_WIDE, NARROW + 1, NARROW)
    if NUM_WIDE > 0:  # else the compiler is to see that starts are multiples of the width
        start += tl.minimum(chunk, NUM_WIDE)
    return start, width


@triton.jit
def find_seed(slot_ptr, gains_ptr, chunk, SLOTS):
    """Load the seed of a chunk."""
    slot = tl.load(slot_ptr + chunk)
    output_scale = tl.load(gains_ptr + chunk * GAINS)
    param_grad_scale = tl.load(gains_ptr + chunk * GAINS + 1)
    input_grad_scale = tl.load(gains_ptr + chunk * GAINS + 2)
    output_damping = tl.load(gains_ptr + chunk * GAINS + 3)
    has_slot = (slot >= 0) & (slot < SLOTS)
    acts_or_learns = (output_scale != 0) | (param_grad_scale != 0)
    is_live = has_slot & (acts_or_learns | (input_grad_scale != 0) | (output_damping != 0))
    return record("Seed")(
        slot, output_scale, param_grad_scale, input_grad_scale, output_damping, is_live
    )


@triton.jit
def start_walk(chunk, row, N, D, S: tl.constexpr):
    """Return the walk over a chunk's tiles, from `row` on."""
    start, width = locate(chunk, S.NARROW, S.NUM_WIDE)
    offsets = tl.arange(0, S.BM)[:, None] * D + tl.arange(0, S.BF)[None, :]
    corner = row.to(tl.int64) * D + start
    return record("Walk")(row, start, width, N, offsets, corner, tl.cast(D, tl.int64) * S.STEP)


@triton.jit
def tile_of(walk, number, S: tl.constexpr):
    """Return a tile of a walk by its number."""
    row = walk.row + number * S.STEP
    entries = walk.corner + number * walk.stride + walk.offsets
    is_row = row + tl.arange(0, S.BM) < walk.num_rows
    return record("Tile")(row, walk.start, entries, is_row, tl.arange(0, S.BF) < walk.width)


@triton.jit
def load_tile(ptr, tile, S: tl.constexpr):
    """Load the entries of a tile, zero where there are none."""
    ALL_COLS: tl.constexpr = (S.NUM_WIDE == 0) and (S.BF == S.NARROW)
    if S.BULK:
        values = ptr.load([tile.row, tile.start])
    elif S.ALL_ROWS and ALL_COLS:
        values = tl.load(ptr + tile.entries)
    elif ALL_COLS:  # a mask over columns would keep loads from being wide
        values = tl.load(ptr + tile.entries, mask=tile.is_row[:, None], other=0.0)
    else:
        mask = tile.is_row[:, None] & tile.is_column[None, :]
        values = tl.load(ptr + tile.entries, mask=mask, other=0.0)
    return values


@triton.jit
def store_tile(ptr, tile, values, S: tl.constexpr):
    """Store values where `load_tile` reads them."""
    ALL_COLS: tl.constexpr = (S.NUM_WIDE == 0) and (S.BF == S.NARROW)
    if S.BULK:
        ptr.store([tile.row, tile.start], values)
    elif S.ALL_ROWS and ALL_COLS:
        tl.store(ptr + tile.entries, values)
    elif ALL_COLS:
        tl.store(ptr + tile.entries, values, mask=tile.is_row[:, None])
    else:
        tl.store(ptr + tile.entries, values, mask=tile.is_row[:, None] & tile.is_column[None, :])


@triton.jit
def load_matrices(bank, slot, width, dtype: tl.constexpr, S: tl.constexpr):
    """Load the adapter of one slot, zero beyond the chunk's width and the rank."""
    cols, ranks = tl.arange(0, S.BF), tl.arange(0, S.BR)
    down = _load_down(bank.down, slot, width, dtype, S)
    base = bank.up + slot.to(tl.int64) * (S.WIDTH * S.RANK)
    is_real = (cols[None, :] < width) & (ranks[:, None] < S.RANK)
    up = tl.load(base + ranks[:, None] * S.WIDTH + cols[None, :], mask=is_real, other=0.0)
    up = narrow(up, dtype)
    bias = tl.zeros([1, 1], tl.float32)
    if S.HAS_BIAS:
        bias = tl.load(bank.bias + slot * S.RANK + ranks, mask=ranks < S.RANK, other=0.0)
        bias = narrow(bias, dtype).to(tl.float32)[None, :]
    gate = down
    if S.ACTIVATION == "gated":
        gate = _load_down(bank.gate, slot, width, dtype, S)
    return record("Matrices")(down, up, bias, gate)


@triton.jit
def _load_down(ptr, slot, width, dtype: tl.constexpr, S: tl.constexpr):
    """Load `[F, R]` of one slot."""
    cols, ranks = tl.arange(0, S.BF), tl.arange(0, S.BR)
    base = ptr + slot.to(tl.int64) * (S.WIDTH * S.RANK)
    is_real = (cols[:, None] < width) & (ranks[None, :] < S.RANK)
    values = tl.load(base + cols[:, None] * S.RANK + ranks[None, :], mask=is_real, other=0.0)
    return narrow(values, dtype)


@triton.jit
def zero_padding(hidden, S: tl.constexpr):
    """`[BM, BR]` with zeros beyond the rank."""
    if S.BR != S.RANK:
        hidden = tl.where(tl.arange(0, S.BR)[None, :] < S.RANK, hidden, 0.0)
    return hidden


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """Return `phi(h)`; NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "gelu":
        return h * tl.sigmoid((h + h * h * h * _CUBE) * _GELU)
    if ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    return h


@triton.jit
def activate_with_slope(h, ACTIVATION: tl.constexpr):
    """Return `phi(h)` and `phi'(h)`."""
    if ACTIVATION == "relu":
        a = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return a, tl.where(h > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        s = tl.sigmoid((h + h * h * h * _CUBE) * _GELU)
        return h * s, s + h * s * (1 - s) * (h * h * (3 * _CUBE) + 1) * _GELU
    if ACTIVATION == "silu":
        s = tl.sigmoid(h)
        return h * s, s + h * s * (1 - s)
    return h, h * 0 + 1


@triton.jit
def fold(values, GROUP: tl.constexpr, S: tl.constexpr):
    """Sum every GROUP-th row, `[BM, BF]` to `[GROUP, BF]`: within a thread, mostly."""
    return tl.sum(tl.reshape(values, [S.BM // GROUP, GROUP, S.BF]), axis=0)


@triton.jit
def is_finite(values):
    """Tell what is neither infinite nor NaN."""
    return tl.abs(values) < float("inf")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Multiply `a b` in float32."""
    if _IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """Round float32 to `dtype`."""
    if _IS_INTERPRETED and dtype == tl.bfloat16 and values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(values == values, rounded, bits) & 0xFFFF0000  # noqa: PLR0124
        return bits.to(tl.float32, bitcast=True).to(dtype)
    return values.to(dtype)


# Two entries at a time: what the compiler makes of a select between bfloat16 numbers converts and
# selects one at a time. One line, for inductor writes it into a string of its own.
_BLEND = tl.constexpr(
    "{ "
    ".reg .b32 m, n, o; "
    ".reg .f32 x, y, v, w; "
    ".reg .pred p, q; "
    "shl.b32 m, $1, 16; "
    "and.b32 n, $1, 0xffff0000; "
    "mov.b32 x, m; "
    "mov.b32 y, n; "
    "fma.rn.f32 x, $4, $2, x; "
    "fma.rn.f32 y, $5, $3, y; "
    "cvt.rn.bf16x2.f32 o, y, x; "
    "abs.f32 v, $2; "
    "abs.f32 w, $3; "
    "setp.lt.f32 p, v, $6; "
    "setp.lt.f32 q, w, $7; "
    "selp.b32 m, 0xffff, 0, p; "
    "selp.b32 n, 0xffff0000, 0, q; "
    "or.b32 m, m, n; "
    "lop3.b32 $0, o, $1, m, 0xe4; "
    "}"
)


@triton.jit
def blend(base, values, gain, limit):
    """Return `base + gain * values`, bit for bit `base` where not `|values| < limit`."""
    if _IS_INTERPRETED or base.dtype != tl.bfloat16:
        wide = narrow(base.to(tl.float32) + gain * values, base.dtype)
        blended = tl.where(tl.abs(values) < limit, wide, base)
    else:
        blended = tl.inline_asm_elementwise(
            _BLEND,
            "=r,r,r,r,r,r,r,r",
            [base, values, gain, limit],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return blended


@triton.jit
def release(CHAINED: tl.constexpr):
    """Let the next kernel of the stream start its programs, if it was launched to wait for us."""
    if CHAINED and not _IS_INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_release(CHAINED: tl.constexpr):
    """Wait until the kernel before this one has written everything."""
    if CHAINED and not _IS_INTERPRETED:
        tl.extra.cuda.gdc_wait()
