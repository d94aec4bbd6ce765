"""What the operations for torch check before they choose."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper_kernels._errors import ArgumentError

MIN_CAPABILITY = (8, 0)
"""Compute capability from which there are bfloat16 matrix units."""


def device_name(x: Tensor) -> str:
    """Return `cpu`, or an accelerator's name such as `NVIDIA H200`."""
    return torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "cpu"


def check_devices(x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Check that all tensors are on the device of `x` and contiguous.

    Raises:
      ArgumentError: one is elsewhere or has gaps; names which.
    """
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ArgumentError(
                f"{name} is on {tensor.device}, x on {x.device}; move them together"
            )
        if not tensor.is_contiguous():
            raise ArgumentError(
                f"{name} is not contiguous, strides {tensor.stride()}; .contiguous()"
            )


def refuses_triton(module: str, case: Any, x: Tensor) -> str | None:
    """Tell why the kernels of `module` cannot serve a case where `x` is; None if they can."""
    if x.device.type not in {"cuda", "cpu"}:
        return f"x is on {x.device}; Triton serves CUDA devices"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < MIN_CAPABILITY:
        return f"{case.device} has no bfloat16 matrix units (compute capability 8.0)"
    try:
        backend = importlib.import_module(module)
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    refusal: str | None = backend.refuses(case)
    return refusal
