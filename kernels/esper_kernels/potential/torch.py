"""`potential` for torch: a registered operation, in Triton or in plain torch."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from esper_kernels._dispatch import Choice, choose
from esper_kernels._torch_choice import check_places, device_name, refuses_triton
from esper_kernels.potential import reference_torch
from esper_kernels.potential._case import PotentialCase, check

_TRITON = "esper_kernels.potential.triton_cuda"


def explain(x: Tensor, dy: Tensor, is_asked: Tensor, *, implementation: str = "auto") -> Choice:
    """What `potential` would run for these arguments, and why nothing better.

    Raises:
      ArgumentError: the arguments do not fit together.
      UnavailableError: `implementation` cannot serve them; says why.
    """
    return _choose(_check(x, dy, is_asked), x, implementation)


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
    check_places(x, {"dy": dy, "is_asked": is_asked})
    return check(x, dy, is_asked, device=device_name(x))


def _choose(case: PotentialCase, x: Tensor, implementation: str) -> Choice:
    candidates = {"triton": refuses_triton(_TRITON, case, x), "reference": None}
    return choose("potential", implementation, candidates, framework="torch")


@torch.library.custom_op("esper::potential", mutates_args=())
def _potential(x: Tensor, dy: Tensor, is_asked: Tensor, implementation: str) -> Tensor:
    case = _check(x, dy, is_asked)
    chosen = _choose(case, x, implementation).implementation
    backend: Any = importlib.import_module(_TRITON) if chosen == "triton" else reference_torch
    sizes: Tensor = backend.potential(case, x, dy, is_asked)
    return sizes


@_potential.register_fake
def _(x: Tensor, dy: Tensor, is_asked: Tensor, implementation: str) -> Tensor:
    _choose(_check(x, dy, is_asked), x, implementation)
    return x.new_empty(is_asked.shape, dtype=torch.float32)
