"""What a run tells of itself after a segment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from esper_fn import bus
from esper_fn.runtime._events import stage_counts
from esper_fn.runtime._records import Segment
from esper_fn.runtime._translate import lifecycle_event


class Told(NamedTuple):
    """A segment, for people elsewhere."""

    step: int
    num_steps: int
    seconds: float
    """Since the segment before; 0 for the first one."""
    loss: Any
    infos: Any
    events: list[dict[str, Any]]


class Teller:
    """Turns segments into messages, from the infos that are on the host anyway.

    Args:
      frames_per_second: of the columns of all seeds, at most.
      clock: seconds, rising.
    """

    def __init__(
        self, *, frames_per_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._limiter = bus.RateLimiter(per_second=frames_per_second, burst=1, clock=clock)
        self._told_at: float | None = None
        self._num_rollbacks = 0

    def told(self, segment: Segment) -> Told:
        """What is kept of a segment until it is told of: no state, which a step may donate."""
        now = self._clock()
        took, self._told_at = now - (self._told_at or now), now
        return Told(
            step=segment.first_step + segment.num_steps,
            num_steps=segment.num_steps,
            seconds=took,
            loss=segment.losses[-1],
            infos=segment.infos,
            events=segment.events,
        )

    def messages(self, segment: Told, *, num_dropped: int) -> list[bus.Message]:
        """Lifecycle events, metrics, and a frame when one is due; of segments in their order.

        Args:
          segment: of `fit`.
          num_dropped: messages that did not go out so far.
        """
        infos: Any = segment.infos
        self._num_rollbacks += int(infos.verdict.should_roll_back.sum())
        step, took = segment.step, segment.seconds
        messages: list[bus.Message] = [lifecycle_event(event) for event in segment.events]
        messages.append(
            bus.StepMetrics(
                step=step,
                loss=float(segment.loss),
                steps_per_second=segment.num_steps / took if took > 0 else 0.0,
                num_live=int(infos.num_live[-1]),
                num_parameters=int(infos.num_parameters[-1]),
                num_rollbacks=self._num_rollbacks,
                num_dropped=num_dropped,
                stages=stage_counts(infos.stage[-1]),
            )
        )
        if self._limiter.allows():
            columns = {
                "stage": np.asarray(infos.stage[-1], np.uint8),
                "alpha": np.asarray(infos.alpha[-1], np.float32),
                "blueprint": np.asarray(infos.blueprint[-1], np.int8),
                "evidence": np.asarray(infos.evidence[-1], np.float32),
                "is_measured": np.asarray(infos.is_measured[-1], np.uint8),
            }
            found = {name: bus.Column.of(values) for name, values in columns.items()}
            messages.append(bus.Frame(step=step, columns=found))
        return messages
