"""Messages of a run as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from esper_fn import bus
from esper_fn.monitoring._metrics import METRICS, Kind, Metric

_LOOPBACK = "127.0.0.1"
MAX_SERIES = 10_000
"""Label values come from messages; more series than that are not made, but counted."""


class Exporter:
    """Keeps the metrics of one run up to date from its messages.

    Args:
      run: its name, the label `run` of every metric.
      registry: where they are registered; one registry serves one exporter.

    >>> registry = CollectorRegistry()
    >>> exporter = Exporter("demo", registry)
    >>> exporter.take(bus.StepMetrics(step=7, loss=0.5))
    >>> registry.get_sample_value("esper_step", {"run": "demo"})
    7.0
    """

    def __init__(self, run: str, registry: CollectorRegistry) -> None:
        self._run = run
        self._by_type: dict[type[bus.Message], list[tuple[Metric, Any]]] = {}
        self._series: set[tuple[str, ...]] = set()
        self._stages: set[tuple[str, ...]] = set()
        self.num_refused_series = 0
        for metric in METRICS:
            make = Counter if metric.kind is Kind.COUNTER else Gauge
            made = make(metric.name, metric.help, ("run", *metric.labels), registry=registry)
            self._by_type.setdefault(metric.of, []).append((metric, made))

    def take(self, message: bus.Message) -> None:
        """Takes a message in; one that no metric comes from changes nothing."""
        for metric, made in self._by_type.get(type(message), ()):
            samples = list(metric.read(message))
            if metric.kind is Kind.GAUGE and metric.labels:
                # What a message no longer names is zero, not what it was.
                told = {labels for labels, _ in samples}
                for labels in self._stages - told:
                    made.labels(self._run, *labels).set(0.0)
                self._stages |= told
            for labels, value in samples:
                name = (metric.name, *labels)
                if name not in self._series and len(self._series) >= MAX_SERIES:
                    self.num_refused_series += 1
                    continue
                self._series.add(name)
                child = made.labels(self._run, *labels)
                if metric.kind is Kind.COUNTER:
                    child.inc(value)
                else:
                    child.set(value)


def serve(registry: CollectorRegistry, port: int, *, host: str = _LOOPBACK) -> Callable[[], None]:
    """Serves a registry at `http://host:port/metrics`; returns what ends it.

    Args:
      registry: of the exporter.
      port: to listen on.
      host: the loopback interface unless told otherwise; metrics are not signed.
    """
    server, thread = start_http_server(port, addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
