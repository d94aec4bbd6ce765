"""Watching runs with Prometheus and Grafana. No JAX inside; needs the extra `bus`.

`python -m esper_fn.monitoring DIR` writes the dashboard and the alert rules.
"""

from esper_fn.monitoring._exporter import MAX_SERIES, Exporter, serve
from esper_fn.monitoring._files import alert_rules, dashboard, write
from esper_fn.monitoring._metrics import METRICS, RULES, Kind, Metric, Rule

__all__ = [
    "MAX_SERIES",
    "METRICS",
    "RULES",
    "Exporter",
    "Kind",
    "Metric",
    "Rule",
    "alert_rules",
    "dashboard",
    "serve",
    "write",
]
