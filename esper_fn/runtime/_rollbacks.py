"""Reports of roll-backs and quarantines, for people, from the infos of many steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_fn._growth import Growth, StepInfo
from esper_fn.governors import Alarm
from esper_fn.lifecycle import Stage


def rollback_reports(growth: Growth, infos: StepInfo, first_step: int) -> list[dict[str, Any]]:
    """One row for each step in which the governor rolled back or quarantined.

    Args:
      growth: the static part, for names.
      infos: of consecutive steps, `[T, ...]`, on the host.
      first_step: number of the first of them.

    Returns:
      Rows with the step, the alarm, the loss (None where it is not finite), to which count of
      steps the numbers went back (None where nothing was restored, 0 where a snapshot from before
      the run was), how many steps that undoes, and who was quarantined: seed, site, layer, chunk,
      blueprint, and the stage it was in.
    """
    verdict = infos.verdict
    is_reported = verdict.should_roll_back | verdict.is_quarantined.any(axis=-1)
    rows = []
    for index in np.flatnonzero(is_reported).tolist():
        step, loss = first_step + index, float(infos.loss[index])
        undone = int(infos.steps_undone[index])
        restored = max(step + 1 - undone, 0) if undone else None
        offenders = np.flatnonzero(verdict.is_quarantined[index]).tolist()
        rows.append(
            {
                "step": step,
                "alarm": Alarm(int(verdict.alarm[index])).name,
                "loss": loss if np.isfinite(loss) else None,
                "restored_step": restored,
                "steps_undone": None if restored is None else step + 1 - restored,
                "quarantined": [_offender(growth, infos, index, seed) for seed in offenders],
            }
        )
    return rows


def _offender(growth: Growth, infos: StepInfo, row: int, seed: int) -> dict[str, Any]:
    site, layer, chunk = growth.layout.locate(seed)
    blueprint = int(infos.blueprint[row, seed])
    return {
        "seed": seed,
        "site": site.name,
        "layer": layer,
        "chunk": chunk,
        "blueprint": growth.layout.names[blueprint] if blueprint >= 0 else None,
        "stage": Stage(int(infos.before[row, seed])).name,
    }
