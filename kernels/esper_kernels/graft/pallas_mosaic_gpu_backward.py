"""The backward kernel of `graft` on Hopper's matrix units and copy engine.

One pass: `x` and `dy` are read once and `dx` is written once. A program is one warpgroup that keeps
one chunk's matrices in shared memory and, over its range of rows, the gradients of the adapter in
registers:

    h = x down + bias       g = dy up^T        a = phi(h)       da = g phi'(h)
    r = a up                p = da down^T      dx = dy + feel * p
    d_down += x^T da        d_up^T += dy^T a   d_bias += sum of da's rows

`a` and `da` feed `r` and `p` from registers, and the gradients from shared memory. The utility
needs no `r`: sum dy * r = sum a * g.
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

from esper_kernels.graft._case import Case
from esper_kernels.graft.pallas_mosaic_gpu_parts import (
    COLUMNS,
    ROWS,
    Share,
    Tuning,
    activate_and_pull,
    add_bias,
    backward_tuning,
    block,
    is_live_at,
    load,
    matrix,
    num_tiles,
    padded_rank,
    share_out,
    zero_rows,
    zero_tile,
)

NUM_SUMS = 4
"""By row of a tile: dy^2, r^2, dy * r, and NaN where an entry of p is not finite (else 0)."""


@lru_cache(maxsize=256)
def backward_kernel(
    case: Case, *, tuning: Tuning | None = None, share: Share | None = None
) -> Callable[..., Any]:
    """The kernel of a case.

    Args:
      case: static part of the call; `pallas_mosaic_gpu.refuses` has passed it.
      tuning: sizes, if not those chosen for the case.
      share: how live chunks are shared out, to write into `dy` and leave dormant chunks alone.

    Returns:
      `(x, dy, down_t, up, bias, slot, gains) -> (dx, grads, sums, d_bias)` with `down_t [P, R, F]`
      and, to be summed over the S ranges of rows, `grads [S, C, 2, F, R]` (d_down and d_up^T),
      `sums [S, C, 4, 64]` (see `NUM_SUMS`) and `d_bias [S, C, R]`. Of chunks that are not live
      only the sum of dy^2 is defined. In place `(x, dy, ..., words) -> (grads, sums, d_bias,
      where)`, where `dy` is a reference, `words` from `live_words` and, instead of S and C, there
      is one axis of programs; `where [C, 2]` is for `gather_sums`.
    """
    chosen = tuning or backward_tuning(case)
    width, rank = case.width, padded_rank(case)
    tiles, splits = num_tiles(case), chosen.splits
    stages, x_stages = chosen.stages, max(2, chosen.stages - 1)
    num_blocks, is_narrow = width // COLUMNS, rank < COLUMNS
    has_bias, is_ragged = case.has_bias, case.rows % ROWS != 0
    layout = plgpu.Layout.WGMMA

    def separate(
        x: Any, dy: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, *rest: Any
    ) -> None:
        dx, grads, sums, d_bias, *scratch = rest
        program = lax.axis_index("program")
        chunk, part = lax.rem(program, case.chunks), lax.div(program, case.chunks)
        live = is_live_at(case, slot, gains, chunk)
        leave = grads.at[part, chunk], sums.at[part, chunk], d_bias.at[part, chunk]
        own = slot[chunk], gains[chunk, 2], live
        walk((x, dy, dx), (down, up, bias), own, (chunk, part, splits), leave, *scratch)

    def in_place(
        shared: Share,
        x: Any,
        dy: Any,
        down: Any,
        up: Any,
        bias: Any,
        slot: Any,
        gains: Any,
        words: Any,
        *rest: Any,
    ) -> None:
        grads, sums, d_bias, where, *scratch = rest
        program = lax.axis_index("program")
        leave = grads.at[program], sums.at[program], d_bias.at[program]

        def serve(chunk: Any, part: Any, parts: Any) -> None:
            own = slot[chunk], gains[chunk, 2], None
            walk((x, dy, dy), (down, up, bias), own, (chunk, part, parts), leave, *scratch)

        share_out(case, shared, words, where, serve)

    def walk(
        activations: Any, bank: Any, of_chunk: Any, where: Any, leave: Any, *scratch: Any
    ) -> None:
        x, dy, dx = activations
        down, up, bias = bank
        own, feel, live = of_chunk
        chunk, part, parts = where
        grads, sums, d_bias = leave
        x_s, dy_s, a_s, da_s, *weights = scratch[:-5]
        bias_s, sums_s, x_here, dy_here, ready = scratch[-5:]
        down_s, up_s = weights[:2]
        # With few columns the products over R want them in another tiling.
        down_n, up_n = weights[2:] if is_narrow else weights
        first = lax.div(part * tiles, parts)
        count = lax.div((part + 1) * tiles, parts) - first
        columns = pl.ds(chunk * width, width)

        def rows_of(ref: Any, step: Any) -> Any:
            return ref.at[pl.ds((first + step) * ROWS, ROWS), columns]

        def fetch_x(step: Any, buffer: Any) -> None:
            plgpu.copy_gmem_to_smem(rows_of(x, step), x_s.at[buffer], x_here.at[buffer])

        def fetch_dy(step: Any, buffer: Any) -> None:
            plgpu.copy_gmem_to_smem(rows_of(dy, step), dy_s.at[buffer], dy_here.at[buffer])

        def send(i: Any, tile: Any) -> None:
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, rows_of(dx, i))
            refill = i - 1 + stages

            @pl.when((i > 0) & (refill < count))
            def _refill() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                fetch_dy(refill, lax.rem(refill, stages))

        def when_live(do: Callable[[], None]) -> None:
            if live is None:
                do()
            else:
                pl.when(live)(do)

        @when_live
        def _weights() -> None:
            plgpu.copy_gmem_to_smem(down.at[own], down_s, ready)
            plgpu.copy_gmem_to_smem(up.at[own], up_s, ready)
            if is_narrow:
                plgpu.copy_gmem_to_smem(down.at[own], down_n, ready)
                plgpu.copy_gmem_to_smem(up.at[own], up_n, ready)
            if has_bias:
                plgpu.copy_gmem_to_smem(bias.at[own], bias_s, ready)

        for ahead in range(stages):
            pl.when(ahead < count)(partial(fetch_dy, ahead, ahead))
        for ahead in range(x_stages):
            is_there = ahead < count if live is None else live & (ahead < count)
            pl.when(is_there)(partial(fetch_x, ahead, ahead))

        def pass_on(i: Any, gradient_square: Any) -> Any:
            buffer = lax.rem(i, stages)
            plgpu.barrier_wait(dy_here.at[buffer])
            for k in range(num_blocks):
                slope = load(block(dy_s.at[buffer], k, width))
                wide = slope.astype(jnp.float32)
                gradient_square = gradient_square + jnp.sum(wide * wide, axis=1)
            send(i, dy_s.at[buffer])
            return gradient_square

        def dormant() -> None:
            sums_s[0] = lax.fori_loop(0, count, pass_on, zero_rows())
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_s, sums)

        if live is not None:
            pl.when(jnp.logical_not(live))(dormant)

        def step(i: Any, carry: Any, *, d_down: Any, d_up: Any) -> Any:
            gradient_square, output_square, worth, flaw, d_bias_ = carry
            buffer, x_buffer = lax.rem(i, stages), lax.rem(i, x_stages)
            tile, slope = x_s.at[x_buffer], dy_s.at[buffer]
            plgpu.barrier_wait(x_here.at[x_buffer])
            plgpu.barrier_wait(dy_here.at[buffer])

            def into(h_sums: Any, g_sums: Any) -> Any:
                plgpu.wgmma(h_sums, tile, down_s.transpose((1, 0)))
                plgpu.wgmma(g_sums, slope, up_s.transpose((1, 0)))
                return h_sums[...], g_sums[...]

            hidden = plgpu.WGMMAAccumulatorRef((ROWS, rank), jnp.float32)
            h, g = pl.run_scoped(into, hidden, hidden)
            if has_bias:
                h = add_bias(h, bias_s)
            a, da = activate_and_pull(case.activation, h, g)
            if has_bias and is_ragged:
                # Rows past the end are zero, but phi(bias) is not.
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS, rank), 0, layout=layout)
                a = jnp.where(row + (first + i) * ROWS < case.rows, a, 0.0)
            worth = worth + jnp.sum(a * g, axis=1)
            if has_bias:
                d_bias_ = d_bias_ + da
            a, da = a.astype(jnp.bfloat16), da.astype(jnp.bfloat16)
            if is_narrow:
                a_s.transpose((1, 0))[...] = a
                da_s.transpose((1, 0))[...] = da
            else:
                a_s[...] = a
                da_s[...] = da
            plgpu.commit_smem()
            a_b = a_s.transpose((1, 0)) if is_narrow else a_s
            da_b = da_s.transpose((1, 0)) if is_narrow else da_s
            plgpu.wgmma(d_up, slope.transpose((1, 0)), a_b)
            plgpu.wgmma(d_down, tile.transpose((1, 0)), da_b)
            moved = []
            for k in range(num_blocks):

                def out(r_sums: Any, p_sums: Any, k: int = k) -> Any:
                    plgpu.wgmma(r_sums, a, block(up_n, k, width))
                    plgpu.wgmma(p_sums, da, block(down_n, k, width))
                    return r_sums[...], p_sums[...]

                outer = plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32)
                r, p = pl.run_scoped(out, outer, outer)
                output_square = output_square + jnp.sum(r * r, axis=1)
                flaw = flaw + jnp.sum(p * 0.0, axis=1)
                narrow = load(block(slope, k, width))
                wide = narrow.astype(jnp.float32)
                gradient_square = gradient_square + jnp.sum(wide * wide, axis=1)
                changed = (wide + feel * p).astype(jnp.bfloat16)
                moved.append(jnp.where((jnp.abs(p) < jnp.inf) & (feel != 0.0), changed, narrow))
            plgpu.wgmma_wait(0)
            # All four warps have multiplied with all rows of the tiles before any is overwritten.
            plgpu.commit_smem()
            pl.when(i + x_stages < count)(partial(fetch_x, i + x_stages, x_buffer))
            for k, part_of_tile in enumerate(moved):
                block(slope, k, width)[...] = part_of_tile
            send(i, slope)
            return gradient_square, output_square, worth, flaw, d_bias_

        @when_live
        def _live() -> None:
            plgpu.barrier_wait(ready)

            def accumulate(d_down: Any, d_up: Any) -> Any:
                start = (
                    *(zero_rows() for _ in range(NUM_SUMS)),
                    zero_tile(rank) if has_bias else 0,
                )
                of = partial(step, d_down=d_down, d_up=d_up)
                carry = lax.fori_loop(0, count, of, start)
                for k in range(NUM_SUMS):
                    sums_s[k] = carry[k]
                if has_bias:
                    bias_s[...] = jnp.sum(carry[-1], axis=0)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums_s, sums)
                if has_bias:
                    plgpu.copy_smem_to_gmem(bias_s, d_bias)
                return d_down[...], d_up[...]

            of_adapter = plgpu.WGMMAAccumulatorRef((width, rank), jnp.float32)
            grads[0], grads[1] = pl.run_scoped(accumulate, of_adapter, of_adapter)

        plgpu.wait_smem_to_gmem(0)

    hidden = matrix(rank, ROWS) if is_narrow else matrix(ROWS, rank)
    weight = matrix(rank, width)
    again = (matrix(rank, width, minor=rank),) * 2 if is_narrow else ()
    axes = (splits, case.chunks) if share is None else (share.programs,)
    outputs = [
        jax.ShapeDtypeStruct((*axes, 2, width, rank), jnp.float32),
        jax.ShapeDtypeStruct((*axes, NUM_SUMS, ROWS), jnp.float32),
        jax.ShapeDtypeStruct((*axes, rank), jnp.float32),
    ]
    if share is None:
        outputs.insert(0, jax.ShapeDtypeStruct((case.rows, case.features), jnp.bfloat16))
    else:
        outputs.append(jax.ShapeDtypeStruct((case.chunks, 2), jnp.int32))
    return plgpu.kernel(
        separate if share is None else partial(in_place, share),
        out_type=tuple(outputs),
        grid=(case.chunks * splits if share is None else share.programs,),
        grid_names=("program",),
        scratch_types=(
            matrix(x_stages, ROWS, width),
            matrix(stages, ROWS, width),
            hidden,
            hidden,
            weight,
            weight,
            *again,
            plgpu.SMEM((rank,), jnp.float32),
            plgpu.SMEM((NUM_SUMS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=x_stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2 + 2 * is_narrow + has_bias),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
