"""`graft` for torch: what is called, and what is known of a call before it runs.

All of it works under `torch.compile` without a graph break.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from esper_kernels._dispatch import Choice
from esper_kernels._records import Adapter
from esper_kernels._torch_choice import check_devices, device_name
from esper_kernels.graft._case import check_watched
from esper_kernels.graft._operations import (
    backend_of,
    check_call,
    choose_for,
    forward_op,
)

_HAS_TRITON = find_spec("triton") is not None


def explain(
    x: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> Choice:
    """Tell what `graft` would run for these arguments, and why nothing better.

    Args:
      x: as for `graft`, and so are all other arguments.
      adapter: see `graft`.
      slot: see `graft`.
      gains: see `graft`.
      activation: see `graft`.
      implementation: see `graft`.

    Raises:
      ArgumentError: the arguments do not fit together.
      UnavailableError: `implementation` cannot serve them; says why.
    """
    return choose_for(check_call(x, adapter, slot, gains, activation), x, implementation)


def graft(
    x: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    tap: Tensor | None = None,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `y = x + output_scale * adapter(x)` in the live chunks, and statistics of `x`.

    `y` can be differentiated once.

    `gains` get no gradient: they are set, not learned. The README beside this file has the
    mathematics and defines `watched` and `channels`, the statistics of both passes.

    Args:
      x: [N, D], contiguous, bfloat16 or float32.
      adapter: matrices of P slots.
      slot: [C] int32, the slot that serves each chunk, -1 for none.
      gains: [C, 4] float32, the columns of `Gains`.
      tap: float32 zeros, or None. [C, 5]: `channels` arrive as its gradient; [C, 10]: `watched`
        and `channels` beside each other.
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
    >>> adapter = Adapter(down=torch.ones(1, 2, 1), up=up)
    >>> slot = torch.tensor([-1, 0], dtype=torch.int32)
    >>> y, watched = graft(x, adapter, slot, torch.ones(2, 4))
    >>> y[0].tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    if _HAS_TRITON and torch.compiler.is_compiling():
        from esper_kernels.graft._compiled import graft_open  # loads Triton

        y, watched = graft_open(x, *adapter, slot, gains, tap, activation, implementation)
    else:
        y, watched = forward_op(x, *adapter, slot, gains, tap, activation, implementation)
    return y, watched


def watch(x: Tensor, chunks: int, *, implementation: str = "auto") -> Tensor:
    """Measure an activation on which no adapter acts, in one read of it.

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
    check_devices(x, {})
    rows = x.detach().reshape(-1, x.shape[-1])
    case = check_watched(rows, chunks, device=device_name(x))
    watched: Tensor = backend_of(case, rows, implementation).watch(case, rows)
    return watched


class Calls(Protocol):
    """The passes of many calls alike; made by `bind`. They have no derivative and check nothing."""

    def forward(
        self, x: Tensor, adapter: Adapter, slot: Tensor, gains: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `y` and `watched` of `graft`."""

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        adapter: Adapter,
        slot: Tensor,
        gains: Tensor,
        watched: Tensor,
        *,
        is_beside: bool = False,
    ) -> tuple[Tensor, Adapter, Tensor]:
        """Return `dx`, the adapter's gradients and `channels`, if `is_beside` after `watched`."""


def bind(
    x: Tensor,
    adapter: Adapter,
    slot: Tensor,
    gains: Tensor,
    *,
    activation: str = "none",
    implementation: str = "auto",
) -> Calls:
    """Return what runs `graft` for arguments of these shapes, dtypes, devices and layouts.

    For callers with an autograd function of their own, who call again and again: checks and the
    way through torch's dispatcher take longer than a small kernel does.

    Args:
      x: as of `graft`, or with more leading axes than one; all other arguments as there.
      adapter: see `graft`.
      slot: see `graft`.
      gains: see `graft`.
      activation: see `graft`.
      implementation: see `graft`.

    Raises:
      ArgumentError: as `graft` does.
      UnavailableError: as `graft` does.
    """
    rows = x.reshape(-1, x.shape[-1])
    case = check_call(rows, adapter, slot, gains, activation)
    calls: Calls = backend_of(case, rows, implementation).bind(case, rows)
    return calls
