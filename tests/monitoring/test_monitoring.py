"""Every metric is emitted, every panel and alert shows one that is."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from esper_fn import bus, monitoring
from esper_fn.bus import Topic

ROOT = Path(__file__).parents[2]
MESSAGES = [
    bus.StepMetrics(step=7, loss=0.5, stages={"DORMANT": 3, "TRAINING": 1}, num_dropped=2),
    bus.LifecycleEvent(
        step=7, seed=1, site="s", layer=0, chunk=1, source="DORMANT", target="GERMINATED",
        cause="policy:plateau",
    ),
    bus.Outcome(command_id="c", code="DONE"),
    bus.Heartbeat(run="r", step=7, is_paused=True),
    bus.Alert(name="n", level="warning", text="w"),
    bus.DeadLetter(
        reason="forged", text="w", from_topic=Topic.COMMANDS, entry_id="1-1", size_bytes=3
    ),
    bus.CheckpointEvent(step=6, what="saved"),
]  # fmt: skip


@pytest.fixture
def exported():
    registry = CollectorRegistry()
    exporter = monitoring.Exporter("r", registry)
    for message in MESSAGES:
        exporter.update(message)
    return registry, exporter


def emitted(registry):
    return {sample.name for family in registry.collect() for sample in family.samples}


def test_every_metric_has_an_emitter_that_emits(exported):
    registry, _ = exported
    assert {metric.exposed_name for metric in monitoring.METRICS} <= emitted(registry)
    assert registry.get_sample_value("esper_seeds", {"run": "r", "stage": "DORMANT"}) == 3
    labels = {"run": "r", "cause": "policy"}
    assert registry.get_sample_value("esper_decisions_total", labels) == 1
    assert registry.get_sample_value("esper_paused", {"run": "r"}) == 1


def test_a_stage_without_seeds_is_zero(exported):
    registry, exporter = exported
    exporter.update(bus.StepMetrics(step=8, loss=0.5, stages={"DORMANT": 4}))
    assert registry.get_sample_value("esper_seeds", {"run": "r", "stage": "TRAINING"}) == 0


def test_panels_and_alerts_show_only_what_is_emitted(exported):
    names = emitted(exported[0])
    dashboard = json.loads((ROOT / "monitoring" / "dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    titles = {panel["title"] for panel in panels}
    assert titles == {metric.help for metric in monitoring.METRICS}
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    in_panels = {name for text in expressions for name in re.findall(r"\besper_\w+", text)}
    assert in_panels == {metric.exposed_name for metric in monitoring.METRICS}
    alerts = yaml.safe_load((ROOT / "monitoring" / "alerts.yml").read_text())
    (group,) = alerts["groups"]
    for rule in group["rules"]:
        assert {"alert", "expr", "for", "labels", "annotations"} == rule.keys()
        assert set(re.findall(r"\besper_\w+", rule["expr"])) <= names


def test_series_are_bounded(monkeypatch):
    from esper_fn.monitoring import _exporter

    monkeypatch.setattr(_exporter, "MAX_SERIES", 5)
    registry = CollectorRegistry()
    exporter = monitoring.Exporter("r", registry)
    for number in range(50):
        exporter.update(bus.Outcome(command_id="c", code=f"code{number}"))
    assert exporter.num_refused_series == 45
    assert generate_latest(registry).count(b"esper_outcomes_total{") == 5


def test_the_endpoint_answers_on_the_loopback_interface(exported):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = monitoring.serve(exported[0], port)
    try:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
        assert b'esper_step{run="r"} 7.0' in page.read()
        page.close()
    finally:
        stop()
