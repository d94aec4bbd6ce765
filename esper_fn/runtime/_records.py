"""What a run reports, segment by segment and at its end."""

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
    """Changes of stages; see `lifecycle_events`."""
    rollbacks: list[dict[str, Any]]
    """What the governor rolled back and quarantined, and why; see `Fit.rollbacks`."""


Listener = Callable[[Segment], None]


class Fit(NamedTuple):
    """A finished run."""

    state: Any
    """The last `TrainState` (for `fit_host`: the parameters)."""
    losses: np.ndarray
    """float[T] training losses of all steps, those before a resume included."""
    events: list[dict[str, Any]]
    """Every change of a stage, in order; see `lifecycle_events`."""
    num_compiled: int
    """Programs compiled after the first segment and its report: 0 unless the listener compiles."""
    num_rollbacks: int
    """Roll-backs of the governor."""
    num_parameters: int
    """Of the adapters that act at the end."""
    adapter_flops: float
    """Forward operations of live adapters on one example, summed over the steps."""
    num_passes: int
    """Forward passes spent on surveys (a backward pass counts as two)."""
    survey_flops: float
    """Forward operations of live adapters on one example, summed over those passes."""
    rollbacks: list[dict[str, Any]]
    """One row for each step with a roll-back or a quarantine: `step`, `alarm`, `loss`,
    `restored_step`, `steps_undone`, and who was `quarantined`."""
    num_steps: int
    """Steps done in all; fewer than `num_steps` of `fit` where `should_stop` ended the run."""
    resumed_from: int | None
    """The step of the checkpoint that the run went on from, if it did."""

    def __repr__(self) -> str:
        """One line: steps, losses, what grew, what went wrong."""
        stages: dict[int, str] = {event["seed"]: event["to"] for event in self.events}
        grown = [name for name in stages.values() if name != "DORMANT"]
        counts = ", ".join(f"{grown.count(name)} {name}" for name in dict.fromkeys(grown))
        words = [f"{self.num_steps} steps"]
        if len(self.losses):
            words.append(f"loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}")
        words += [
            f"seeds: {counts or 'all DORMANT'}",
            f"{self.num_parameters} adapter parameters",
            f"{self.num_rollbacks} roll-backs",
        ]
        if self.resumed_from is not None:
            words.append(f"resumed from step {self.resumed_from}")
        return f"Fit({'; '.join(words)})"
