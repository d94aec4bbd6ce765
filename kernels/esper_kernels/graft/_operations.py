"""The registered operations of `graft` for torch, with shapes, derivatives and a choice of backend.

Compilers do not look into these; `_compiled` has what they see where Triton serves a call.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from esper_kernels._dispatch import Choice, choose
from esper_kernels._errors import ArgumentError
from esper_kernels._records import (
    NUM_BACKWARD_STATISTICS,
    NUM_FORWARD_STATISTICS,
    NUM_STATISTICS,
    Adapter,
)
from esper_kernels._torch_choice import check_devices, device_name, refuses_triton
from esper_kernels.graft import reference_torch
from esper_kernels.graft._case import Case, check

TRITON = "esper_kernels.graft.triton_cuda"


def check_call(
    x: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    activation: str,
    *others: Tensor,
    tap: Tensor | None = None,
) -> Case:
    """Check a call and return its case; `others` must be as `x` is."""
    leaves = {f"adapter.{name}": leaf for name, leaf in adapter._asdict().items()}
    check_devices(x, {"slot": slot, "gains": gains, **leaves})
    for other in others:
        if (other.shape, other.dtype, other.device) != (x.shape, x.dtype, x.device):
            raise ArgumentError(
                f"dy is {tuple(other.shape)} {other.dtype} on {other.device}; it must be as x: "
                f"{tuple(x.shape)} {x.dtype} on {x.device}"
            )
    case = check(x, adapter, slot, gains, activation=activation, device=device_name(x))
    shapes = [(case.chunks, NUM_BACKWARD_STATISTICS), (case.chunks, NUM_STATISTICS)]
    if tap is not None and (tuple(tap.shape) not in shapes or tap.dtype != torch.float32):
        raise ArgumentError(
            f"tap is {tuple(tap.shape)} {tap.dtype}; it must be float32, {shapes[0]} or {shapes[1]}"
        )
    return case


def choose_for(case: Case, x: Tensor, implementation: str) -> Choice:
    """Choose what serves a case on the device of `x`."""
    candidates = {
        "triton": refuses_triton(TRITON, case, x),
        "reference": reference_torch.refuses(case),
    }
    return choose("graft", implementation, candidates, framework="torch")


def backend_of(case: Case, x: Tensor, implementation: str) -> Any:
    """Import the module of what `choose_for` chooses."""
    chosen = choose_for(case, x, implementation).implementation
    return importlib.import_module(TRITON) if chosen == "triton" else reference_torch


# --- registered ------------------------------------------------------------------------------


@torch.library.custom_op("esper::graft", mutates_args=())
def forward_op(
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
    adapter = Adapter(down, up, bias, gate)
    case = check_call(x, adapter, slot, gains, activation, tap=tap)
    y, watched = backend_of(case, x, implementation).forward(case, x, adapter, slot, gains)
    return y, watched


@forward_op.register_fake
def _(
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
    case = check_call(x, Adapter(down, up, bias, gate), slot, gains, activation)
    choose_for(case, x, implementation)
    return torch.empty_like(x), _empty_rows(x, slot, NUM_FORWARD_STATISTICS)


def _empty_rows(x: Tensor, slot: Tensor, columns: int) -> Tensor:
    return x.new_empty((slot.shape[0], columns), dtype=torch.float32)


@torch.library.custom_op("esper::graft_backward", mutates_args=())
def backward_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    adapter = Adapter(down, up, bias, gate)
    case = check_call(x, adapter, slot, gains, activation, dy)
    backend = backend_of(case, x, implementation)
    dx, d_adapter, channels = backend.backward(case, x, dy, adapter, slot, gains, watched)
    nothing = [x.new_empty(0) if leaf is None else leaf for leaf in d_adapter]
    return dx, *nothing, channels


@backward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_call(x, Adapter(down, up, bias, gate), slot, gains, activation, dy)
    leaves = [x.new_empty(0) if leaf is None else torch.empty_like(leaf) for leaf in (bias, gate)]
    bank = torch.empty_like(down), torch.empty_like(up), *leaves
    return torch.empty_like(x), *bank, _empty_rows(x, slot, NUM_BACKWARD_STATISTICS)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down, up, bias, gate, slot, gains, tap, activation, implementation = inputs
    ctx.save_for_backward(x, down, up, bias, gate, slot, gains, output[1])
    ctx.columns, ctx.static = 0 if tap is None else tap.shape[1], (activation, implementation)


def _pull(ctx: Any, dy: Tensor, d_watched: Tensor) -> tuple[Tensor | None, ...]:
    del d_watched  # statistics have no derivative
    x, down, up, bias, gate, slot, gains, watched = ctx.saved_tensors
    dx, d_down, d_up, d_bias, d_gate, channels = backward_op(
        x, dy.contiguous(), down, up, bias, gate, slot, gains, watched, *ctx.static
    )
    statistics = None
    if ctx.columns:
        is_alone = ctx.columns == NUM_BACKWARD_STATISTICS
        statistics = channels if is_alone else torch.cat([watched, channels], dim=1)
    d_bank = d_down, d_up, None if bias is None else d_bias, None if gate is None else d_gate
    return dx, *d_bank, None, None, statistics, None, None


forward_op.register_autograd(_pull, setup_context=_save)
