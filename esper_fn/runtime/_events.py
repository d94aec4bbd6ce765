"""Lifecycle events for people, from the infos of many steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_fn._growth import Growth, StepInfo
from esper_fn.lifecycle import EDGES, GUARD_EDGES, Cause, Gate, Stage

_GATE_OF = {
    (edge.source, edge.target, edge.cause): edge.gates[-1] for edge in (*GUARD_EDGES, *EDGES)
}
_NAMES = [stage.name for stage in Stage]
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
        site, layer, chunk = growth.layout.locate(seed)
        blueprint = int(infos.blueprint[row, seed])
        measured = _MEASURED.get(source)
        event: dict[str, Any] = {
            "step": first_step + row,
            "seed": seed,
            "site": site.name,
            "layer": layer,
            "chunk": chunk,
            "blueprint": growth.layout.names[blueprint] if blueprint >= 0 else None,
            "from": source.name,
            "to": target.name,
            "cause": _cause(growth, infos, row, seed, source, target),
            "measured": {},
        }
        if measured is not None:
            is_known = bool(infos.is_measured[row, seed])
            event["measured"] = {measured: float(infos.evidence[row, seed]) if is_known else None}
        events.append(event)
    return events


def _cause(
    growth: Growth, infos: StepInfo, row: int, seed: int, source: Stage, target: Stage
) -> str:
    cause = Cause(int(infos.cause[row, seed]))
    if cause is Cause.POLICY:
        return f"policy:{growth.policy.rules[int(infos.requested_by[row, seed])]}"
    if cause is Cause.COMMAND:
        return "command"
    if cause is Cause.DWELL_LIMIT:
        return "dwell_limit"
    gate = _GATE_OF.get((source, target, cause), Gate.OPEN)
    return f"{cause.name.lower()}:{gate.name.lower()}"


def stage_counts(stage: np.ndarray) -> dict[str, int]:
    """How many seeds are in each stage, stages without seeds left out.

    >>> stage_counts(np.asarray([0, 0, 7]))
    {'DORMANT': 2, 'FOSSILIZED': 1}
    """
    counts = np.bincount(stage, minlength=len(_NAMES)).tolist()
    return {name: count for name, count in zip(_NAMES, counts, strict=True) if count}
