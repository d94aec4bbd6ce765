"""What the Pallas kernels of `graft` share: sizes, buffers, activations and their slopes."""

# mypy: disable-error-code="abstract"
from __future__ import annotations

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
IN_PLACE_PROGRAMS = 2
"""Programs a multiprocessor of the form in place, which shares the live chunks out among them."""

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


def padded_rank(case: Case) -> int:
    """R as the matrix units take it: 16, 32, or a multiple of 64; zeros fill it up.

    >>> case = Case(rows=1, features=64, chunks=1, slots=1, rank=3, dtype="bfloat16",
    ...             body_dtype="float32", has_bias=False, activation="none", device="cpu")
    >>> padded_rank(case)
    16
    """
    if case.rank <= 32:
        return 16 if case.rank <= 16 else 32
    return -(-case.rank // 64) * 64


def num_tiles(case: Case) -> int:
    """Tiles of one chunk."""
    return -(-case.rows // ROWS)


def _splits(case: Case, per_multiprocessor: int) -> int:
    programs = multiprocessors(case) * per_multiprocessor
    return max(1, min(programs // case.chunks, num_tiles(case) // 2))


def forward_tuning(case: Case) -> Tuning:
    """Sizes of the forward kernel, a pure function of shapes and device."""
    wide = padded_rank(case) >= 64
    return Tuning(splits=_splits(case, 3 if wide else 2), stages=4 if case.width == 64 else 3)


def backward_tuning(case: Case) -> Tuning:
    """Sizes of the backward kernel; a split costs one more set of the body's gradients."""
    return Tuning(splits=_splits(case, 2), stages=3)


def in_place_splits(case: Case) -> int:
    """Most row ranges that one chunk is cut into in place; XLA reads the sums of all of them."""
    return max(8, multiprocessors(case) * 32 // case.chunks)


def matrix(*shape: int, minor: int = COLUMNS) -> Any:
    """A bfloat16 buffer in shared memory, tiled and swizzled `minor` columns wide."""
    layout = (plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(2 * minor))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=layout)


def load(ref: Any, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """The whole of a buffer in shared memory, in registers; by rows as the matrix units hold it."""
    whole: Any = plgpu.load  # older JAX wants an index, newer JAX warns of one
    return whole(ref, layout=layout)


def zero_rows() -> jax.Array:
    """A float32 for each row of a tile."""
    return plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zero_tile(columns: int = COLUMNS) -> jax.Array:
    """A float32 for each entry of a tile."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def add_bias(h: jax.Array, bias: Any) -> jax.Array:
    """`h + bias`, with the bias [R] in shared memory."""
    row = load(bias, plgpu.Layout.WGMMA.reduce(0))
    return h + lax.broadcast_in_dim(row, h.shape, [1])


def block(ref: Any, k: int, width: int) -> Any:
    """The k-th block of columns."""
    return ref if width == COLUMNS else ref.at[:, pl.ds(k * COLUMNS, COLUMNS)]


def activate(name: str, h: jax.Array) -> jax.Array:
    """`phi(h)`."""
    if name == "relu":
        return jnp.maximum(h, 0.0)
    if name == "gelu":
        return 0.5 * h * (1.0 + jnp.tanh(h * (_ROOT + _CUBIC * h * h)))
    if name == "silu":
        return h * (1.0 / (1.0 + jnp.exp(-h)))
    return h


def activate_and_pull(name: str, h: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`phi(h)` and `g * phi'(h)`."""
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
