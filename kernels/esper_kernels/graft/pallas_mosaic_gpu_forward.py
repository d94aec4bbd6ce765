"""The forward kernels of `graft` on Hopper's matrix units and copy engine.

A program is one warpgroup. It keeps the matrices of one chunk in shared memory and walks over a
range of rows: the copy engine brings tiles `x [64, F]` ahead of it,

    h = x down      a = phi(h + bias)      r = a up      y = x + output_scale * r

with `a` fed to the second product from registers, and `y` written over the tile, from where the
copy engine takes it. Sums stay in registers and leave once, at the end of the range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from esper_kernels.graft._case import Case
from esper_kernels.graft.pallas_mosaic_gpu_parts import (
    COLUMNS,
    ROWS,
    Share,
    Tuning,
    activate,
    add_bias,
    block,
    forward_share,
    forward_tuning,
    is_live_at,
    load,
    load_global,
    matrix,
    num_tiles,
    padded_rank,
    share_out,
    zero_rows,
    zero_tile,
)


@lru_cache(maxsize=256)
def forward_kernel(case: Case, *, tuning: Tuning | None = None) -> Callable[..., Any]:
    """Build the kernel of a case.

    Args:
      case: static part of the call; `pallas_mosaic_gpu.refuses` has passed it.
      tuning: sizes, if not those chosen for the case.

    Returns:
      `(x, down, up, bias, slot, gains) -> (y, sums)` with the bank's matrices as they are but for a
      padded rank, and partial sums `sums [S, C, F + 64]`: of squares by feature, then of values in
      any order.
    """
    chosen = tuning or forward_tuning(case)

    def kernel(x: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, *rest: Any) -> None:
        y, sums, *scratch = rest
        program = lax.axis_index("program")
        chunk, part = lax.rem(program, case.chunks), lax.div(program, case.chunks)
        acts = is_live_at(case, slot, gains, chunk) & (gains[chunk, 0] != 0.0)
        seed = _Seed(chunk, slot[chunk], gains[chunk, 0], acts)
        operands = _Operands(x, y, down, up, bias)
        memory = _Memory(*scratch)
        _walk(case, chosen, operands, seed, memory, sums.at[part, chunk], part, chosen.splits)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((case.rows, case.features), jnp.bfloat16),
            jax.ShapeDtypeStruct((chosen.splits, case.chunks, case.width + ROWS), jnp.float32),
        ),
        grid=(case.chunks * chosen.splits,),
        grid_names=("program",),
        scratch_types=_scratch(case, chosen),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


@lru_cache(maxsize=256)
def in_place_kernel(
    case: Case, *, tuning: Tuning | None = None, share: Share | None = None
) -> Callable[..., Any]:
    """Build the kernel of a case in place; dormant chunks are neither read nor written.

    Returns:
      `(x, down, up, bias, slot, gains, words) -> (sums, where)` with `x` a reference, `words` from
      `live_words` and, of each program, `sums [programs, F + 64]`; `where [C, 2]` is for
      `gather_sums`.
    """
    chosen = tuning or forward_tuning(case)
    shared = share or forward_share(case)

    def kernel(
        x: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, words: Any, *rest: Any
    ) -> None:
        sums, where, *scratch = rest
        program = lax.axis_index("program")

        def serve(chunk: Any, part: Any, parts: Any) -> None:
            scale = gains[chunk, 0]
            seed = _Seed(chunk, slot[chunk], scale, scale != 0.0)
            operands = _Operands(x, None, down, up, bias)
            memory = _Memory(*scratch)
            _walk(case, chosen, operands, seed, memory, sums.at[program], part, parts)

        share_out(case, shared, words, where, serve)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((shared.programs, case.width + ROWS), jnp.float32),
            jax.ShapeDtypeStruct((case.chunks, 2), jnp.int32),
        ),
        grid=(shared.programs,),
        grid_names=("program",),
        scratch_types=_scratch(case, chosen),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


class _Operands(NamedTuple):
    """References to what a kernel reads, and `y`, which it writes; None to write into `x`."""

    x: Any
    y: Any
    down: Any
    up: Any
    bias: Any


class _Seed(NamedTuple):
    """The seed of a program's chunk."""

    chunk: Any
    slot: Any
    output_scale: Any
    acts: Any
    """Whether an adapter changes the chunk."""


class _Memory(NamedTuple):
    """Shared memory of one program."""

    x: Any
    sums: Any
    arrived: Any
    down: Any
    up: Any
    bias: Any


def _scratch(case: Case, tuning: Tuning) -> tuple[Any, ...]:
    width, rank = case.width, padded_rank(case)
    memory = _Memory(
        x=matrix(tuning.stages, ROWS, width),
        sums=plgpu.SMEM((width + ROWS,), jnp.float32),
        arrived=plgpu.Barrier(num_barriers=tuning.stages),
        down=matrix(rank, width),
        up=matrix(rank, width, minor=min(rank, COLUMNS)),
        bias=plgpu.SMEM((rank,), jnp.float32),
    )
    return tuple(memory)


@dataclass(frozen=True, kw_only=True)
class _Range:
    """One program's range of rows of one chunk, and the tiles in flight for it."""

    case: Case
    tuning: Tuning
    operands: _Operands
    seed: _Seed
    memory: _Memory
    first: Any
    """Number of its first tile."""
    count: Any
    """Tiles."""
    columns: Any

    def rows(self, ref: Any, step: Any) -> Any:
        """The tile of an activation at a step."""
        return ref.at[pl.ds((self.first + step) * ROWS, ROWS), self.columns]

    def fetch(self, step: Any, buffer: Any) -> None:
        """Start the copy of a tile of `x`."""
        memory = self.memory
        tile = self.rows(self.operands.x, step)
        plgpu.copy_gmem_to_smem(tile, memory.x.at[buffer], memory.arrived.at[buffer])

    def send(self, step: Any, tile: Any) -> None:
        """Start the copy of a tile into `y`; the one before has left, so refill its buffer."""
        x, y = self.operands[:2]
        plgpu.commit_smem()
        if y is None:
            pl.when(self.seed.acts)(lambda: plgpu.copy_smem_to_gmem(tile, self.rows(x, step)))
        else:
            plgpu.copy_smem_to_gmem(tile, self.rows(y, step))
        refill = step - 1 + self.tuning.stages

        @pl.when((step > 0) & (refill < self.count))
        def _refill() -> None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.fetch(refill, lax.rem(refill, self.tuning.stages))


def _walk(
    case: Case,
    tuning: Tuning,
    operands: _Operands,
    seed: _Seed,
    memory: _Memory,
    sums: Any,
    part: Any,
    parts: Any,
) -> None:
    """Walk over the range `part` of `parts` of a chunk's rows."""
    tiles, width = num_tiles(case), case.width
    num_blocks = width // COLUMNS
    first = lax.div(part * tiles, parts)
    rows = _Range(
        case=case,
        tuning=tuning,
        operands=operands,
        seed=seed,
        memory=memory,
        first=first,
        count=lax.div((part + 1) * tiles, parts) - first,
        columns=pl.ds(seed.chunk * width, width),
    )
    for ahead in range(tuning.stages):
        pl.when(ahead < rows.count)(partial(rows.fetch, ahead, ahead))
    pl.when(seed.acts)(partial(_load_adapter, case, operands, seed.slot, memory))
    plgpu.commit_smem()
    start = (zero_rows(), *(zero_tile() for _ in range(num_blocks)))
    total, *squares = lax.fori_loop(0, rows.count, partial(_serve_tile, rows), start)
    for k, square in enumerate(squares):
        memory.sums[pl.ds(k * COLUMNS, COLUMNS)] = jnp.sum(square, axis=0)
    memory.sums[pl.ds(width, ROWS)] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory.sums, sums)
    plgpu.wait_smem_to_gmem(0)


def _serve_tile(rows: _Range, i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    """One tile: its `y`, and what it adds to the sums of x (by row) and x^2 (by entry)."""
    total, *squares = carry
    width, memory = rows.case.width, rows.memory
    buffer = lax.rem(i, rows.tuning.stages)
    plgpu.barrier_wait(memory.arrived.at[buffer])
    tile = memory.x.at[buffer]
    for k in range(width // COLUMNS):
        wide = load(block(tile, k, width)).astype(jnp.float32)
        total = total + jnp.sum(wide, axis=1)
        squares[k] = squares[k] + wide * wide
    pl.when(rows.seed.acts)(partial(_act, rows, tile))
    rows.send(i, tile)
    return (total, *squares)


def _act(rows: _Range, tile: Any) -> None:
    """Write `y` over a tile of `x`."""
    width, memory = rows.case.width, rows.memory
    a = _hidden(rows.case, tile, memory.down, memory.bias)
    for k in range(width // COLUMNS):
        r = _product(a, block(memory.up, k, width))
        narrow = load(block(tile, k, width))
        moved = (narrow.astype(jnp.float32) + rows.seed.output_scale * r).astype(jnp.bfloat16)
        block(tile, k, width)[...] = jnp.where(jnp.abs(r) < jnp.inf, moved, narrow)


def _load_adapter(case: Case, operands: _Operands, slot: Any, memory: _Memory) -> None:
    """An adapter's matrices into shared memory, in bfloat16."""
    rank, width = padded_rank(case), case.width
    flat: Any = plgpu.Layout.SMEM_GMEM_COPY
    layout = flat((rank, width), jnp.dtype(case.adapter_dtype), 2 * min(rank, COLUMNS))
    down = load_global(operands.down.at[slot])
    memory.down.transpose((1, 0))[...] = down.astype(jnp.bfloat16)
    memory.up[...] = load_global(operands.up.at[slot], layout).astype(jnp.bfloat16)
    if case.has_bias:
        # As the reference sees it: rounded to the activation's dtype.
        row = load_global(operands.bias.at[slot], plgpu.Layout.WGMMA.reduce(0))
        memory.bias[...] = row.astype(jnp.bfloat16).astype(jnp.float32)


def _hidden(case: Case, x: Any, down: Any, bias: Any) -> jax.Array:
    """`a` of a tile, in bfloat16."""

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, x, down.transpose((1, 0)))
        return sums[...]

    h = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, padded_rank(case)), jnp.float32))
    if case.has_bias:
        h = add_bias(h, bias)
    return activate(case.activation, h).astype(jnp.bfloat16)


def _product(a: jax.Array, up: Any) -> jax.Array:
    """`a up`."""

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, up)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32))
