"""Device time of work on a GPU, inputs rotated past its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], object]

_SLEEP_CYCLES = 4_000_000  # about two milliseconds: the host gets ahead of the device


def _turn(work: Call, calls: int, *, is_queued: bool) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if is_queued:
        torch.cuda._sleep(_SLEEP_CYCLES)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / calls


def _capture(calls: Sequence[Call], inner: int) -> Call:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(inner):
            calls[k % len(calls)]()
    replay: Call = graph.replay
    return replay


def time_torch(
    graphed: Mapping[str, Sequence[Call]],
    queued: Mapping[str, Sequence[Call]],
    *,
    repeats: int,
    inner: int = 18,
) -> dict[str, list[float]]:
    """Seconds a call by CUDA events, all functions in turns.

    Args:
      graphed: by name, the same work on several inputs, together larger than the cache; captured
      into one CUDA graph of `inner` calls.
      queued: the same for work that is enqueued behind a sleeping kernel instead.
      repeats: samples of each.
      inner: calls in one sample.
    """
    works: dict[str, tuple[Call, bool]] = {}
    for name, calls in graphed.items():
        works[name] = (_capture(calls, inner), False)
    for name, calls in queued.items():

        def queue(calls: Sequence[Call] = calls) -> None:
            for k in range(inner):
                calls[k % len(calls)]()

        queue()
        works[name] = (queue, True)
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(-2, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            work, is_queued = works[name]
            seconds = _turn(work, inner, is_queued=is_queued)
            if turn >= 0:
                samples[name].append(seconds)
    return samples


def time_jax(function: Any, inputs: Sequence[tuple[Any, ...]], *, repeats: int) -> list[float]:
    """Seconds of all kernels of a call, by CUPTI; `inputs` are taken in turns."""
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.measure(function)
    samples = []
    for turn in range(-len(inputs), repeats):
        _, milliseconds = measured(*inputs[turn % len(inputs)])
        if milliseconds is None:
            raise RuntimeError("CUPTI saw no kernel")
        if turn >= 0:
            samples.append(float(milliseconds) * 1e-3)
    return samples
