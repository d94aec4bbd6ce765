"""Starts Triton kernels without asking Triton again what it found out at their first call."""

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
    takes longer than most of these kernels. Here the first call goes that way and the others start
    what it found.

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
        """Starts it on the current device.

        Args:
          tiles: activations that the copy engine moves.
          arrays: all other tensors.
          numbers: sizes.
          stream: the current one, as CUDA names it.
        """
        places = [of.data_ptr() for of in arrays]
        every = 0
        for place in places:
            every |= place
        # Triton compiles apart for what begins elsewhere than at 16 bytes, so that goes its way.
        is_aligned = every % 16 == 0
        if is_aligned and self._start is not None:
            # A place instead of its tensor: Triton asks the driver about every tensor.
            given = *tiles, *places, *numbers, *self._tail
            if self._opens:
                _allocating().run(self._start, *given, stream=stream)
            else:
                self._start(*given, stream=stream)
            return
        told = [of.checked() for of in tiles]
        run = self.kernel[self._grid]
        compiled = _allocating().run(run, *told, *arrays, *numbers, **self.constants)
        if is_aligned and isinstance(compiled, CompiledKernel):
            num_given = len(tiles) + len(arrays) + len(numbers)
            names = self.kernel.arg_names[num_given:]
            self._tail = tuple(self.constants[name] for name in names)
            self._start = compiled[self._grid]


def _allocating() -> Context:
    """A context of this thread with a Triton allocator; the caller's own stays as it is."""
    found: Context | None = getattr(_THREAD, "context", None)
    if found is None:
        found = _THREAD.context = Context()
        found.run(triton.set_allocator, _allocate)
    return found


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Bytes for a kernel on the current stream of the current device."""
    del alignment, stream  # torch's memory begins at multiples of 512
    return torch.empty(size, dtype=torch.int8, device="cuda")


_THREAD = threading.local()


def are_aligned(*arrays: Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    places = 0
    for of in arrays:
        places |= of.data_ptr()
    return places % 16 == 0


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one, on which Triton starts its kernels."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


_NOWHERE = nullcontext()
