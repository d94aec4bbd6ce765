"""Starts Triton kernels without asking Triton again what it found out at their first call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(TensorDescriptor):  # type: ignore[misc] # triton is untyped here
    """A descriptor that is not checked at every call: its case was, and where it begins."""

    def __post_init__(self) -> None:
        pass

    def checked(self) -> TensorDescriptor:
        """The same as Triton's own."""
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape)


class Launch:
    """One kernel for arguments that differ in nothing but where tensors lie.

    Triton binds, inspects and hashes every argument of every call to find what it compiled; that
    takes longer than most of these kernels. Here the first call goes that way and the others start
    what it found.

    Args:
      kernel: takes the arrays and numbers of a call, then the constants.
      programs: how many run.
      constants: of the kernel, and options such as `num_warps`.
    """

    def __init__(self, kernel: Any, programs: int, constants: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        self._constants = dict(constants)
        self._start: Any = None
        self._tail: tuple[Any, ...] = ()

    def __call__(self, *given: Any, is_aligned: bool) -> None:
        """Starts it on the current device and stream.

        Args:
          *given: arrays and numbers.
          is_aligned: whether all arrays begin at multiples of 16 bytes, as fresh ones do; Triton
            compiles apart for others, which therefore always go its way.
        """
        if is_aligned and self._start is not None:
            self._start(*given, *self._tail)
            return
        told = [of.checked() if isinstance(of, Tile) else of for of in given]
        compiled = self._kernel[self._grid](*told, **self._constants)
        if is_aligned and isinstance(compiled, CompiledKernel):
            names = self._kernel.arg_names[len(given) :]
            self._tail = tuple(self._constants[name] for name in names)
            self._start = compiled[self._grid]


def are_aligned(*arrays: Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    places = 0
    for of in arrays:
        places |= of.data_ptr()
    return places % 16 == 0


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one, on which Triton starts its kernels."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
