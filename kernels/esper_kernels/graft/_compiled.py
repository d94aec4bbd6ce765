"""`graft` as compilers see it: inductor launches its kernels itself, among its own.

Where Triton serves a call, an operation here expands into kernels while it is compiled; elsewhere,
and where the number of rows is only known at run time, it stands for the one of `_operations`.
Their names' number changes with their kernels: compilers cache programs on disk by names.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from esper_kernels._records import (
    NUM_BACKWARD_STATISTICS,
    NUM_FORWARD_STATISTICS,
    NUM_STATISTICS,
    Adapter,
)
from esper_kernels.graft._blocks import NARROW, backward_tiles, forward_tiles, without_engine
from esper_kernels.graft._case import Case
from esper_kernels.graft._operations import backward_op, check_call, choose_for, forward_op
from esper_kernels.graft._triton_backward import backward_kernel
from esper_kernels.graft._triton_forward import forward_kernel
from esper_kernels.graft._triton_parts import IS_INTERPRETED
from esper_kernels.graft._triton_plan import backward_launches, forward_launches
from esper_kernels.graft._triton_reduce import reduce_kernel
from esper_kernels.graft._triton_statistics import statistics_kernel


def _is_open(case: Case, x: Tensor, implementation: str) -> bool:
    """Whether the kernels of a call can be named while it is compiled."""
    is_fixed = isinstance(case.rows, int) and case.rows > 0
    return (
        is_fixed
        and not IS_INTERPRETED
        and choose_for(case, x, implementation).implementation == "triton"
    )


@triton_op("esper::graft_open_v3", mutates_args=())
def graft_open(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    slot: Tensor,
    gains: Tensor,
    tap: Tensor | None,
    activation: str,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """See `esper_kernels.torch.graft`."""
    case = check_call(x, Adapter(down, up, bias, gate), slot, gains, activation, tap=tap)
    if not _is_open(case, x, implementation):
        y, watched = forward_op(
            x, down, up, bias, gate, slot, gains, tap, activation, implementation
        )
        return y, watched
    tiles = without_engine(forward_tiles(case))
    main, finish, room = forward_launches(
        case, tiles, only_reads=False, is_counted=False, is_compiled=True
    )
    y = torch.empty_like(x)
    watched = x.new_empty((case.chunks, NUM_FORWARD_STATISTICS), dtype=torch.float32)
    left = x.new_empty((room,), dtype=torch.float32) if room else watched
    sizes = case.rows, case.features, case.chunks, case.slots
    bank = down, up, x if bias is None else bias, x if gate is None else gate
    wrap_triton(forward_kernel)[(main.programs,)](
        x, y, *bank, slot, gains, left, watched, slot, *sizes, **main.constants
    )
    if finish is not None:
        wrap_triton(statistics_kernel)[(finish.programs,)](
            left, watched, case.rows, **finish.constants
        )
    return y, watched


@triton_op("esper::graft_open_backward_v3", mutates_args=())
def graft_open_backward(
    x: Tensor,
    dy: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    slot: Tensor,
    gains: Tensor,
    watched: Tensor,
    activation: str,
    implementation: str,
    is_beside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`dx`, the adapter's gradients (empty for what it lacks), and `channels` or both beside."""
    case = check_call(x, Adapter(down, up, bias, gate), slot, gains, activation, dy)
    if not _is_open(case, x, implementation):
        dx, d_down, d_up, d_bias, d_gate, channels = backward_op(
            x, dy, down, up, bias, gate, slot, gains, watched, activation, implementation
        )
        statistics = torch.cat([watched, channels], dim=1) if is_beside else channels
        return dx, d_down, d_up, d_bias, d_gate, statistics
    tiles = backward_tiles(case)
    tiles = replace(tiles, is_bulk=tiles.is_bulk and case.width <= NARROW)
    main, reduce, room = backward_launches(
        case, tiles, is_counted=False, is_beside=is_beside, is_open=True, is_compiled=True
    )
    dx, d_down, d_up = torch.empty_like(x), torch.empty_like(down), torch.empty_like(up)
    d_bias, d_gate = (
        x.new_empty(0) if leaf is None else torch.empty_like(leaf) for leaf in (bias, gate)
    )
    columns = NUM_STATISTICS if is_beside else NUM_BACKWARD_STATISTICS
    statistics = x.new_empty((case.chunks, columns), dtype=torch.float32)
    left = x.new_empty((room,), dtype=torch.float32)
    sizes = case.rows, case.features, case.chunks, case.slots
    bank = down, up, x if bias is None else bias, x if gate is None else gate
    # Matrices that an adapter lacks are never written; what stands for them must not seem to be.
    gradients = d_down, d_up, down if bias is None else d_bias, down if gate is None else d_gate
    results = *gradients, statistics
    arrays = x, dy, dx, *bank, slot, gains, left, watched, *results, slot
    wrap_triton(backward_kernel)[(main.programs,)](*arrays, *sizes, **main.constants)
    if reduce is not None:
        wrap_triton(reduce_kernel)[(reduce.programs,)](
            left, watched, slot, gains, *results, case.slots, **reduce.constants
        )
    return dx, d_down, d_up, d_bias, d_gate, statistics


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down, up, bias, gate, slot, gains, tap, activation, implementation = inputs
    ctx.save_for_backward(x, down, up, bias, gate, slot, gains, output[1])
    ctx.columns, ctx.static = 0 if tap is None else tap.shape[1], (activation, implementation)


def _pull(ctx: Any, dy: Tensor, d_watched: Tensor) -> tuple[Tensor | None, ...]:
    del d_watched  # statistics have no derivative
    x, down, up, bias, gate, slot, gains, watched = ctx.saved_tensors
    is_beside = ctx.columns == NUM_STATISTICS
    dx, d_down, d_up, d_bias, d_gate, statistics = graft_open_backward(
        x, dy.contiguous(), down, up, bias, gate, slot, gains, watched, *ctx.static, is_beside
    )
    d_bank = d_down, d_up, None if bias is None else d_bias, None if gate is None else d_gate
    return dx, *d_bank, None, None, statistics if ctx.columns else None, None, None


graft_open.register_autograd(_pull, setup_context=_save)
