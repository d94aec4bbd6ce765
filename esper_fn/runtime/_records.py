"""What the training loop reports: a segment, and a finished run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from esper_fn._growth import StepInfo


class Segment(NamedTuple):
    """What `fit` hands to its listener after each segment."""

    first_step: int
    num_steps: int
    state: Any
    """A `TrainState` (for `fit_host`: the parameters), on the device; read it, do not keep it."""
    losses: np.ndarray
    """float[T] training losses."""
    infos: StepInfo | None
    """Of every step, on the host; None for `fit_host`."""
    events: list[dict[str, Any]]
    rollbacks: list[dict[str, Any]]
    """See `rollback_reports`."""


class Fit(NamedTuple):
    """A finished run."""

    state: Any
    losses: np.ndarray
    events: list[dict[str, Any]]
    num_compiled: int
    """Programs compiled after the first segment and its report: 0 unless the listener compiles."""
    num_rollbacks: int
    num_parameters: int
    """Of the adapters that act at the end."""
    adapter_flops: float
    """Forward operations of live adapters on one example, summed over the steps."""
    num_passes: int
    """Forward passes spent on surveys (a backward pass counts as two)."""
    survey_flops: float
    """Forward operations of live adapters on one example, summed over those passes."""
    rollbacks: list[dict[str, Any]]
    """What the governor rolled back and quarantined, and why; see `rollback_reports`."""
    num_steps: int
    """Steps done in all; fewer than asked for where `should_stop` ended the run."""
    resumed_from: int | None
    """The step the run went on from, if it did."""


Listener = Callable[[Segment], None]
