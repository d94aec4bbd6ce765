"""What a stream's kernels leave to one another: counters, and memory for sums."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_SIZE = 1 << 20
_MOST = 1024
"""Counters that one stream has: as many chunks as are ever counted."""
_MOST_FLOATS = 1 << 20
"""Floats that a stream retains for its next call."""

_pools: dict[int, Tensor] = {}
_used: dict[int, int] = {}
_counters: dict[tuple[int, int], Tensor | None] = {}
_floats: dict[tuple[int, int], Tensor] = {}


class Stream(NamedTuple):
    """Where a kernel will run."""

    device: int
    """Its number, -1 for the interpreter."""
    name: int
    """As CUDA names it."""
    is_captured: bool
    """Whether a graph captures it, which may be replayed beside any stream."""


def current_stream(x: Tensor) -> Stream:
    """The current one of the device of `x`, the current device."""
    device = x.get_device()
    if device < 0:
        return Stream(device, 0, is_captured=False)
    name = triton.runtime.driver.active.get_current_stream(device)
    return Stream(device, name, torch.cuda.is_current_stream_capturing())


def arrivals(x: Tensor, chunks: int, stream: Stream) -> Tensor | None:
    """Zeros with which the last program of a chunk knows itself; every kernel leaves zeros behind.

    A stream has its own, for its kernels follow one another. Each call that is captured gets
    counters for good.

    Args:
      x: says on which device.
      chunks: C.
      stream: where the kernel will run.

    Returns:
      int32, [C] or longer, or None where there are none left, or none yet because the first call
      of all is captured: the caller then adds up in a second kernel, to the same bits.
    """
    if chunks > _MOST:
        return None
    if stream.is_captured:
        return _take(x.device, stream.device, chunks) if stream.device in _pools else None
    key = stream.device, stream.name
    if key not in _counters:
        _counters[key] = _take(x.device, stream.device, _MOST)
    return _counters[key]


def floats(x: Tensor, size: int, stream: Stream) -> Tensor:
    """float32, `size` or longer, that holds anything; the stream's next call overwrites it."""
    if stream.is_captured or size > _MOST_FLOATS:
        return x.new_empty((size,), dtype=torch.float32)
    key = stream.device, stream.name
    memory = _floats.get(key)
    if memory is None or memory.shape[0] < size:
        memory = _floats[key] = x.new_empty((size,), dtype=torch.float32)
    return memory


def _take(device: torch.device, number: int, size: int) -> Tensor | None:
    if number not in _pools:
        # This thread may be allocating in the memory of a graph that is about to be captured.
        with ThreadPoolExecutor(1) as other:
            _pools[number] = other.submit(_zeros, device).result()
        _used[number] = 0
    begin = _used[number]
    if begin + size > _SIZE:
        return None
    _used[number] = begin + -(-size // 32) * 32
    return _pools[number][begin : begin + size]


def _zeros(device: torch.device) -> Tensor:
    zeros = torch.zeros(_SIZE, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams will use them
    return zeros
