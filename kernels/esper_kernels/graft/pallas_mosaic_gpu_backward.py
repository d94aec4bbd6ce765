"""The backward kernel of `graft` on Hopper's matrix units and copy engine.

One pass: `x` and `dy` are read once and `dx` is written once. A program is one warpgroup that keeps
one chunk's matrices in shared memory and, over its range of rows, the gradients of the adapter in
registers:

    h = x down + bias       g = dy up^T        a = phi(h)       da = g phi'(h)
    r = a up                p = da down^T      dx = dy + input_grad_scale * p
    d_down += x^T da        d_up^T += dy^T a   d_bias += sum of da's rows

`a` and `da` feed `r` and `p` from registers, and the gradients from shared memory. The utility
needs no `r`: sum dy * r = sum a * g.
"""

from __future__ import annotations

from collections.abc import Callable
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
    activate_and_pull,
    add_bias,
    backward_tuning,
    block,
    is_live_at,
    load,
    num_tiles,
    padded_rank,
    share_out,
    zero_rows,
    zero_tile,
)
from esper_kernels.graft.pallas_mosaic_gpu_rows import (
    NUM_SUMS,
    Memory,
    Operands,
    Range,
    Results,
    Seed,
    is_narrow,
    name_memory,
    scratch_types,
    x_stages,
)


@lru_cache(maxsize=256)
def backward_kernel(
    case: Case, *, tuning: Tuning | None = None, share: Share | None = None
) -> Callable[..., Any]:
    """Build the kernel of a case.

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
    if share is None:
        body, grid = partial(_separate, case, chosen), (case.chunks * chosen.splits,)
    else:
        body, grid = partial(_in_place, case, chosen, share), (share.programs,)
    return plgpu.kernel(
        body,
        out_type=_outputs(case, chosen, share),
        grid=grid,
        grid_names=("program",),
        scratch_types=scratch_types(case, chosen),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _separate(
    case: Case,
    tuning: Tuning,
    x: Any,
    dy: Any,
    down: Any,
    up: Any,
    bias: Any,
    slot: Any,
    gains: Any,
    dx: Any,
    grads: Any,
    sums: Any,
    d_bias: Any,
    *scratch: Any,
) -> None:
    """The kernel's body where `dx` has memory of its own: every chunk has the same programs."""
    program = lax.axis_index("program")
    chunk, part = lax.rem(program, case.chunks), lax.div(program, case.chunks)
    live = is_live_at(case, slot, gains, chunk)
    results = Results(grads.at[part, chunk], sums.at[part, chunk], d_bias.at[part, chunk])
    seed = Seed(chunk, slot[chunk], gains[chunk, 2], live)
    operands = Operands(x, dy, dx, down, up, bias)
    _walk(case, tuning, operands, seed, results, scratch, part, tuning.splits)


def _in_place(
    case: Case,
    tuning: Tuning,
    share: Share,
    x: Any,
    dy: Any,
    down: Any,
    up: Any,
    bias: Any,
    slot: Any,
    gains: Any,
    words: Any,
    grads: Any,
    sums: Any,
    d_bias: Any,
    where: Any,
    *scratch: Any,
) -> None:
    """The kernel's body where `dx` is `dy`: the programs share the rows of the live chunks."""
    program = lax.axis_index("program")
    results = Results(grads.at[program], sums.at[program], d_bias.at[program])

    def serve(chunk: Any, part: Any, parts: Any) -> None:
        seed = Seed(chunk, slot[chunk], gains[chunk, 2], None)
        operands = Operands(x, dy, dy, down, up, bias)
        _walk(case, tuning, operands, seed, results, scratch, part, parts)

    share_out(case, share, words, where, serve)


def _outputs(case: Case, tuning: Tuning, share: Share | None) -> tuple[Any, ...]:
    rank = padded_rank(case)
    axes = (tuning.splits, case.chunks) if share is None else (share.programs,)
    sums = (
        jax.ShapeDtypeStruct((*axes, 2, case.width, rank), jnp.float32),
        jax.ShapeDtypeStruct((*axes, NUM_SUMS, ROWS), jnp.float32),
        jax.ShapeDtypeStruct((*axes, rank), jnp.float32),
    )
    if share is None:
        return (jax.ShapeDtypeStruct((case.rows, case.features), jnp.bfloat16), *sums)
    return (*sums, jax.ShapeDtypeStruct((case.chunks, 2), jnp.int32))


def _walk(
    case: Case,
    tuning: Tuning,
    operands: Operands,
    seed: Seed,
    results: Results,
    scratch: tuple[Any, ...],
    part: Any,
    parts: Any,
) -> None:
    """Walk over the range `part` of `parts` of a chunk's rows."""
    tiles = num_tiles(case)
    first = lax.div(part * tiles, parts)
    rows = Range(
        case=case,
        tuning=tuning,
        operands=operands,
        seed=seed,
        memory=name_memory(case, scratch),
        first=first,
        count=lax.div((part + 1) * tiles, parts) - first,
        columns=pl.ds(seed.chunk * case.width, case.width),
    )
    rows.when_live(rows.fetch_matrices)
    rows.fetch_first_tiles()
    if seed.live is not None:
        pl.when(jnp.logical_not(seed.live))(partial(_pass_dormant, rows, results))
    rows.when_live(partial(_pull, rows, results))
    plgpu.wait_smem_to_gmem(0)


def _load_slope(rows: Range, slope: Any, k: int) -> tuple[Any, Any]:
    """A block of `dy` as it is and in float32."""
    narrow = load(block(slope, k, rows.case.width))
    return narrow, narrow.astype(jnp.float32)


def _pass_dormant(rows: Range, results: Results) -> None:
    """`dx` is `dy`; only dy^2 is summed."""
    memory = rows.memory

    def pass_on(i: Any, gradient_square: Any) -> Any:
        buffer = lax.rem(i, rows.tuning.stages)
        plgpu.barrier_wait(memory.slope_arrived.at[buffer])
        for k in range(rows.case.width // COLUMNS):
            _, wide = _load_slope(rows, memory.slope.at[buffer], k)
            gradient_square = gradient_square + jnp.sum(wide * wide, axis=1)
        rows.send(i, memory.slope.at[buffer])
        return gradient_square

    memory.sums[0] = lax.fori_loop(0, rows.count, pass_on, zero_rows())
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory.sums, results.sums)


class _Carry(NamedTuple):
    """Sums that a live chunk's walk carries from tile to tile, by row of a tile."""

    gradient_square: Any
    output_square: Any
    worth: Any
    flaw: Any
    """0, or NaN once an entry of p was not finite."""
    d_bias: Any
    """[64, R], or 0 without a bias."""


def _pull(rows: Range, results: Results) -> None:
    """Walk over a live chunk's tiles, and store its gradients and sums."""
    case, memory, rank = rows.case, rows.memory, padded_rank(rows.case)
    plgpu.barrier_wait(memory.matrices_arrived)

    def accumulate(d_down: Any, d_up: Any) -> Any:
        start = _Carry(
            gradient_square=zero_rows(),
            output_square=zero_rows(),
            worth=zero_rows(),
            flaw=zero_rows(),
            d_bias=zero_tile(rank) if case.has_bias else 0,
        )
        step = partial(_pull_tile, rows, d_down, d_up)
        carry = lax.fori_loop(0, rows.count, step, start)
        for k in range(NUM_SUMS):
            memory.sums[k] = carry[k]
        if case.has_bias:
            memory.bias[...] = jnp.sum(carry.d_bias, axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.sums, results.sums)
        if case.has_bias:
            plgpu.copy_smem_to_gmem(memory.bias, results.d_bias)
        return d_down[...], d_up[...]

    gradient = plgpu.WGMMAAccumulatorRef((case.width, rank), jnp.float32)
    results.grads[0], results.grads[1] = pl.run_scoped(accumulate, gradient, gradient)


def _pull_tile(rows: Range, d_down: Any, d_up: Any, i: Any, carry: _Carry) -> _Carry:
    """One tile of a live chunk: its `dx`, and what it adds to gradients and sums."""
    case, memory = rows.case, rows.memory
    buffer, x_buffer = lax.rem(i, rows.tuning.stages), lax.rem(i, x_stages(rows.tuning))
    tile, slope = memory.x.at[x_buffer], memory.slope.at[buffer]
    plgpu.barrier_wait(memory.x_arrived.at[x_buffer])
    plgpu.barrier_wait(memory.slope_arrived.at[buffer])
    h, g = _hidden(case, memory, tile, slope)
    if case.has_bias:
        h = add_bias(h, memory.bias)
    a, da = activate_and_pull(case.activation, h, g)
    if case.has_bias and case.rows % ROWS != 0:
        # Rows past the end are zero, but phi(bias) is not.
        layout = plgpu.Layout.WGMMA
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, padded_rank(case)), 0, layout=layout)
        a = jnp.where(row + (rows.first + i) * ROWS < case.rows, a, 0.0)
    carry = carry._replace(worth=carry.worth + jnp.sum(a * g, axis=1))
    if case.has_bias:
        carry = carry._replace(d_bias=carry.d_bias + da)
    a, da = a.astype(jnp.bfloat16), da.astype(jnp.bfloat16)
    _add_gradients(case, memory, (tile, slope), (a, da), (d_down, d_up))
    moved = []
    for k in range(case.width // COLUMNS):
        carry, changed = _move_block(rows, slope, a, da, carry, k)
        moved.append(changed)
    plgpu.wgmma_wait(0)
    # All four warps have multiplied with all rows of the tiles before any is overwritten.
    plgpu.commit_smem()
    refill = i + x_stages(rows.tuning)
    pl.when(refill < rows.count)(partial(rows.fetch_x, refill, x_buffer))
    for k, changed in enumerate(moved):
        block(slope, k, case.width)[...] = changed
    rows.send(i, slope)
    return carry


def _hidden(case: Case, memory: Memory, tile: Any, slope: Any) -> tuple[Any, Any]:
    """`x down` and `dy up^T`."""

    def multiply(h_sums: Any, g_sums: Any) -> Any:
        plgpu.wgmma(h_sums, tile, memory.down.transpose((1, 0)))
        plgpu.wgmma(g_sums, slope, memory.up.transpose((1, 0)))
        return h_sums[...], g_sums[...]

    hidden = plgpu.WGMMAAccumulatorRef((ROWS, padded_rank(case)), jnp.float32)
    h, g = pl.run_scoped(multiply, hidden, hidden)
    return h, g


def _add_gradients(
    case: Case,
    memory: Memory,
    tiles: tuple[Any, Any],
    hidden: tuple[Any, Any],
    gradients: tuple[Any, Any],
) -> None:
    """Start `d_up^T += dy^T a` and `d_down += x^T da`."""
    (tile, slope), (a, da), (d_down, d_up) = tiles, hidden, gradients
    a_stored, da_stored = memory.a, memory.da
    if is_narrow(case):
        a_stored.transpose((1, 0))[...] = a
        da_stored.transpose((1, 0))[...] = da
    else:
        a_stored[...] = a
        da_stored[...] = da
    plgpu.commit_smem()
    if is_narrow(case):
        a_stored, da_stored = a_stored.transpose((1, 0)), da_stored.transpose((1, 0))
    plgpu.wgmma(d_up, slope.transpose((1, 0)), a_stored)
    plgpu.wgmma(d_down, tile.transpose((1, 0)), da_stored)


def _move_block(
    rows: Range, slope: Any, a: Any, da: Any, carry: _Carry, k: int
) -> tuple[_Carry, Any]:
    """The k-th block of columns of `dx`, and the sums with it."""
    width, memory = rows.case.width, rows.memory

    def multiply(r_sums: Any, p_sums: Any) -> Any:
        plgpu.wgmma(r_sums, a, block(memory.up_narrow, k, width))
        plgpu.wgmma(p_sums, da, block(memory.down_narrow, k, width))
        return r_sums[...], p_sums[...]

    outer = plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32)
    r, p = pl.run_scoped(multiply, outer, outer)
    output_square = carry.output_square + jnp.sum(r * r, axis=1)
    flaw = carry.flaw + jnp.sum(p * 0.0, axis=1)
    narrow, wide = _load_slope(rows, slope, k)
    gradient_square = carry.gradient_square + jnp.sum(wide * wide, axis=1)
    scale = rows.seed.input_grad_scale
    changed = (wide + scale * p).astype(jnp.bfloat16)
    changed = jnp.where((jnp.abs(p) < jnp.inf) & (scale != 0.0), changed, narrow)
    carry = carry._replace(gradient_square=gradient_square, output_square=output_square, flaw=flaw)
    return carry, changed
