"""Exports the messages of a run as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from esper_fn import bus
from esper_fn.monitoring._metrics import METRICS, Metric

_LOOPBACK = "127.0.0.1"
MAX_SERIES = 10_000
"""Label values come from messages; more series than that are not made, but counted."""


class _Counter(Counter):
    """A counter without its time of creation, which would be one more series for each."""

    def _child_samples(self) -> Iterable[Any]:
        return [sample for sample in super()._child_samples() if sample.name != "_created"]


class Exporter:
    """Keeps the metrics of one run up to date from its messages.

    Args:
      run: name of the run, the label `run` of every metric.
      registry: of Prometheus; one registry serves one exporter.

    >>> registry = CollectorRegistry()
    >>> exporter = Exporter("demo", registry)
    >>> exporter.update(bus.StepMetrics(step=7, loss=0.5))
    >>> registry.get_sample_value("esper_step", {"run": "demo"})
    7.0
    """

    def __init__(self, run: str, registry: CollectorRegistry) -> None:
        self._run = run
        self._by_type: dict[type[bus.Message], list[tuple[Metric, Any]]] = {}
        self._series: set[tuple[str, ...]] = set()
        self.num_refused_series = 0
        for metric in METRICS:
            collector_type = _Counter if metric.kind == "counter" else Gauge
            labels = ("run", *metric.labels)
            collector = collector_type(metric.name, metric.help, labels, registry=registry)
            self._by_type.setdefault(metric.message_type, []).append((metric, collector))

    def update(self, message: bus.Message) -> None:
        """Updates the metrics that come from a message.

        Args:
          message: of the run; a message that no metric comes from changes nothing.
        """
        for metric, collector in self._by_type.get(type(message), ()):
            samples = dict(metric.read(message))
            if metric.kind == "gauge" and metric.labels:
                # What a message no longer names is zero, not what it was.
                before = (name[1:] for name in self._series if name[0] == metric.name)
                samples = {**dict.fromkeys(before, 0.0), **samples}
            for labels, value in samples.items():
                if not self._admit(metric.name, labels):
                    continue
                child = collector.labels(self._run, *labels)
                if metric.kind == "counter":
                    child.inc(value)
                else:
                    child.set(value)

    def _admit(self, name: str, labels: tuple[str, ...]) -> bool:
        """Admits a series of these labels if it exists or there is room for it."""
        if (name, *labels) in self._series:
            return True
        # A flood of labels must not crowd out the metrics without any.
        limit = MAX_SERIES - min(MAX_SERIES // 100, len(METRICS)) if labels else MAX_SERIES
        if len(self._series) >= limit:
            self.num_refused_series += 1
            return False
        self._series.add((name, *labels))
        return True


def serve(registry: CollectorRegistry, port: int, *, host: str = _LOOPBACK) -> Callable[[], None]:
    """Serves a registry at `http://host:port/metrics`.

    Args:
      registry: of the exporter.
      port: to listen on.
      host: address to listen on; the loopback interface by default, as metrics are not signed.

    Returns:
      A function that ends the service.
    """
    server, thread = start_http_server(port, addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
