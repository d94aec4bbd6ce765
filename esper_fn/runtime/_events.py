"""Events, roll-backs and warnings for people, from the infos of many steps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from esper_fn._growth import Growth, GrowthState, StepInfo
from esper_fn.governors import Alarm
from esper_fn.lifecycle import EDGES, GUARD_EDGES, Cause, Gate, Stage

_GATE_OF = {
    (edge.source, edge.target, edge.cause): edge.gates[-1] for edge in (*GUARD_EDGES, *EDGES)
}
_MEASURED = {
    Stage.DORMANT: "potential",
    Stage.TRAINING: "utility",
    Stage.GRAFTING: "alpha",
    Stage.STABILIZATION: "loss_variation",
    Stage.EVALUATING: "contribution",
    Stage.FINE_TUNING: "contribution",
}


def lifecycle_events(growth: Growth, infos: StepInfo, first_step: int) -> list[dict[str, Any]]:
    """Every change of a stage, in order, as plain dictionaries.

    Args:
      growth: the static part, for names.
      infos: of consecutive steps, `[T, ...]`, on the host (NumPy arrays).
      first_step: number of the first of them.

    Returns:
      Rows with the step, the seed and where it sits, the stages, why (`cause`), and what was
      measured.
    """
    before, after = np.asarray(infos.before), np.asarray(infos.stage)
    events = []
    for row, seed in np.argwhere(before != after).tolist():
        source, target = Stage(int(before[row, seed])), Stage(int(after[row, seed]))
        measured = {}
        if source in _MEASURED:
            is_known = bool(infos.is_measured[row, seed])
            measured[_MEASURED[source]] = float(infos.evidence[row, seed]) if is_known else None
        events.append(
            {
                "step": first_step + row,
                **_seed_names(growth, infos, row, seed),
                "from": source.name,
                "to": target.name,
                "cause": _cause(growth, infos, row, seed),
                "measured": measured,
            }
        )
    return events


def _seed_names(growth: Growth, infos: StepInfo, row: int, seed: int) -> dict[str, Any]:
    """A seed, where it sits, and its blueprint."""
    site, layer, chunk = growth.layout.locate(seed)
    blueprint = int(infos.blueprint[row, seed])
    name = growth.layout.names[blueprint] if blueprint >= 0 else None
    return {"seed": seed, "site": site.name, "layer": layer, "chunk": chunk, "blueprint": name}


def _cause(growth: Growth, infos: StepInfo, row: int, seed: int) -> str:
    cause = Cause(int(infos.cause[row, seed]))
    if cause is Cause.POLICY:
        return f"policy:{growth.policy.rules[int(infos.requested_by[row, seed])]}"
    if cause in (Cause.COMMAND, Cause.DWELL_LIMIT):
        return cause.name.lower()
    stages = Stage(int(infos.before[row, seed])), Stage(int(infos.stage[row, seed]))
    return f"{cause.name}:{_GATE_OF.get((*stages, cause), Gate.OPEN).name}".lower()


def stage_counts(stage: np.ndarray) -> dict[str, int]:
    """How many seeds are in each stage, stages without seeds left out.

    >>> stage_counts(np.asarray([0, 0, 7]))
    {'DORMANT': 2, 'FOSSILIZED': 1}
    """
    counts = np.bincount(stage, minlength=len(Stage)).tolist()
    return {stage.name: count for stage, count in zip(Stage, counts, strict=True) if count}


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
                "quarantined": [
                    {
                        **_seed_names(growth, infos, index, seed),
                        "stage": Stage(int(infos.before[index, seed])).name,
                    }
                    for seed in offenders
                ],
            }
        )
    return rows


def warn_of_barren(growth: Growth, infos: StepInfo, first: int, record: dict[str, Any]) -> None:
    """Warns, once a run, where nothing will grow, since all is zero there."""
    steps = np.flatnonzero(np.asarray(infos.num_barren))
    if record.get("has_warned") or not steps.size:
        return
    record["has_warned"] = True
    row = int(steps[-1])
    is_dormant = infos.stage[row] == Stage.DORMANT
    seeds = np.flatnonzero(is_dormant & infos.is_measured[row] & (infos.evidence[row] == 0))
    rows = [growth.layout.locate(int(seed)) for seed in seeds[:5]]
    names = ", ".join(f"{site.name!r} chunk {chunk}" for site, _, chunk in rows)
    warnings.warn(
        f"step {first + row}: {int(infos.num_barren[row])} dormant seed(s) measure a growth "
        f"potential of exactly zero ({names}{', ...' if len(seeds) > 5 else ''}): the activation "
        "is always zero there, or no gradient reaches it, so nothing will grow there; "
        "look for dead units or an unused output, or leave the site out of the layout",
        RuntimeWarning,
        stacklevel=6,
    )


def warn_of_blind(growth: GrowthState, first: int, record: dict[str, Any]) -> None:
    """Warns, once a run, of surveys that measure nothing at all, so nothing is judged by them."""
    if record.get("has_looked"):
        return
    record["has_looked"] = True
    if np.asarray(growth.seeds.num_potentials).any():
        return
    warnings.warn(
        f"step {first}: the survey measured no growth potential at any site, so it will judge "
        "nothing; the loss on survey_batch is not finite, or no site takes part in it: look for "
        "NaN or infinity in survey_batch",
        RuntimeWarning,
        stacklevel=6,
    )
