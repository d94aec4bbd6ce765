"""The loop over segments: save, resume, report, stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from esper_fn.errors import NonFiniteLossError
from esper_fn.runtime import _saving
from esper_fn.runtime._compilations import count_compilations
from esper_fn.runtime._options import Hooks
from esper_fn.runtime._records import Fit, Segment

Advance = Callable[[Any, int, dict[str, Any]], Segment]
"""`advance(state, first_step, record)`: runs a segment, and adds to `record["totals"]`."""


class Loop:
    """A run between its segments.

    Args:
      advance: runs one segment.
      state: before the first.
      settings: what must be the same when a saved run goes on.
      hooks: who acts on the run between segments.
      num_steps: in all.
    """

    def __init__(
        self,
        advance: Advance,
        state: Any,
        settings: dict[str, Any],
        hooks: Hooks,
        num_steps: int,
    ) -> None:
        self._advance, self._hooks = advance, hooks
        self._settings, self._num_steps = settings, num_steps
        totals = {"num_rollbacks": 0, "num_parameters": 0, "num_passes": 0}
        self._record: dict[str, Any] = {
            "totals": {**totals, "adapter_flops": 0.0, "survey_flops": 0.0},
            "events": [],
            "rollbacks": [],
        }
        self._state = state
        self._losses: list[np.ndarray] = []
        self._step = self._saved_step = self._num_compiled = 0
        self._resumed_from: int | None = None

    def run(self) -> Fit:
        """From where the run stands to its end, or to where it is stopped."""
        hooks, checkpoints = self._hooks, self._hooks.checkpoints
        self._resume()
        is_over = self._step >= self._num_steps
        if not is_over and hooks.should_start is not None:
            is_over = not hooks.should_start()
        while self._step < self._num_steps and not is_over:
            first = self._step
            self._run_segment()
            if checkpoints is not None and checkpoints.is_due(first, self._step):
                self._save()
            is_over = hooks.should_stop is not None and hooks.should_stop()
            if hooks.should_save is not None and hooks.should_save():
                self._save()
        self._save()
        if checkpoints is not None:
            checkpoints.writer.wait()
        return Fit(
            state=self._state,
            losses=np.concatenate(self._losses) if self._losses else np.zeros(0, np.float32),
            events=self._record["events"],
            num_compiled=self._num_compiled,
            rollbacks=self._record["rollbacks"],
            num_steps=self._step,
            resumed_from=self._resumed_from,
            **self._record["totals"],
        )

    def _resume(self) -> None:
        checkpoints = self._hooks.checkpoints
        if checkpoints is None:
            return
        progress = _saving.load(checkpoints, self._state, self._settings, self._num_steps)
        if progress is not None:
            self._resumed_from = self._step = self._saved_step = progress.step
            self._state, self._record = progress.state, progress.record
            self._losses = [progress.losses]

    def _run_segment(self) -> None:
        with count_compilations() as count:
            segment = self._advance(self._state, self._step, self._record)
            self._state = segment.state
            self._losses.append(segment.losses)
            self._record["events"].extend(segment.events)
            self._record["rollbacks"].extend(segment.rollbacks)
            if self._hooks.listener is not None:
                self._hooks.listener(segment)
        if self._step != (self._resumed_from or 0):
            self._num_compiled += count.num_compiled
        self._step += segment.num_steps

    def _save(self) -> None:
        checkpoints = self._hooks.checkpoints
        if checkpoints is None or self._saved_step == self._step:
            return
        losses = np.concatenate(self._losses)
        progress = _saving.Progress(self._step, self._state, losses, self._record)
        _saving.save(checkpoints, progress, self._settings, float(np.mean(self._losses[-1])))
        self._saved_step = self._step


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
    losses: np.ndarray, first: int, *, num_rollbacks: int = 0, max_rollbacks: int | None = None
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
