"""Measured figures, and how to take them fairly on a machine that is not quiet."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType

import numpy as np

SECONDS: Mapping[str, float] = MappingProxyType({"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9})
"""Units of time; `summarise` takes seconds and turns them into these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure of a benchmark, ours or a rival's.

    Args:
      median: Middle of the samples.
      low: Their first quartile.
      high: Their third quartile.
      unit: Unit of these three.
      count: Number of samples, at least 1.
      extra: Whatever else a reader needs (shapes, dtypes, what was counted); values go to JSON.

    Raises:
      ValueError: When a number is not finite, the three are not in order, or `extra` reuses a
        name of this list.
    """

    median: float
    low: float
    high: float
    unit: str
    count: int
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        figures = (self.low, self.median, self.high)
        if not all(map(math.isfinite, figures)) or sorted(figures) != list(figures):
            raise ValueError(
                f"low={self.low}, median={self.median}, high={self.high} must be finite and in "
                f"this order."
            )
        if not self.unit or self.count < 1:
            raise ValueError(
                f"unit={self.unit!r} must be named and count={self.count} must be at least 1."
            )
        taken = {own.name for own in fields(self)} & set(self.extra)
        if taken:
            raise ValueError(f"extra may not hold {', '.join(sorted(taken))}: a row has these.")


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turns, so that a drift of the machine hits all of them equally.

    In each repeat every function has one turn, and the one that goes first rotates. Sample `i` of
    one function and sample `i` of another are neighbours in time: compare them with `ratio`.

    Args:
      functions: What to time, by name; each returns only when its work is done (call
        `jax.block_until_ready` inside).
      repeats: Samples of each function, at least 1.
      warmup: Turns that are not timed, before the first sample.
      inner: Calls in one turn; a sample is their mean.
      clock: Returns seconds.

    Returns:
      Seconds a call, `repeats` samples for each name.

    Raises:
      ValueError: When there is no function or a number is out of bounds.
    """
    if not functions or repeats < 1 or warmup < 0 or inner < 1:
        raise ValueError(
            f"functions={list(functions)} must not be empty, repeats={repeats} and inner={inner} "
            f"must be at least 1, warmup={warmup} at least 0."
        )
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall into one function's turn
    try:
        for turn in range(-warmup, repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                function = functions[name]
                start = clock()
                for _ in range(inner):
                    function()
                elapsed = clock() - start
                if turn >= 0:
                    samples[name].append(elapsed / inner)
    finally:
        if was_collecting:
            gc.enable()
    return samples


def summarise(samples: Sequence[float], unit: str, **extra: object) -> Row:
    """Return median and quartiles of samples.

    Args:
      samples: At least one; in seconds where `unit` is a unit of time (s, ms, us, ns), as
        `time_interleaved` gives them, else in `unit`.
      unit: Unit of the row.
      **extra: `Row.extra`.

    Raises:
      ValueError: When there is no sample or one is not finite.

    Example:
      >>> row = summarise([0.001, 0.002, 0.003], "ms")
      >>> row.low, row.median, row.high
      (1.5, 2.0, 2.5)
    """
    if not len(samples):
        raise ValueError("samples must hold at least one figure.")
    low, median, high = np.quantile(np.asarray(samples, float) / SECONDS.get(unit, 1.0), _QUANTILES)
    return Row(
        median=float(median),
        low=float(low),
        high=float(high),
        unit=unit,
        count=len(samples),
        extra=extra,
    )


def ratio(samples_a: Sequence[float], samples_b: Sequence[float], **extra: object) -> Row:
    """Return median and quartiles of the pairwise ratios `a_i / b_i`.

    Args:
      samples_a: Samples of the numerator, neighbours in time of those of the denominator.
      samples_b: As many samples of the denominator, all positive.
      **extra: `Row.extra`.

    Raises:
      ValueError: When the samples do not pair, or one of the denominator is not positive.

    Example:
      >>> ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]).median
      3.0
    """
    if len(samples_a) != len(samples_b):
        raise ValueError(f"{len(samples_a)} samples do not pair with {len(samples_b)}.")
    if min(samples_b, default=1.0) <= 0:
        raise ValueError(f"samples_b must be positive; the least is {min(samples_b)}.")
    return summarise([a / b for a, b in zip(samples_a, samples_b, strict=True)], "ratio", **extra)


def exact(value: float, unit: str, **extra: object) -> Row:
    """Return a figure that was counted, not sampled.

    Args:
      value: The figure, in `unit`.
      unit: Unit of the row.
      **extra: `Row.extra`.
    """
    return Row(median=value, low=value, high=value, unit=unit, count=1, extra=extra)


_QUANTILES = (0.25, 0.5, 0.75)
