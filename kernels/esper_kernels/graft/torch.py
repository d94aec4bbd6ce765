"""`graft` for torch: registered operations with shapes, derivatives and a choice of implementation.

All of it works under `torch.compile` without a graph break: the compiler sees one operation.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from esper_kernels._dispatch import Choice, choose
from esper_kernels._errors import ArgumentError
from esper_kernels._torch_choice import check_places, device_name, refuses_triton
from esper_kernels.graft import reference_torch
from esper_kernels.graft._case import NUM_CHANNELS, NUM_WATCHED, Body, Case, check, check_watched

_TRITON = "esper_kernels.graft.triton_cuda"


def explain(
    x: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> Choice:
    """What `graft` would run for these arguments, and why nothing better.

    Raises:
      ArgumentError: the arguments do not fit together.
      UnavailableError: `implementation` cannot serve them; says why.
    """
    return _choose(_check(x, body, slot, gains, activation), x, implementation)


def graft(
    x: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    tap: Tensor | None = None,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y = x + act * body(x)` in the live chunks, and what seeds watch; differentiable once.

    `gains` get no gradient: they are set, not learned. The README beside this file has the
    mathematics.

    Args:
      x: [N, D], contiguous, bfloat16 or float32.
      body: matrices of P slots.
      slot: [C] int32, the slot that serves each chunk, -1 for none.
      gains: [C, 3] float32: act, learn, feel.
      tap: [C, 5] float32 zeros, or None; `channels` arrive as its gradient.
      activation: `none`, `relu`, `gelu`, `silu` or `gated`.
      implementation: `auto`, `triton` or `reference`.

    Returns:
      y: [N, D].
      watched: [C, 5] float32, not differentiable.

    Raises:
      ArgumentError: a dtype, rank, size, device or layout is wrong; names which.
      UnavailableError: `implementation` cannot serve the call; says why. (Both while tracing under
        `torch.compile`, inside torch's own error.)

    >>> x, up = torch.ones(2, 4), torch.ones(1, 1, 2)
    >>> body = Body(down=torch.ones(1, 2, 1), up=up)
    >>> slot = torch.tensor([-1, 0], dtype=torch.int32)
    >>> y, watched = graft(x, body, slot, torch.ones(2, 3))
    >>> y[0].tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    y, watched = _graft(x, *body, slot, gains, tap, activation, implementation)
    return y, watched


def graft_(
    x: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> Tensor:
    """`graft` into the memory of `x`: dormant chunks cost nothing. Not differentiable.

    Returns:
      watched: [C, 5] float32; zero rows, not measured, for dormant chunks.

    Raises:
      ArgumentError: also when a gradient would have to pass, whose derivative needs the `x` that
        is lost.
    """
    if torch.is_grad_enabled() and any(
        of is not None and of.requires_grad for of in (x, gains, *body)
    ):
        raise ArgumentError(
            "graft_ overwrites the x that its derivative needs; call it under torch.no_grad(), or "
            "call graft"
        )
    watched: Tensor = _graft_in_place(x, *body, slot, gains, activation, implementation)
    return watched


def watch(x: Tensor, chunks: int, *, implementation: str = "auto") -> Tensor:
    """What seeds watch of an activation on which no body acts: one read of it.

    Args:
      x: [..., D], contiguous, bfloat16 or float32.
      chunks: C.
      implementation: `auto`, `triton` or `reference`.

    Returns:
      [C, 5] float32, not differentiable: num_values, total, square, num_features, num_dead.

    Raises:
      ArgumentError: a dtype, layout or number is wrong; names which.
      UnavailableError: `implementation` cannot serve the call; says why.

    >>> watch(torch.ones(2, 4), 2).tolist()[0]
    [4.0, 4.0, 4.0, 2.0, 0.0]
    """
    check_places(x, {})
    rows = x.detach().reshape(-1, x.shape[-1])
    case = check_watched(rows, chunks, device=device_name(x))
    watched: Tensor = _backend(case, rows, implementation).watch(case, rows)
    return watched


class Calls(Protocol):
    """The passes of many calls alike; made by `bind`. They have no derivative and check nothing."""

    def forward(self, x: Tensor, body: Body, slot: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """`y` and `watched` of `graft`."""

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        body: Body,
        slot: Tensor,
        gains: Tensor,
        watched: Tensor,
        *,
        is_beside: bool = False,
    ) -> tuple[Tensor, Body, Tensor]:
        """`dx`, the body's gradients and `channels`, where `is_beside` with `watched` before it."""


def bind(
    x: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> Calls:
    """What runs `graft` for arguments of these shapes, dtypes, devices and layouts.

    For callers with an autograd function of their own, who call again and again: checks and the
    way through torch's dispatcher take longer than a small kernel does.

    Args:
      x: as of `graft`, or with more leading axes than one; all other arguments as there.
      body: see `graft`.
      slot: see `graft`.
      gains: see `graft`.
      activation: see `graft`.
      implementation: see `graft`.

    Raises:
      ArgumentError, UnavailableError: as `graft`.
    """
    rows = x.reshape(-1, x.shape[-1])
    case = _check(rows, body, slot, gains, activation)
    calls: Calls = _backend(case, rows, implementation).bind(case, rows)
    return calls


# --- checks and choice -----------------------------------------------------------------------


def _check(
    x: Tensor, body: Body, slot: Tensor, gains: Tensor, activation: str, *others: Tensor
) -> Case:
    leaves = {f"body.{name}": of for name, of in body._asdict().items()}
    check_places(x, {"slot": slot, "gains": gains, **leaves})
    for of in others:
        if of.shape != x.shape or of.dtype != x.dtype or of.device != x.device:
            raise ArgumentError(
                f"dy is {tuple(of.shape)} {of.dtype} on {of.device}; it must be as x: "
                f"{tuple(x.shape)} {x.dtype} on {x.device}"
            )
    return check(x, body, slot, gains, activation=activation, device=device_name(x))


def _choose(case: Case, x: Tensor, implementation: str) -> Choice:
    candidates = {
        "triton": refuses_triton(_TRITON, case, x),
        "reference": reference_torch.refuses(case),
    }
    return choose("graft", implementation, candidates, framework="torch")


def _backend(case: Case, x: Tensor, implementation: str) -> Any:
    chosen = _choose(case, x, implementation).implementation
    return importlib.import_module(_TRITON) if chosen == "triton" else reference_torch


# --- registered operations -------------------------------------------------------------------


@torch.library.custom_op("esper::graft", mutates_args=())
def _graft(
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
    body = Body(down, up, bias, gate)
    case = _check(x, body, slot, gains, activation)
    y, watched = _backend(case, x, implementation).forward(case, x, body, slot, gains)
    return y, watched


@_graft.register_fake
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
    case = _check(x, Body(down, up, bias, gate), slot, gains, activation)
    _choose(case, x, implementation)
    return torch.empty_like(x), _of_chunks(x, slot, NUM_WATCHED)


def _of_chunks(x: Tensor, slot: Tensor, columns: int) -> Tensor:
    return x.new_empty((slot.shape[0], columns), dtype=torch.float32)


@torch.library.custom_op("esper::graft_", mutates_args=("x",))
def _graft_in_place(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    slot: Tensor,
    gains: Tensor,
    activation: str,
    implementation: str,
) -> Tensor:
    body = Body(down, up, bias, gate)
    case = _check(x, body, slot, gains, activation)
    backend = _backend(case, x, implementation)
    watched: Tensor = backend.forward_in_place(case, x, body, slot, gains)[1]
    return watched


@_graft_in_place.register_fake
def _(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    slot: Tensor,
    gains: Tensor,
    activation: str,
    implementation: str,
) -> Tensor:
    case = _check(x, Body(down, up, bias, gate), slot, gains, activation)
    _choose(case, x, implementation)
    return _of_chunks(x, slot, NUM_WATCHED)


@torch.library.custom_op("esper::graft_backward", mutates_args=())
def _graft_backward(
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
    body = Body(down, up, bias, gate)
    case = _check(x, body, slot, gains, activation, dy)
    backend = _backend(case, x, implementation)
    dx, d_body, channels = backend.backward(case, x, dy, body, slot, gains, watched)
    nothing = [x.new_empty(0) if leaf is None else leaf for leaf in d_body]
    return dx, *nothing, channels


@_graft_backward.register_fake
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
    _check(x, Body(down, up, bias, gate), slot, gains, activation, dy)
    leaves = [x.new_empty(0) if of is None else torch.empty_like(of) for of in (bias, gate)]
    bank = torch.empty_like(down), torch.empty_like(up), *leaves
    return torch.empty_like(x), *bank, _of_chunks(x, slot, NUM_CHANNELS)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down, up, bias, gate, slot, gains, tap, activation, implementation = inputs
    ctx.save_for_backward(x, down, up, bias, gate, slot, gains, output[1])
    ctx.has_tap, ctx.static = tap is not None, (activation, implementation)


def _pull(ctx: Any, dy: Tensor, d_watched: Tensor) -> tuple[Tensor | None, ...]:
    del d_watched  # statistics have no derivative
    x, down, up, bias, gate, slot, gains, watched = ctx.saved_tensors
    dx, d_down, d_up, d_bias, d_gate, channels = _graft_backward(
        x, dy.contiguous(), down, up, bias, gate, slot, gains, watched, *ctx.static
    )
    return (
        dx,
        d_down,
        d_up,
        None if bias is None else d_bias,
        None if gate is None else d_gate,
        None,
        None,
        channels if ctx.has_tap else None,
        None,
        None,
    )


_graft.register_autograd(_pull, setup_context=_keep)
