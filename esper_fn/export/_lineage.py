"""How a network came to be: every germination, graft and verdict, and who requested it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esper_fn.export._adapters import Adapter

FORMAT = "esper-fn lineage"
VERSION = 1

_VERDICT = ("step", "from", "to", "cause", "measured")
_ENDS = ("FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK")
_BEGINNINGS = {"TRAINING": "training_step", "GRAFTING": "graft_began_step"}


def lineage(
    events: Sequence[Mapping[str, Any]],
    rollbacks: Sequence[Mapping[str, Any]] = (),
    *,
    adapters: Sequence[Adapter] = (),
    folded: Sequence[Adapter] = (),
    note: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The lives of all seeds that ever germinated, as JSON.

    Args:
      events: `Fit.events`.
      rollbacks: `Fit.rollbacks`.
      adapters: exported beside the host.
      folded: exported inside it.
      note: JSON to store with it.

    Returns:
      `lives`, in order of birth: where, which blueprint, `requested_by` (`command`, or
      `policy:RULE`), when it germinated, trained, began and ended its graft; `verdicts`, each
      change of stage after the first with its cause and what was measured; its `fate`, and as what
      it was exported.
    """
    lives: list[dict[str, Any]] = []
    current: dict[int, dict[str, Any]] = {}
    for event in events:
        seed = event["seed"]
        if event["to"] == "GERMINATED":
            current[seed] = _germinated(event)
            lives.append(current[seed])
        elif seed in current:
            _record(current[seed], event)
            if event["to"] == "DORMANT":
                del current[seed]
    for exported, kind in ((adapters, "adapter"), (folded, "folded")):
        for adapter in exported:
            if adapter.seed in current:
                current[adapter.seed]["exported_as"] = kind
    return {
        "format": FORMAT,
        "version": VERSION,
        "lives": lives,
        "rollbacks": [dict(row) for row in rollbacks],
        "note": dict(note or {}),
    }


def _germinated(event: Mapping[str, Any]) -> dict[str, Any]:
    """A life at its beginning."""
    return {
        **{name: event[name] for name in ("seed", "site", "layer", "chunk", "blueprint")},
        "requested_by": event["cause"],
        "germinated_step": event["step"],
        "training_step": None,
        "graft_began_step": None,
        "graft_ended_step": None,
        "verdicts": [],
        "fate": None,
        "fate_step": None,
        "exported_as": None,
    }


def _record(life: dict[str, Any], event: Mapping[str, Any]) -> None:
    """Adds a change of stage to a life."""
    step, target = event["step"], event["to"]
    life["verdicts"].append({name: event[name] for name in _VERDICT})
    if target in _BEGINNINGS:
        life[_BEGINNINGS[target]] = step
    if event["from"] == "GRAFTING":
        life["graft_ended_step"] = step
    if target in _ENDS:
        life["fate"], life["fate_step"] = target, step
