"""The Grafana dashboard and the alert rules, written from the table of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esper_fn.monitoring._metrics import METRICS, RULES, Kind, Metric

_GROUPS = ("loop", "lifecycle", "policy", "bus", "checkpoint")
_WIDTH, _HEIGHT = 8, 7


def dashboard() -> dict[str, Any]:
    """Grafana's dashboard: one panel a metric, one row a group."""
    panels: list[dict[str, Any]] = []
    top = 0
    for group in _GROUPS:
        members = [metric for metric in METRICS if metric.group == group]
        panels.append(
            {
                "type": "row",
                "title": group,
                "id": len(panels) + 1,
                "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
                "panels": [],
            }
        )
        top += 1
        for at, metric in enumerate(members):
            row, column = divmod(at, 24 // _WIDTH)
            place = {
                "x": column * _WIDTH, "y": top + row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT,
            }  # fmt: skip
            panels.append(_panel(metric, len(panels) + 1, place))
        top += -(-len(members) // (24 // _WIDTH)) * _HEIGHT
    return {
        "title": "Esper-fn",
        "uid": "esper-fn",
        "schemaVersion": 39,
        "tags": ["esper-fn"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "query": "label_values(esper_step, run)",
                    "includeAll": True,
                    "multi": True,
                },
            ]
        },
        "panels": panels,
    }


def _panel(metric: Metric, number: int, place: dict[str, int]) -> dict[str, Any]:
    chosen = f'{metric.exposed}{{run=~"$run"}}'
    is_counter = metric.kind is Kind.COUNTER
    by = ", ".join(("run", *metric.labels))
    expression = f"sum by ({by}) (rate({chosen}[1m]))" if is_counter else chosen
    return {
        "type": "timeseries",
        "title": metric.help,
        "id": number,
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {"defaults": {"unit": "ops" if is_counter else metric.unit}},
        "targets": [
            {
                "refId": "A",
                "expr": expression,
                "legendFormat": " ".join(f"{{{{{name}}}}}" for name in ("run", *metric.labels)),
            }
        ],
    }


def alert_rules() -> dict[str, Any]:
    """Prometheus' rules.

    Raises:
      KeyError: a rule looks at a metric that is not in the table.
    """
    exposed = {metric.name: metric.exposed for metric in METRICS}
    rules = [
        {
            "alert": rule.name,
            "expr": rule.expression.format(metric=exposed[rule.metric]),
            "for": rule.lasting,
            "labels": {"severity": rule.level},
            "annotations": {"summary": rule.words},
        }
        for rule in RULES
    ]
    return {"groups": [{"name": "esper-fn", "rules": rules}]}


def write(folder: Path) -> list[Path]:
    """Writes `dashboard.json` and `alerts.yml` (JSON, which is YAML too); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in (("dashboard.json", dashboard()), ("alerts.yml", alert_rules())):
        path = folder / name
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
