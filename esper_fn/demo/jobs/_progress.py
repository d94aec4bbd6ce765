"""Reports what an arm does while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from esper_fn import report, runtime


class Progress(NamedTuple):
    """What a listener gets after each segment of an arm."""

    arm: str
    step: int
    loss: float
    test_accuracy: float | None
    test_loss: float | None
    parameters: int
    stages: dict[str, int] | None
    alpha: dict[str, float] | None
    events: list[dict[str, Any]]


Listener = Callable[[Progress], None]


class ProgressLog:
    """Reports segments to a listener, and keeps the reports so that a resumed arm repeats them.

    Attributes:
      rows: the reports so far, as plain mappings.
    """

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self.rows: list[dict[str, Any]] = []

    def record(
        self,
        arm: str,
        segment: runtime.Segment,
        host_parameters: int,
        scores: tuple[float, float] | None,
    ) -> None:
        """Reports a segment; `scores` are the accuracy and the loss on test data, if measured."""
        accuracy, loss = scores or (None, None)
        row = Progress(
            **report.measure_segment(segment, arm=arm, host_parameters=host_parameters),
            test_accuracy=accuracy,
            test_loss=loss,
            events=[{"arm": arm, **event} for event in segment.events],
        )
        self.replay(row._asdict())

    def replay(self, row: dict[str, Any]) -> None:
        """Reports a row, as an earlier process did."""
        self.rows.append(row)
        if self._listener is not None:
            self._listener(Progress(**row))
