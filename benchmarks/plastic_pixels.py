"""Growth where pixels are permuted anew: see `benchmarks._plastic`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks import _plastic
from benchmarks import _streams as streams
from benchmarks._timing import Row


def measure(*, quick: bool) -> Mapping[str, Row]:
    """Measures all rows; `quick` takes a short stream, few seeds and few hyperparameters."""
    stream = streams.pixels
    short = partial(stream, num_tasks=2, task_images=320)
    return _plastic.measure(short if quick else stream, quick=quick)
