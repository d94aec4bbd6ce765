"""Reports of roll-backs and quarantines, for people, from the infos of many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from esper_fn import rollback
from esper_fn._growth import Growth, StepInfo
from esper_fn.governors import Alarm
from esper_fn.lifecycle import Stage


class SnapshotClock:
    """Which step's numbers a roll-back restores: follows `rollback.guard` on the host.

    The compiled step keeps a ring of snapshots and tells nobody how old they are; their ages follow
    from the verdicts alone.
    """

    def __init__(
        self, every: int | None, num_snapshots: int, record: Mapping[str, Any] | None = None
    ) -> None:
        """For a fresh ring, or for one of which `record`, from `state`, tells.

        Args:
          every: as in `rollback.anchor`; None without snapshots.
          num_snapshots: as in `rollback.anchor`.
          record: of a clock of the same ring.
        """
        self._every, self._places = every or 0, num_snapshots if every else 0
        record = record or {"steps": [0], "age": 0, "due": self._every}
        self._steps: list[int] = list(record["steps"])
        self._age, self._due = int(record["age"]), int(record["due"])

    @classmethod
    def beside(cls, held: rollback.Anchor | None) -> SnapshotClock:
        """For a ring as it is now; its snapshots count as those of step 0."""
        if held is None:
            return cls(None, 0)
        record = {"steps": [0] * int(held.num_held), "age": int(held.age), "due": int(held.due)}
        return cls(int(held.every), held.num_snapshots, record)

    def tick(self, step: int, *, is_calm: bool, should_roll_back: bool) -> int | None:
        """After step number `step`: the count of steps done that was restored, or None.

        Args:
          step: its number, from 0.
          is_calm: the verdict held neither an alarm nor unease.
          should_roll_back: as the verdict says.
        """
        if not self._places:
            return None
        self._age += 1
        if should_roll_back:
            self._steps = self._steps[:-1] or self._steps
            self._age, self._due = 0, self._places * self._every
            return self._steps[-1]
        if self._age >= self._due and is_calm:
            self._steps = [*self._steps, step + 1][-self._places :]
            self._age, self._due = 0, self._every
        return None

    def state(self) -> dict[str, Any]:
        """JSON that makes an equal clock."""
        return {"steps": list(self._steps), "age": self._age, "due": self._due}


def rollback_reports(
    growth: Growth, infos: StepInfo, first_step: int, clock: SnapshotClock
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
    is_calm = (verdict.alarm == Alarm.CALM) & ~verdict.is_uneasy
    rows = []
    for index in range(len(infos.loss)):
        step = first_step + index
        alarm = int(verdict.alarm[index])
        should_roll_back = bool(verdict.should_roll_back[index])
        restored = clock.tick(step, is_calm=bool(is_calm[index]), should_roll_back=should_roll_back)
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


def _offender(growth: Growth, infos: StepInfo, row: int, seed: int) -> dict[str, Any]:
    place, layer, chunk = growth.layout.locate(seed)
    blueprint = int(infos.blueprint[row, seed])
    return {
        "seed": seed,
        "site": place.name,
        "layer": layer,
        "chunk": chunk,
        "blueprint": growth.layout.names[blueprint] if blueprint >= 0 else None,
        "stage": Stage(int(infos.before[row, seed])).name,
    }
