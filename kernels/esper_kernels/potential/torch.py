"""`potential` for torch: a registered operation, in Triton or in plain torch."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from esper_kernels._dispatch import Choice, choose
from esper_kernels._errors import ArgumentError
from esper_kernels.potential import reference_torch
from esper_kernels.potential._case import PotentialCase, check

_TRITON = "esper_kernels.potential.triton_cuda"


def explain(x: Tensor, dy: Tensor, is_asked: Tensor, *, implementation: str = "auto") -> Choice:
    """What `potential` would run for these arguments, and why nothing better."""
    return _choose(_check(x, dy, is_asked), implementation)


def potential(x: Tensor, dy: Tensor, is_asked: Tensor, *, implementation: str = "auto") -> Tensor:
    """Squared size of `x^T dy` in each chunk that is asked for, 0 elsewhere; not differentiable.

    Args:
      x: [N, D], contiguous, bfloat16 or float32; cut into C chunks as `numpy.array_split` does.
      dy: [N, D], as `x`.
      is_asked: [C] bool, such as the chunks whose seeds are dormant.
      implementation: `auto`, `triton` or `reference`.

    Returns:
      [C] float32.

    Raises:
      ArgumentError: a dtype, rank, size, device or layout is wrong; names which.
      UnavailableError: `implementation` cannot serve the call; says why.

    >>> potential(torch.ones(3, 4), torch.ones(3, 4), torch.tensor([True, False])).tolist()
    [36.0, 0.0]
    """
    sizes: Tensor = _potential(x, dy, is_asked, implementation)
    return sizes


def _check(x: Tensor, dy: Tensor, is_asked: Tensor) -> PotentialCase:
    for name, of in {"x": x, "dy": dy, "is_asked": is_asked}.items():
        if of.device != x.device:
            raise ArgumentError(f"{name} is on {of.device}, x on {x.device}; move them together")
        if not of.is_contiguous():
            raise ArgumentError(f"{name} is not contiguous, strides {of.stride()}; .contiguous()")
    device = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "cpu"
    return check(x, dy, is_asked, device=device)


def _refuses_triton(case: PotentialCase) -> str | None:
    try:
        module = importlib.import_module(_TRITON)
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    refusal: str | None = module.refuses(case)
    return refusal


def _choose(case: PotentialCase, implementation: str) -> Choice:
    candidates = {"triton": _refuses_triton(case), "reference": None}
    return choose("potential", implementation, candidates, framework="torch")


@torch.library.custom_op("esper::potential", mutates_args=())
def _potential(x: Tensor, dy: Tensor, is_asked: Tensor, implementation: str) -> Tensor:
    case = _check(x, dy, is_asked)
    chosen = _choose(case, implementation).implementation
    backend: Any = importlib.import_module(_TRITON) if chosen == "triton" else reference_torch
    sizes: Tensor = backend.potential(case, x, dy, is_asked)
    return sizes


@_potential.register_fake
def _(x: Tensor, dy: Tensor, is_asked: Tensor, implementation: str) -> Tensor:
    _choose(_check(x, dy, is_asked), implementation)
    return x.new_empty(is_asked.shape, dtype=torch.float32)
