"""The loop over segments: save, resume, report, stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esper_fn.errors import NonFiniteLossError
from esper_fn.runtime import _saving
from esper_fn.runtime._compilations import count_compilations
from esper_fn.runtime._options import Hooks
from esper_fn.runtime._records import Fit, Segment

Advance = Callable[[Any, int, dict[str, Any]], Segment]
"""`advance(state, first_step, record)`: runs a segment, and adds to `record["totals"]`."""


def _first_record() -> dict[str, Any]:
    totals: dict[str, float] = {"num_rollbacks": 0, "num_parameters": 0, "num_passes": 0}
    totals |= {"adapter_flops": 0.0, "survey_flops": 0.0}
    return {"totals": totals, "events": [], "rollbacks": []}


@dataclass(slots=True)
class Loop:
    """A run between its segments.

    Attributes:
      advance: runs one segment.
      settings: what must be the same when a saved run goes on.
      hooks: who acts on the run between segments.
      num_steps: in all.
      state: before the first segment, then after the last one.
      record: totals, events and roll-backs so far.
      losses: so far.
      step: steps done.
      saved_step: the step of the last checkpoint.
      resumed_from: the step of the checkpoint that the run went on from, if it did.
      num_compiled: programs compiled after the first segment.
    """

    advance: Advance
    settings: dict[str, Any]
    hooks: Hooks
    num_steps: int
    state: Any
    record: dict[str, Any] = field(default_factory=_first_record)
    losses: list[np.ndarray] = field(default_factory=list)
    step: int = 0
    saved_step: int = 0
    resumed_from: int | None = None
    num_compiled: int = 0

    def run(self) -> Fit:
        """From where the run stands to its end, or to where it is stopped."""
        hooks, checkpoints = self.hooks, self.hooks.checkpoints
        self._resume()
        is_over = self.step >= self.num_steps
        if not is_over and hooks.should_start is not None:
            is_over = not hooks.should_start()
        while self.step < self.num_steps and not is_over:
            first = self.step
            self._run_segment()
            if checkpoints is not None and checkpoints.is_due(first, self.step):
                self._save()
            is_over = hooks.should_stop is not None and hooks.should_stop()
            if hooks.should_save is not None and hooks.should_save():
                self._save()
        self._save()
        if checkpoints is not None:
            checkpoints.writer.wait()
        return Fit(
            state=self.state,
            losses=np.concatenate(self.losses) if self.losses else np.zeros(0, np.float32),
            events=self.record["events"],
            num_compiled=self.num_compiled,
            rollbacks=self.record["rollbacks"],
            num_steps=self.step,
            resumed_from=self.resumed_from,
            **self.record["totals"],
        )

    def _resume(self) -> None:
        checkpoints = self.hooks.checkpoints
        if checkpoints is None:
            return
        progress = _saving.load(checkpoints, self.state, self.settings, self.num_steps)
        if progress is not None:
            self.resumed_from = self.step = self.saved_step = progress.step
            self.state, self.record = progress.state, progress.record
            self.losses = [progress.losses]

    def _run_segment(self) -> None:
        with count_compilations() as count:
            segment = self.advance(self.state, self.step, self.record)
            self.state = segment.state
            self.losses.append(segment.losses)
            self.record["events"].extend(segment.events)
            self.record["rollbacks"].extend(segment.rollbacks)
            if self.hooks.listener is not None:
                self.hooks.listener(segment)
        if self.step != (self.resumed_from or 0):
            self.num_compiled += count.num_compiled
        self.step += segment.num_steps

    def _save(self) -> None:
        checkpoints = self.hooks.checkpoints
        if checkpoints is None or self.saved_step == self.step:
            return
        losses = np.concatenate(self.losses)
        progress = _saving.Progress(self.step, self.state, losses, self.record)
        _saving.save(checkpoints, progress, self.settings, float(np.mean(self.losses[-1])))
        self.saved_step = self.step


def segment_length(num_steps: int, most: int) -> int:
    """The largest divisor of `num_steps` that is at most `most`, so all segments are alike.

    >>> segment_length(1000, 30)
    25
    """
    if num_steps < 1 or most < 1:
        raise ValueError(
            f"num_steps and segment_steps must be at least 1, got {num_steps!r} and {most!r}"
        )
    return max(length for length in range(1, min(most, num_steps) + 1) if num_steps % length == 0)


def check_finite(
    losses: np.ndarray, first: int, num_rollbacks: int = 0, max_rollbacks: int | None = None
) -> None:
    """Raises where a run cannot go on.

    Args:
      losses: of a segment.
      first: its first step.
      num_rollbacks: so far.
      max_rollbacks: more of them are too many; None where there is no snapshot to go back to.

    Raises:
      NonFiniteLossError: a loss is not finite and there is no snapshot, or too many roll-backs.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if not bad.size if max_rollbacks is None else num_rollbacks <= max_rollbacks:
        return
    where = f"at step {first + int(bad[0])}" if bad.size else f"before step {first + len(losses)}"
    count = f", {num_rollbacks} roll-backs so far, max_rollbacks={max_rollbacks}"
    raise NonFiniteLossError(
        f"the loss became non-finite or diverged {where}"
        + ("" if max_rollbacks is None else count)
        + "; look for NaN or infinity in the batches and for a division by zero in the loss, lower "
        "the learning rate, or clip gradients"
    )
