"""Counters with which the last program of a chunk knows itself, where kernels run side by side."""

from __future__ import annotations

import torch
from torch import Tensor

_SIZE = 1 << 20
_MOST = 1024
"""Counters that one stream is given: as many chunks as are ever counted."""

_pools: dict[torch.device, Tensor] = {}
_used: dict[torch.device, int] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(x: Tensor, chunks: int) -> Tensor | None:
    """Zeros that no other kernel uses at the same time; every kernel leaves zeros behind.

    A stream has its own, for its kernels follow one another. A captured graph may be replayed
    beside any stream, so each call that is captured gets counters for good.

    Args:
      x: says on which device, the current one, and on which stream the kernel will run.
      chunks: C.

    Returns:
      int32, [C] or longer, or None where there are none left, or none yet because the first call
      of all is captured: the caller then adds up in a second kernel, to the same bits.
    """
    if chunks > _MOST:
        return None
    stream, is_captured = 0, False
    if x.device.type == "cuda":
        stream = torch.cuda.current_stream(x.device).cuda_stream
        is_captured = torch.cuda.is_current_stream_capturing()
    if is_captured:
        given = _take(x.device, chunks) if x.device in _pools else None
    elif (x.device, stream) in _of_stream:
        given = _of_stream[x.device, stream]
    else:
        given = _take(x.device, _MOST)
        if given is not None:
            _of_stream[x.device, stream] = given
    return given


def _take(device: torch.device, size: int) -> Tensor | None:
    if device not in _pools:
        _pools[device], _used[device] = torch.zeros(_SIZE, dtype=torch.int32, device=device), 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will use it
    begin = _used[device]
    if begin + size > _SIZE:
        return None
    _used[device] = begin + -(-size // 32) * 32
    return _pools[device][begin : begin + size]
