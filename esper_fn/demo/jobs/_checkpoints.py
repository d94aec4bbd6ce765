"""Saves a comparison: every arm of every seed goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper_fn import checkpoint, runtime
from esper_fn.demo.jobs._progress import ProgressLog
from esper_fn.errors import EsperError


class StoppedError(EsperError):
    """Raised when a run stopped on request, at the end of a segment.

    Attributes:
      arm: name of the arm under way.
      step: steps of it that are done.
      is_saved: whether they are on the disk.
    """

    def __init__(self, arm: str, step: int, *, is_saved: bool) -> None:
        super().__init__(
            f"stopped after step {step} of {arm}; "
            + ("saved" if is_saved else "not saved: see the warnings above")
        )
        self.arm, self.step, self.is_saved = arm, step, is_saved


@dataclass(slots=True)
class ArmCheckpoints:
    """Where the checkpoints of a comparison lie, and when they are written.

    Attributes:
      folder: holds one folder for each arm and seed.
      every_steps: steps between saves; the end of an arm is saved too.
      settings: of the job; a run goes on only with the same ones.
      should_stop: called after each segment and between arms; True stops the run.
      on_failure: called with the error of a save that failed; warns by default.
      earlier_seconds: time that earlier processes spent on the arms resumed so far.
    """

    folder: Path
    every_steps: int = 500
    settings: Mapping[str, Any] = field(default_factory=dict)
    should_stop: Callable[[], bool] = lambda: False
    on_failure: Callable[[BaseException], None] | None = None
    earlier_seconds: float = 0.0

    def fit(
        self,
        arm: str,
        seed: int,
        log: ProgressLog,
        num_steps: int,
        fit: Callable[..., runtime.Fit],
    ) -> runtime.Fit:
        """Runs an arm, or the rest of it, and saves it.

        Args:
          arm: name of the arm.
          seed: of the run.
          log: its rows are saved along, and repeated when the arm goes on.
          num_steps: steps of the whole arm.
          fit: `runtime.fit` with all its arguments but `checkpoints` and `should_stop`.

        Raises:
          StoppedError: the arm stopped before its last step.
        """
        with self._open(arm, seed, log) as checkpoints:
            result = fit(checkpoints=checkpoints, should_stop=self.should_stop)
            saved_step = checkpoints.writer.last_acknowledged or 0
        if result.num_steps < num_steps:
            raise StoppedError(arm, result.num_steps, is_saved=saved_step == result.num_steps)
        return result

    @contextmanager
    def _open(self, arm: str, seed: int, log: ProgressLog) -> Iterator[runtime.Checkpoints]:
        if self.should_stop():
            raise StoppedError(arm, 0, is_saved=True)
        start, earlier = time.monotonic(), 0.0

        def note() -> dict[str, Any]:
            return {"rows": log.rows, "seconds": earlier + time.monotonic() - start}

        def recall(saved: dict[str, Any]) -> None:
            nonlocal earlier
            earlier = saved["seconds"]
            self.earlier_seconds += earlier
            for row in saved["rows"]:
                log.replay(row)

        folder = self.folder / f"seed-{seed}" / arm
        options: dict[str, Any] = {} if self.on_failure is None else {"on_failure": self.on_failure}
        with checkpoint.Writer(folder, keep=checkpoint.latest(1), **options) as writer:
            yield runtime.Checkpoints(
                writer=writer,
                every_steps=self.every_steps,
                note=note,
                recall=recall,
                settings={**self.settings, "arm": arm, "seed": seed},
            )
