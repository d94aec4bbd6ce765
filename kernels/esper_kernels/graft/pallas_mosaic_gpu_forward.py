"""The forward kernel of `graft` on Hopper's matrix units and copy engine.

A program is one warpgroup. It keeps one chunk's matrices in shared memory and walks over a range of
rows: the copy engine brings tiles `x [64, F]` ahead of it,

    h = x down      a = phi(h + bias)      r = a up      y = x + act * r

with `a` fed to the second product from registers, and `y` written over the tile, from where the
copy engine takes it. Sums of the watch stay in registers and leave once, at the end of the range.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from esper_kernels.graft._blocks import multiprocessors
from esper_kernels.graft._case import Case
from esper_kernels.graft.pallas_mosaic_gpu_parts import (
    COLUMNS,
    IN_PLACE_PROGRAMS,
    ROWS,
    Tuning,
    activate,
    add_bias,
    block,
    forward_tuning,
    in_place_splits,
    load,
    matrix,
    num_tiles,
    padded_rank,
    zero_rows,
    zero_tile,
)


def in_place_programs(case: Case) -> int:
    """Programs of the form in place: enough for every chunk to have one."""
    return max(multiprocessors(case) * IN_PLACE_PROGRAMS, case.chunks)


def in_place_parts(case: Case, num_live: jax.Array) -> jax.Array:
    """Ranges of rows that each of `num_live` chunks is cut into."""
    even = lax.div(jnp.int32(in_place_programs(case)), jnp.maximum(num_live, 1))
    return jnp.minimum(even, in_place_splits(case))


@lru_cache(maxsize=256)
def forward_kernel(
    case: Case, *, is_in_place: bool = False, tuning: Tuning | None = None
) -> Callable[..., Any]:
    """The kernel of a case.

    Args:
      case: static part of the call; `pallas_mosaic_gpu.refuses` has passed it.
      is_in_place: write into `x`, for live chunks only.
      tuning: sizes, if not those chosen for the case.

    Returns:
      `(x, down_t, up, bias, slot, gains) -> (y, sums)` with `down_t [P, R, F]` and partial sums
      `sums [S, C, F + 64]`: of squares by feature, then of values in any order. In place:
      `(x, ..., gains, order, count) -> (sums,)`, where `x` is a reference, `order [C]` lists the
      live chunks first, `count [1]` is how many there are, and `sums` is defined for live chunks'
      first `in_place_parts(case, count)` ranges.
    """
    chosen = tuning or forward_tuning(case)
    width, rank, slots = case.width, padded_rank(case), case.slots
    stages, tiles = chosen.stages, num_tiles(case)
    num_blocks = width // COLUMNS

    def separate(x: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, *rest: Any) -> None:
        y, sums, *scratch = rest
        program = lax.axis_index("program")
        chunk, part = lax.rem(program, case.chunks), lax.div(program, case.chunks)
        live = (slot[chunk] >= 0) & (slot[chunk] < slots)
        where = (chunk, part, jnp.int32(chosen.splits), live)
        body(x, y, (down, up, bias, slot, gains), where, sums.at[part, chunk], *scratch)

    def in_place(x: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, *rest: Any) -> None:
        order, count, sums, *scratch = rest
        program = lax.axis_index("program")
        num_live = count[0]
        share = jnp.maximum(num_live, 1)
        part, parts = lax.div(program, share), in_place_parts(case, num_live)

        @pl.when((num_live > 0) & (part < parts))
        def _serve() -> None:
            chunk = order[lax.rem(program, share)]
            where = (chunk, part, parts, jnp.bool_(True))
            body(x, x, (down, up, bias, slot, gains), where, sums.at[part, chunk], *scratch)

    def body(
        x: Any, y: Any, operands: Any, where: Any, sums: Any, tile: Any, *scratch: Any
    ) -> None:
        down, up, bias, slot, gains = operands
        chunk, part, parts, may_serve = where
        down_s, up_s, bias_s, sums_s, arrived, ready = scratch
        first = lax.div(part * tiles, parts)
        count = lax.div((part + 1) * tiles, parts) - first
        columns = pl.ds(chunk * width, width)

        def rows_of(ref: Any, step: Any) -> Any:
            return ref.at[pl.ds((first + step) * ROWS, ROWS), columns]

        def fetch(step: Any, buffer: Any) -> None:
            plgpu.copy_gmem_to_smem(rows_of(x, step), tile.at[buffer], arrived.at[buffer])

        for ahead in range(stages):
            pl.when(ahead < count)(partial(fetch, ahead, ahead))

        own, act = slot[chunk], gains[chunk, 0]
        serves = may_serve & (act != 0.0)

        @pl.when(serves)
        def _weights() -> None:
            plgpu.copy_gmem_to_smem(down.at[own], down_s, ready)
            plgpu.copy_gmem_to_smem(up.at[own], up_s, ready)
            if case.has_bias:
                plgpu.copy_gmem_to_smem(bias.at[own], bias_s, ready)

        def step(i: Any, carry: Any, *, serving: bool) -> Any:
            total, squares = carry[0], list(carry[1:])
            buffer = lax.rem(i, stages)
            plgpu.barrier_wait(arrived.at[buffer])
            current = tile.at[buffer]
            if serving:
                a = _hidden(case, current, down_s, bias_s, rank)
            for k in range(num_blocks):
                part_of_tile = block(current, k, width)
                narrow = load(part_of_tile)
                wide = narrow.astype(jnp.float32)
                total = total + jnp.sum(wide, axis=1)
                squares[k] = squares[k] + wide * wide
                if serving:
                    r = _product(a, block(up_s, k, width))
                    moved = (wide + act * r).astype(jnp.bfloat16)
                    part_of_tile[...] = jnp.where(jnp.abs(r) < jnp.inf, moved, narrow)
            plgpu.commit_smem()
            if serving or not is_in_place:
                plgpu.copy_smem_to_gmem(current, rows_of(y, i))
            # The tile of the step before has left, or does so while this one is on its way.
            refill = i - 1 + stages

            @pl.when((i > 0) & (refill < count))
            def _refill() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                fetch(refill, lax.rem(refill, stages))

            return (total, *squares)

        def walk(*, serving: bool) -> None:
            if serving:
                plgpu.barrier_wait(ready)
            start = (zero_rows(), *(zero_tile() for _ in range(num_blocks)))
            total, *squares = lax.fori_loop(0, count, partial(step, serving=serving), start)
            for k, square in enumerate(squares):
                sums_s[pl.ds(k * COLUMNS, COLUMNS)] = jnp.sum(square, axis=0)
            sums_s[pl.ds(width, ROWS)] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_s, sums)

        pl.when(serves)(partial(walk, serving=True))
        pl.when(jnp.logical_not(serves))(partial(walk, serving=False))
        plgpu.wait_smem_to_gmem(0)

    programs = in_place_programs(case) if is_in_place else case.chunks * chosen.splits
    splits = in_place_splits(case) if is_in_place else chosen.splits
    outputs = [jax.ShapeDtypeStruct((splits, case.chunks, width + ROWS), jnp.float32)]
    if not is_in_place:
        outputs.insert(0, jax.ShapeDtypeStruct((case.rows, case.features), jnp.bfloat16))
    return plgpu.kernel(
        in_place if is_in_place else separate,
        out_type=tuple(outputs),
        grid=(programs,),
        grid_names=("program",),
        scratch_types=(
            matrix(stages, ROWS, width),
            matrix(rank, width),
            matrix(rank, width, minor=min(rank, COLUMNS)),
            plgpu.SMEM((rank,), jnp.float32),
            plgpu.SMEM((width + ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2 + case.has_bias),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _hidden(case: Case, x: Any, down: Any, bias: Any, rank: int) -> jax.Array:
    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, x, down.transpose((1, 0)))
        return sums[...]

    h = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, rank), jnp.float32))
    if case.has_bias:
        h = add_bias(h, bias)
    return activate(case.activation, h).astype(jnp.bfloat16)


def _product(a: jax.Array, up: Any) -> jax.Array:
    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, up)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32))
