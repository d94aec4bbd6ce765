"""What the Pallas kernels of `graft` share: sizes, buffers, activations and their slopes."""

# mypy: disable-error-code="abstract"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from esper_kernels.graft._blocks import multiprocessors
from esper_kernels.graft._case import Case

ROWS = 64
"""Rows of a tile: what one matrix instruction of a warpgroup takes."""
COLUMNS = 64
"""Columns of a block: 128 bytes, the widest swizzle."""

# Square root of 2 / pi, and that times 0.044715: the tanh form of gelu.
_ROOT = 0.7978845608028654
_CUBIC = 0.035677408136300125


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How a kernel cuts its work."""

    splits: int
    """Row ranges of a chunk, each one program of one warpgroup."""
    stages: int
    """Tiles in flight in a program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How a kernel in place shares the live chunks out."""

    programs: int
    """At least one for every chunk."""
    most: int
    """Ranges of rows that one chunk is cut into, at most."""


def padded_rank(case: Case) -> int:
    """R as the matrix units take it: 16, 32, or a multiple of 64; zeros fill it up.

    >>> case = Case(rows=1, features=64, chunks=1, slots=1, rank=3, dtype="bfloat16",
    ...             adapter_dtype="float32", has_bias=False, activation="none", device="cpu")
    >>> padded_rank(case)
    16
    """
    if case.rank <= 32:
        return 16 if case.rank <= 16 else 32
    return -(-case.rank // 64) * 64


def num_tiles(case: Case) -> int:
    """Count the tiles of one chunk."""
    return -(-case.rows // ROWS)


def _splits(case: Case, per_multiprocessor: int) -> int:
    programs = multiprocessors(case) * per_multiprocessor
    return max(1, min(programs // case.chunks, num_tiles(case) // 2))


def forward_tuning(case: Case) -> Tuning:
    """Choose sizes of the forward kernel, a pure function of shapes and device."""
    wide = padded_rank(case) >= 64
    return Tuning(splits=_splits(case, 3 if wide else 2), stages=4 if case.width == 64 else 3)


def backward_tuning(case: Case) -> Tuning:
    """Choose sizes of the backward kernel; a split costs one more set of gradients."""
    return Tuning(splits=_splits(case, 2), stages=3)


def forward_share(case: Case) -> Share:
    """Choose how the forward kernel in place shares its work out."""
    programs = max(multiprocessors(case) * 2, case.chunks)
    return Share(programs=programs, most=max(8, multiprocessors(case) * 32 // case.chunks))


def backward_share(case: Case) -> Share:
    """Do so for the backward kernel; XLA reads `most` sets of gradients for every chunk."""
    programs = max(multiprocessors(case) * 2, case.chunks)
    return Share(programs=programs, most=max(4, multiprocessors(case) * 8 // case.chunks))


def is_live_at(case: Case, slot: Any, gains: Any, chunk: Any) -> Any:
    """Tell whether an adapter is at work in the chunk."""
    slot_index = slot[chunk]
    is_used = (gains[chunk, 0] != 0.0) | (gains[chunk, 1] != 0.0) | (gains[chunk, 2] != 0.0)
    is_used |= gains[chunk, 3] != 0.0
    return (slot_index >= 0) & (slot_index < case.slots) & is_used


def live_words(live: jax.Array) -> jax.Array:
    """`live [C]` as bits, 32 chunks to an int32."""
    bits = jnp.pad(live, (0, -live.shape[0] % 32)).reshape(-1, 32).astype(jnp.uint32)
    positions = jnp.arange(32, dtype=jnp.uint32)[None]
    words = jnp.sum(bits << positions, axis=1, dtype=jnp.uint32)
    return words.view(jnp.int32)


def _count_ones(word: Any) -> Any:
    """Count the bits that are set in an int32: two, four and eight bits at a time."""
    word -= lax.shift_right_logical(word, jnp.int32(1)) & 0x55555555
    word = (word & 0x33333333) + (lax.shift_right_logical(word, jnp.int32(2)) & 0x33333333)
    word = (word + lax.shift_right_logical(word, jnp.int32(4))) & 0x0F0F0F0F
    return lax.shift_right_logical(word * 0x01010101, jnp.int32(24))


def _position(word: Any, number: Any) -> Any:
    """Find the position of bit `number` of those that are set, by halves."""
    position = jnp.int32(0)
    for width in (16, 8, 4, 2, 1):
        low = word & jnp.int32((1 << width) - 1)
        count = _count_ones(low)
        is_high = number >= count
        number = jnp.where(is_high, number - count, number)
        word = jnp.where(is_high, lax.shift_right_logical(word, jnp.int32(width)), low)
        position += jnp.where(is_high, jnp.int32(width), jnp.int32(0))
    return position


def share_out(
    case: Case, share: Share, words: Any, where: Any, serve: Callable[[Any, Any, Any], None]
) -> None:
    """Call `serve(chunk, part, parts)` in the programs that have a range of a live chunk.

    With L live chunks, program p has range `p // L` of the live chunk that is number `p % L`.

    Args:
      case: static part of the call.
      share: how many programs, and ranges at most.
      words: see `live_words`.
      where: `[C, 2]` gets each chunk's number among the live ones, -1 for a dormant one, and L.
      serve: what to do.
    """
    program = lax.axis_index("program")
    num_live = _rank_chunk(case, program, words, where)
    many = jnp.maximum(num_live, 1)
    number, part = lax.rem(program, many), lax.div(program, many)
    parts = jnp.minimum(lax.div(jnp.int32(share.programs), many), share.most)

    @pl.when((num_live > 0) & (part < parts))
    def _serve() -> None:
        serve(_find_live(case, words, number), part, parts)


def _unroll(num_words: int) -> int:
    return num_words if num_words <= 8 else 1


def _rank_chunk(case: Case, program: Any, words: Any, where: Any) -> Any:
    """Count the live chunks; each of the first C programs writes its chunk's row of `where`."""
    zero = jnp.int32(0)
    num_words = -(-case.chunks // 32)
    index, bit = lax.div(program, jnp.int32(32)), lax.rem(program, jnp.int32(32))
    below = lax.shift_left(jnp.int32(1), bit) - 1

    def count(w: Any, carry: Any) -> Any:
        word, w = words[w], jnp.int32(w)
        ones = _count_ones(word)
        before = jnp.where(w < index, ones, jnp.where(w == index, _count_ones(word & below), zero))
        return carry[0] + ones, carry[1] + before

    num_live, number = lax.fori_loop(0, num_words, count, (zero, zero), unroll=_unroll(num_words))

    @pl.when(program < case.chunks)
    def _write() -> None:
        is_mine = (lax.shift_right_logical(words[index], bit) & 1) == 1
        where[program, 0] = jnp.where(is_mine, number, jnp.int32(-1))
        where[program, 1] = num_live

    return num_live


def _find_live(case: Case, words: Any, number: Any) -> Any:
    """Find the live chunk of a number among them."""
    zero, num_words = jnp.int32(0), -(-case.chunks // 32)

    def find(w: Any, carry: Any) -> Any:
        left, bit, word, first = carry
        current, w = words[w], jnp.int32(w)
        ones = _count_ones(current)
        is_match = (left >= 0) & (left < ones)
        bit, word = jnp.where(is_match, left, bit), jnp.where(is_match, current, word)
        first = jnp.where(is_match, 32 * w, first)
        return jnp.where(is_match, jnp.int32(-1), left - ones), bit, word, first

    begin = (number, zero, zero, zero)
    _, bit, word, first = lax.fori_loop(0, num_words, find, begin, unroll=_unroll(num_words))
    return first + _position(word, bit)


def gather_sums(share: Share, where: jax.Array, *partial_sums: jax.Array) -> list[jax.Array]:
    """Add up each chunk's sums over its ranges, from `[programs, ...]`; 0 for dormant chunks.

    Args:
      share: how the kernel shared its work out.
      where: [C, 2], see `share_out`.
      partial_sums: what each program left; not defined for programs without work.
    """
    number, num_live = where[None, :, 0], where[None, :, 1]
    part = jnp.arange(share.most, dtype=jnp.int32)[:, None]
    parts = jnp.minimum(lax.div(jnp.int32(share.programs), jnp.maximum(num_live, 1)), share.most)
    is_real = (number >= 0) & (part < parts)
    program = jnp.where(is_real, number + part * num_live, 0)

    def add(sums: jax.Array) -> jax.Array:
        mask = is_real.reshape(*is_real.shape, *(1,) * (sums.ndim - 1))
        return jnp.sum(jnp.where(mask, sums[program], jnp.zeros((), sums.dtype)), axis=0)

    return [add(sums) for sums in partial_sums]


def matrix(*shape: int, minor: int = COLUMNS) -> Any:
    """Describe a bfloat16 buffer in shared memory, tiled and swizzled `minor` columns wide."""
    layout = (plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(2 * minor))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=layout)


def load(ref: Any, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """Load the whole of a buffer in shared memory, by rows as the matrix units hold it."""
    whole: Any = plgpu.load  # older JAX wants an index, newer JAX warns of one
    return whole(ref, layout=layout)


def load_global(ref: Any, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """Load the whole of a buffer in global memory."""
    whole: Any = plgpu.load
    return whole(ref, layout=layout, optimized=False)


def zero_rows() -> jax.Array:
    """Zeros in float32, one for each row of a tile."""
    return plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zero_tile(columns: int = COLUMNS) -> jax.Array:
    """Zeros in float32, one for each entry of a tile."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def add_bias(h: jax.Array, bias: Any) -> jax.Array:
    """Return `h + bias`, with the bias [R] in shared memory."""
    row = load(bias, plgpu.Layout.WGMMA.reduce(0))
    return h + lax.broadcast_in_dim(row, h.shape, [1])


def block(ref: Any, k: int, width: int) -> Any:
    """Return the k-th block of columns."""
    return ref if width == COLUMNS else ref.at[:, pl.ds(k * COLUMNS, COLUMNS)]


def activate(name: str, h: jax.Array) -> jax.Array:
    """Return `phi(h)`."""
    if name == "relu":
        return jnp.maximum(h, 0.0)
    if name == "gelu":
        return 0.5 * h * (1.0 + jnp.tanh(h * (_ROOT + _CUBIC * h * h)))
    if name == "silu":
        return h * (1.0 / (1.0 + jnp.exp(-h)))
    return h


def activate_and_pull(name: str, h: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `phi(h)` and `g * phi'(h)`."""
    if name == "relu":
        return jnp.maximum(h, 0.0), jnp.where(h > 0.0, g, 0.0)
    if name == "gelu":
        square = h * h
        t = jnp.tanh(h * (_ROOT + _CUBIC * square))
        gate = 0.5 + 0.5 * t
        slope = gate + 0.5 * h * (1.0 - t * t) * (_ROOT + 3.0 * _CUBIC * square)
        return h * gate, g * slope
    if name == "silu":
        gate = 1.0 / (1.0 + jnp.exp(-h))
        a = h * gate
        return a, g * (gate + a * (1.0 - gate))
    return h, g
