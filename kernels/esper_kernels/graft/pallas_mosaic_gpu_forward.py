"""The forward kernels of `graft` on Hopper's matrix units and copy engine.

A program is one warpgroup. It keeps the matrices of a few neighbouring chunks in shared memory and
walks over a range of rows: the copy engine brings tiles `x [64, G F]` ahead of it,

    h = x down      a = phi(h + bias)      r = a up      y = x + act * r

with `a` fed to the second product from registers, and `y` written over the tile, from where the
copy engine takes it. Sums of the watch stay in registers and leave once, at the end of the range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    activate,
    add_bias,
    block,
    bring,
    forward_share,
    forward_tuning,
    is_live_at,
    load,
    matrix,
    num_tiles,
    padded_rank,
    share_out,
    zero_rows,
    zero_tile,
)


@lru_cache(maxsize=256)
def forward_kernel(case: Case, *, tuning: Tuning | None = None) -> Callable[..., Any]:
    """The kernel of a case.

    Args:
      case: static part of the call; `pallas_mosaic_gpu.refuses` has passed it.
      tuning: sizes, if not those chosen for the case.

    Returns:
      `(x, down, up, bias, slot, gains) -> (y, sums)` with the bank's matrices as they are but for a
      padded rank, and partial sums `sums [S, C, F + 64]`: of squares by feature, then of values in
      any order.
    """
    chosen = tuning or forward_tuning(case)
    groups = case.chunks // chosen.group

    def kernel(x: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, *rest: Any) -> None:
        y, sums, *scratch = rest
        program = lax.axis_index("program")
        first, part = lax.rem(program, groups) * chosen.group, lax.div(program, groups)
        of = [first + j for j in range(chosen.group)]
        serves = [is_live_at(case, slot, gains, c) & (gains[c, 0] != 0.0) for c in of]
        acts = [(c, slot[c], gains[c, 0], is_on) for c, is_on in zip(of, serves, strict=True)]
        leave = [sums.at[part, c] for c in of]
        _walk(case, chosen, (x, y), (down, up, bias), acts, (part, chosen.splits), leave, scratch)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((case.rows, case.features), jnp.bfloat16),
            jax.ShapeDtypeStruct((chosen.splits, case.chunks, case.width + ROWS), jnp.float32),
        ),
        grid=(groups * chosen.splits,),
        grid_names=("program",),
        scratch_types=_scratch(case, chosen),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


@lru_cache(maxsize=256)
def in_place_kernel(
    case: Case, *, tuning: Tuning | None = None, share: Share | None = None
) -> Callable[..., Any]:
    """The kernel of a case in place; dormant chunks are neither read nor written.

    Returns:
      `(x, down, up, bias, slot, gains, words) -> (sums, where)` with `x` a reference, `words` from
      `live_words` and, of each program, `sums [programs, F + 64]`; `where [C, 2]` is for
      `gather_sums`.
    """
    chosen = tuning or replace(forward_tuning(case), group=1)
    shared = share or forward_share(case)

    def kernel(
        x: Any, down: Any, up: Any, bias: Any, slot: Any, gains: Any, words: Any, *rest: Any
    ) -> None:
        sums, where, *scratch = rest
        program = lax.axis_index("program")

        def serve(chunk: Any, part: Any, parts: Any) -> None:
            act = gains[chunk, 0]
            acts = [(chunk, slot[chunk], act, act != 0.0)]
            leave = [sums.at[program]]
            _walk(case, chosen, (x, None), (down, up, bias), acts, (part, parts), leave, scratch)

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


def _scratch(case: Case, chosen: Tuning) -> tuple[Any, ...]:
    width, rank, group = case.width, padded_rank(case), chosen.group
    minor = min(rank, COLUMNS)
    return (
        matrix(chosen.stages, ROWS, group * width),
        plgpu.SMEM((group, width + ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=chosen.stages),
        *(matrix(rank, width) for _ in range(group)),
        *(matrix(rank, width, minor=minor) for _ in range(group)),
        *(plgpu.SMEM((rank,), jnp.float32) for _ in range(group)),
    )


def _walk(
    case: Case,
    chosen: Tuning,
    activations: tuple[Any, Any],
    bank: tuple[Any, Any, Any],
    acts: list[tuple[Any, Any, Any, Any]],
    of_parts: tuple[Any, Any],
    leave: list[Any],
    scratch: list[Any],
) -> None:
    """One range of rows of G neighbouring chunks.

    Args:
      case: static part of the call.
      chosen: sizes.
      activations: x and y; y None to write into x, where an adapter acts.
      bank: down, up, bias.
      acts: chunk, slot, act and whether the adapter acts, of each chunk.
      of_parts: which range of how many.
      leave: where the sums of each chunk go.
      scratch: see `_scratch`.
    """
    x, y = activations
    part, parts = of_parts
    width, group, stages = case.width, chosen.group, chosen.stages
    num_blocks, tiles = width // COLUMNS, num_tiles(case)
    tile, sums_s, arrived, *weights = scratch
    downs, ups, biases = (weights[k * group : (k + 1) * group] for k in range(3))
    first = lax.div(part * tiles, parts)
    count = lax.div((part + 1) * tiles, parts) - first
    columns = pl.ds(acts[0][0] * width, group * width)

    def rows_of(ref: Any, step: Any) -> Any:
        return ref.at[pl.ds((first + step) * ROWS, ROWS), columns]

    def fetch(step: Any, buffer: Any) -> None:
        plgpu.copy_gmem_to_smem(rows_of(x, step), tile.at[buffer], arrived.at[buffer])

    for ahead in range(stages):
        pl.when(ahead < count)(partial(fetch, ahead, ahead))
    for j, (_, own, _, is_on) in enumerate(acts):
        pl.when(is_on)(partial(_bring, case, bank, own, (downs[j], ups[j], biases[j])))
    plgpu.commit_smem()

    def of_chunk(ref: Any, j: int) -> Any:
        return ref if group == 1 else ref.at[:, pl.ds(j * width, width)]

    def step(i: Any, carry: Any) -> Any:
        totals, squares = list(carry[:group]), list(carry[group:])
        buffer = lax.rem(i, stages)
        plgpu.barrier_wait(arrived.at[buffer])
        for j, (_, _, act, is_on) in enumerate(acts):
            current = of_chunk(tile.at[buffer], j)
            for k in range(num_blocks):
                wide = load(block(current, k, width)).astype(jnp.float32)
                totals[j] = totals[j] + jnp.sum(wide, axis=1)
                squares[j * num_blocks + k] = squares[j * num_blocks + k] + wide * wide

            @pl.when(is_on)
            def _act(j: int = j, act: Any = act, current: Any = current) -> None:
                a = _hidden(case, current, downs[j], biases[j])
                for k in range(num_blocks):
                    r = _product(a, block(ups[j], k, width))
                    narrow = load(block(current, k, width))
                    moved = (narrow.astype(jnp.float32) + act * r).astype(jnp.bfloat16)
                    block(current, k, width)[...] = jnp.where(jnp.abs(r) < jnp.inf, moved, narrow)

        plgpu.commit_smem()
        if y is None:
            pl.when(acts[0][3])(lambda: plgpu.copy_smem_to_gmem(tile.at[buffer], rows_of(x, i)))
        else:
            plgpu.copy_smem_to_gmem(tile.at[buffer], rows_of(y, i))
        # The tile of the step before has left, or does so while this one is on its way.
        refill = i - 1 + stages

        @pl.when((i > 0) & (refill < count))
        def _refill() -> None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            fetch(refill, lax.rem(refill, stages))

        return (*totals, *squares)

    start = (
        *(zero_rows() for _ in range(group)),
        *(zero_tile() for _ in range(group * num_blocks)),
    )
    carry = lax.fori_loop(0, count, step, start)
    for j in range(group):
        for k in range(num_blocks):
            squares = jnp.sum(carry[group + j * num_blocks + k], axis=0)
            sums_s[j, pl.ds(k * COLUMNS, COLUMNS)] = squares
        sums_s[j, pl.ds(width, ROWS)] = carry[j]
    plgpu.commit_smem()
    for j in range(group):
        plgpu.copy_smem_to_gmem(sums_s.at[j], leave[j])
    plgpu.wait_smem_to_gmem(0)


def _bring(case: Case, bank: tuple[Any, Any, Any], own: Any, room: tuple[Any, Any, Any]) -> None:
    """An adapter's matrices into shared memory, in bfloat16."""
    (down, up, bias), (down_s, up_s, bias_s) = bank, room
    rank, width = padded_rank(case), case.width
    flat: Any = plgpu.Layout.SMEM_GMEM_COPY
    layout = flat((rank, width), jnp.dtype(case.adapter_dtype), 2 * min(rank, COLUMNS))
    down_s.transpose((1, 0))[...] = bring(down.at[own]).astype(jnp.bfloat16)
    up_s[...] = bring(up.at[own], layout).astype(jnp.bfloat16)
    if case.has_bias:
        # As the reference sees it: rounded to the activation's dtype.
        row = bring(bias.at[own], plgpu.Layout.WGMMA.reduce(0))
        bias_s[...] = row.astype(jnp.bfloat16).astype(jnp.float32)


def _hidden(case: Case, x: Any, down: Any, bias: Any) -> jax.Array:
    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, x, down.transpose((1, 0)))
        return sums[...]

    h = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, padded_rank(case)), jnp.float32))
    if case.has_bias:
        h = add_bias(h, bias)
    return activate(case.activation, h).astype(jnp.bfloat16)


def _product(a: jax.Array, up: Any) -> jax.Array:
    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, up)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32))
