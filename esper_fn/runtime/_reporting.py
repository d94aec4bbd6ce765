"""What a run reports over the bus after a segment."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from esper_fn import bus
from esper_fn.bus._timing import RateLimiter
from esper_fn.runtime._events import stage_counts
from esper_fn.runtime._records import Segment


class Reporter:
    """Turns segments into messages, from infos that are on the host already.

    Args:
      frames_per_second: most frames (the state of all seeds) in a second.
    """

    def __init__(self, *, frames_per_second: float) -> None:
        self._limiter = RateLimiter(per_second=frames_per_second, burst=1)
        self._reported_at: float | None = None
        self._num_rollbacks = 0

    def report(self, segment: Segment) -> Callable[[int], list[bus.Message]]:
        """Prepares the messages of a segment; call it in the order of segments.

        Returns:
          `messages(num_dropped)`: lifecycle events, metrics with the number of messages that were
          dropped so far, and a frame if one is due. It needs no state, which the next step may
          donate.
        """
        now = time.monotonic()
        # 0 for the first segment.
        seconds, self._reported_at = now - (self._reported_at or now), now
        return partial(self._messages, segment._replace(state=None), seconds)

    def _messages(self, segment: Segment, seconds: float, num_dropped: int) -> list[bus.Message]:
        infos: Any = segment.infos
        step = segment.first_step + segment.num_steps
        self._num_rollbacks += int(infos.verdict.should_roll_back.sum())
        messages: list[bus.Message] = [_lifecycle_event(event) for event in segment.events]
        messages.append(
            bus.StepMetrics(
                step=step,
                loss=float(segment.losses[-1]),
                steps_per_second=segment.num_steps / seconds if seconds > 0 else 0.0,
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
            messages.append(bus.Frame(step=step, columns=columns))
        return messages


def _lifecycle_event(event: dict[str, Any]) -> bus.LifecycleEvent:
    """A row of `lifecycle_events` as a message."""
    names = {"from": "source", "to": "target"}
    return bus.LifecycleEvent(**{names.get(key, key): value for key, value in event.items()})
