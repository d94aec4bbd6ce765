"""What a run reports over the bus after a segment."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from esper_fn import bus
from esper_fn.bus._timing import RateLimiter
from esper_fn.runtime._events import stage_counts
from esper_fn.runtime._records import Segment


class SegmentReport(NamedTuple):
    """The parts of a segment that are reported; no state, which the next step may donate."""

    step: int
    num_steps: int
    seconds: float
    """Time since the segment before; 0 for the first one."""
    loss: Any
    infos: Any
    events: list[dict[str, Any]]


class Reporter:
    """Turns segments into messages, from infos that are on the host already.

    Args:
      frames_per_second: most frames (the state of all seeds) in a second.
    """

    def __init__(self, *, frames_per_second: float) -> None:
        self._limiter = RateLimiter(per_second=frames_per_second, burst=1)
        self._reported_at: float | None = None
        self._num_rollbacks = 0

    def report(self, segment: Segment) -> SegmentReport:
        """Selects what to report of a segment; call it in the order of segments."""
        now = time.monotonic()
        seconds, self._reported_at = now - (self._reported_at or now), now
        return SegmentReport(
            step=segment.first_step + segment.num_steps,
            num_steps=segment.num_steps,
            seconds=seconds,
            loss=segment.losses[-1],
            infos=segment.infos,
            events=segment.events,
        )

    def messages(self, report: SegmentReport, *, num_dropped: int) -> list[bus.Message]:
        """Makes lifecycle events, metrics, and a frame if one is due.

        Args:
          report: what to report.
          num_dropped: messages that were dropped so far.
        """
        infos, seconds = report.infos, report.seconds
        self._num_rollbacks += int(infos.verdict.should_roll_back.sum())
        messages: list[bus.Message] = [_lifecycle_event(event) for event in report.events]
        messages.append(
            bus.StepMetrics(
                step=report.step,
                loss=float(report.loss),
                steps_per_second=report.num_steps / seconds if seconds > 0 else 0.0,
                num_live=int(infos.num_live[-1]),
                num_parameters=int(infos.num_parameters[-1]),
                num_rollbacks=self._num_rollbacks,
                num_dropped=num_dropped,
                stages=stage_counts(infos.stage[-1]),
            )
        )
        if self._limiter.allows():
            dtypes = {
                "stage": np.uint8,
                "alpha": np.float32,
                "blueprint": np.int8,
                "evidence": np.float32,
                "is_measured": np.uint8,
            }
            columns = {
                name: bus.Column.from_array(np.asarray(getattr(infos, name)[-1], dtype))
                for name, dtype in dtypes.items()
            }
            messages.append(bus.Frame(step=report.step, columns=columns))
        return messages


def _lifecycle_event(event: dict[str, Any]) -> bus.LifecycleEvent:
    """A row of `lifecycle_events` as a message."""
    names = {"from": "source", "to": "target"}
    return bus.LifecycleEvent(**{names.get(key, key): value for key, value in event.items()})
