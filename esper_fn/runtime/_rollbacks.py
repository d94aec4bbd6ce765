"""Reports of roll-backs and quarantines, for people, from the infos of many steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_fn._growth import Growth, Info
from esper_fn.governors import Alarm
from esper_fn.lifecycle import Stage


class SnapshotClock:
    """Which step's numbers a roll-back restores: follows `rollback.guard` on the host.

    The compiled step keeps a ring of two snapshots and tells nobody how old they are; their ages
    follow from the verdicts alone.
    """

    def __init__(self, every: int | None, older: int = 0, newer: int = 0, age: int = 0) -> None:
        """`every` as in `rollback.anchor`, None without snapshots; the rest from `state`."""
        self._every, self._older, self._newer, self._age = every, older, newer, age

    def tick(self, step: int, alarm: int, should_roll_back: bool) -> int | None:
        """After step number `step`: the count of steps done that was restored, or None."""
        if self._every is None:
            return None
        self._age += 1
        if should_roll_back:
            self._newer, self._age = self._older, 0
            return self._older
        if self._age >= self._every and alarm == Alarm.CALM:
            self._older, self._newer, self._age = self._newer, step + 1, 0
        return None

    def state(self) -> dict[str, int]:
        """Arguments that make an equal clock, beside `every`."""
        return {"older": self._older, "newer": self._newer, "age": self._age}


def rollback_reports(
    growth: Growth, infos: Info, first_step: int, clock: SnapshotClock
) -> list[dict[str, Any]]:
    """One row for each step in which the governor rolled back or quarantined.

    Args:
      growth: the static part, for names.
      infos: of consecutive steps, `[T, ...]`, on the host.
      first_step: number of the first of them.
      clock: of the run; is moved on by T steps.

    Returns:
      Rows with the step, the alarm, the loss (None where it is not finite), to which count of
      steps the numbers went back (None where nothing was restored), how many steps that undoes,
      and who was quarantined: seed, site, layer, chunk, blueprint, and the stage it was in.
    """
    verdict = infos.verdict
    rows = []
    for index in range(len(infos.loss)):
        step = first_step + index
        alarm = int(verdict.alarm[index])
        should_roll_back = bool(verdict.should_roll_back[index])
        restored = clock.tick(step, alarm, should_roll_back)
        offenders = np.flatnonzero(verdict.is_quarantined[index]).tolist()
        if not (should_roll_back or offenders):
            continue
        loss = float(infos.loss[index])
        rows.append(
            {
                "step": step,
                "alarm": Alarm(alarm).name,
                "loss": loss if np.isfinite(loss) else None,
                "restored_step": restored,
                "steps_undone": None if restored is None else step + 1 - restored,
                "quarantined": [_offender(growth, infos, index, seed) for seed in offenders],
            }
        )
    return rows


def _offender(growth: Growth, infos: Info, row: int, seed: int) -> dict[str, Any]:
    place, layer, chunk = growth.lattice.locate(seed)
    blueprint = int(infos.blueprint[row, seed])
    return {
        "seed": seed,
        "site": place.name,
        "layer": layer,
        "chunk": chunk,
        "blueprint": growth.lattice.names[blueprint] if blueprint >= 0 else None,
        "stage": Stage(int(infos.before[row, seed])).name,
    }
