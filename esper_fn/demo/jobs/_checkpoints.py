"""Checkpoints of a comparison: every arm of every seed goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper_fn import checkpoint, runtime
from esper_fn.checkpoint._writer import warn
from esper_fn.errors import EsperError


class StoppedError(EsperError):
    """The run was asked to stop and did, at the end of a segment.

    Attributes:
      arm: under way.
      step: steps done of it.
      is_saved: whether they are on the disk.
    """

    def __init__(self, arm: str, step: int, *, is_saved: bool) -> None:
        super().__init__(
            f"stopped after step {step} of {arm}; "
            + ("saved" if is_saved else "not saved: see the warnings above")
        )
        self.arm, self.step, self.is_saved = arm, step, is_saved


@dataclass(slots=True)
class Keeping:
    """Where the checkpoints of a comparison lie, and when they are written.

    Attributes:
      folder: one folder of it an arm and seed.
      every_steps: between saves; an arm's end is saved too.
      settings: of the job; a run goes on only with the same ones.
      should_stop: asked after each segment and between arms.
      on_failure: told of a save that failed.
    """

    folder: Path
    every_steps: int = 500
    settings: Mapping[str, Any] = field(default_factory=dict)
    should_stop: Callable[[], bool] = lambda: False
    on_failure: Callable[[BaseException], None] = warn
    seconds_before: float = 0.0
    """Spent on what was taken over from earlier processes."""

    @contextmanager
    def arm(
        self,
        name: str,
        seed: int,
        told: list[dict[str, Any]],
        replay: Callable[[dict[str, Any]], None],
    ) -> Iterator[runtime.Checkpoints]:
        """Checkpoints of one arm.

        Args:
          name: of the arm.
          seed: of the run.
          told: rows the listener was given; saved along, and filled again.
          replay: given each of these rows when the arm goes on, so that the listener hears the
            whole run.
        """
        if self.should_stop():
            raise StoppedError(name, 0, is_saved=True)
        began, spent = time.monotonic(), 0.0

        def note() -> dict[str, Any]:
            return {"rows": told, "seconds": spent + time.monotonic() - began}

        def recall(noted: dict[str, Any]) -> None:
            nonlocal spent
            spent = noted["seconds"]
            self.seconds_before += spent
            for row in noted["rows"]:
                told.append(row)
                replay(row)

        with checkpoint.Writer(
            self.folder / f"seed-{seed}" / name,
            keep=checkpoint.latest(1),
            on_failure=self.on_failure,
        ) as writer:
            yield runtime.Checkpoints(
                writer=writer,
                every_steps=self.every_steps,
                note=note,
                recall=recall,
                settings={**self.settings, "arm": name, "seed": seed},
            )

    def check_done(self, name: str, fitted: runtime.Fit, num_steps: int, saved: int | None) -> None:
        """Raises `StoppedError` where a fit ended before its time."""
        if fitted.num_steps < num_steps:
            raise StoppedError(name, fitted.num_steps, is_saved=(saved or 0) == fitted.num_steps)
