"""How a network came to be: every germination, graft and verdict, and who asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esper_fn.export._adapters import Adapter

FORMAT = "esper-fn lineage"
VERSION = 1

_ENDS = ("FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK")


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
      note: JSON to keep along.

    Returns:
      `lives`, in order of birth: where, which blueprint, `requested_by` (`command`, or
      `policy:RULE`), when it germinated, trained, began and ended its graft; `verdicts`, each
      change of stage after the first with its cause and what was measured; its `fate`, and as what
      it was exported.
    """
    lives: list[dict[str, Any]] = []
    current: dict[int, dict[str, Any]] = {}
    for event in events:
        seed, target = event["seed"], event["to"]
        if target == "GERMINATED":
            life = {
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
            lives.append(life)
            current[seed] = life
            continue
        life_now = current.get(seed)
        if life_now is None:
            continue
        verdict = {name: event[name] for name in ("step", "from", "to", "cause", "measured")}
        life_now["verdicts"].append(verdict)
        if target == "TRAINING":
            life_now["training_step"] = event["step"]
        if target == "GRAFTING":
            life_now["graft_began_step"] = event["step"]
        if event["from"] == "GRAFTING":
            life_now["graft_ended_step"] = event["step"]
        if target in _ENDS:
            life_now["fate"], life_now["fate_step"] = target, event["step"]
        if target == "DORMANT":
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
