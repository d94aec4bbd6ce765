"""What listeners are told while an arm runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from esper_fn import runtime


class Progress(NamedTuple):
    """What a listener is told after each segment of an arm."""

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


class Teller:
    """Tells a listener of segments, and keeps what it told for the day the arm is taken up."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self.rows: list[dict[str, Any]] = []

    def segment(
        self,
        arm: str,
        last: int,
        segment: runtime.Segment,
        scores: tuple[float, float] | None,
        parameters: int,
        stages: dict[str, int] | None,
        alpha: dict[str, float] | None,
    ) -> None:
        """Tells of one segment."""
        row = Progress(
            arm=arm,
            step=last,
            loss=float(np.mean(segment.losses)),
            test_accuracy=None if scores is None else scores[0],
            test_loss=None if scores is None else scores[1],
            parameters=parameters,
            stages=stages,
            alpha=alpha,
            events=[{"arm": arm, **event} for event in segment.events],
        )._asdict()
        self.rows.append(row)
        self.again(row)

    def again(self, row: dict[str, Any]) -> None:
        """Tells what was told in an earlier process."""
        if self._listener is not None:
            self._listener(Progress(**row))
