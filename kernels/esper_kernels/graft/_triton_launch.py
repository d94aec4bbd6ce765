"""Starts Triton kernels without asking Triton again what it compiled at their first call."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

Layout = tuple[list[int], list[int], list[int]]
"""Shape and strides of an activation, and a tile's shape."""


class Tile(TensorDescriptor):  # type: ignore[misc] # triton is untyped here
    """A descriptor that is not checked at every call: its case was, and where it begins."""

    def __init__(self, base: Tensor, layout: Layout) -> None:
        self.base = base
        self.shape, self.strides, self.block_shape = layout
        self.padding = "zero"
        self.round_f32_to_tf32 = False

    def checked(self) -> TensorDescriptor:
        """The same as Triton's own."""
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape)


class Launch:
    """One kernel for arguments that differ in nothing but where tensors lie.

    Triton binds, inspects and hashes every argument of every call to find what it compiled; that
    takes longer than most of these kernels. Here only the first call does so, and the others start
    what it compiled.

    Args:
      kernel: takes tiles, arrays and numbers of a call, then the constants.
      programs: how many run.
      constants: of the kernel, and options such as `num_warps`. With a true `OPENS` the kernel
        describes tiles, in memory that its launch allocates.
    """

    def __init__(self, kernel: Any, programs: int, constants: Mapping[str, Any]) -> None:
        self.kernel = kernel
        self.programs = programs
        self.constants = dict(constants)
        self._grid = (programs, 1, 1)
        self._opens = bool(constants.get("OPENS"))
        self._start: Any = None
        self._tail: tuple[Any, ...] = ()

    def __call__(
        self, tiles: Sequence[Tile], arrays: Sequence[Tensor], numbers: Sequence[int], stream: int
    ) -> None:
        """Start it on the current device.

        Args:
          tiles: activations that the copy engine moves.
          arrays: all other tensors.
          numbers: sizes.
          stream: the current one, as CUDA names it.
        """
        addresses = [array.data_ptr() for array in arrays]
        union = 0
        for address in addresses:
            union |= address
        # Triton compiles apart for arrays that do not begin at multiples of 16 bytes.
        is_aligned = union % 16 == 0
        if is_aligned and self._start is not None:
            # Addresses instead of tensors: Triton asks the driver about every tensor.
            arguments = *tiles, *addresses, *numbers, *self._tail
            if self._opens:
                _allocating().run(self._start, *arguments, stream=stream)
            else:
                self._start(*arguments, stream=stream)
            return
        checked = [tile.checked() for tile in tiles]
        run = self.kernel[self._grid]
        compiled = _allocating().run(run, *checked, *arrays, *numbers, **self.constants)
        if is_aligned and isinstance(compiled, CompiledKernel):
            names = self.kernel.arg_names[len(tiles) + len(arrays) + len(numbers) :]
            self._tail = tuple(self.constants[name] for name in names)
            self._start = compiled[self._grid]


def _allocating() -> Context:
    """A context of this thread with a Triton allocator; the caller's own stays as it is."""
    context: Context | None = getattr(_THREAD, "context", None)
    if context is None:
        context = _THREAD.context = Context()
        context.run(triton.set_allocator, _allocate)
    return context


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate bytes for a kernel on the current stream of the current device."""
    del alignment, stream  # torch's memory begins at multiples of 512
    return torch.empty(size, dtype=torch.int8, device="cuda")


_THREAD = threading.local()


def are_aligned(*arrays: Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    union = 0
    for array in arrays:
        union |= array.data_ptr()
    return union % 16 == 0


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` the current one, on which Triton starts its kernels."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


_NOWHERE = nullcontext()
