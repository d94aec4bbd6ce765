"""Exports runs to Prometheus and Grafana; needs the extra `bus`, and no JAX.

The folder `monitoring/` of the repository has a dashboard and alert rules for these metrics.
"""

from esper_fn.monitoring._exporter import MAX_SERIES, Exporter, serve
from esper_fn.monitoring._metrics import METRICS, Metric

__all__ = ["MAX_SERIES", "METRICS", "Exporter", "Metric", "serve"]
