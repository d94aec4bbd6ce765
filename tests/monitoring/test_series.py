"""Label values come from messages: their number is bounded, whatever a run says."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from esper_fn import bus, monitoring


def _num_series(registry: CollectorRegistry) -> int:
    return sum(not line.startswith(b"#") for line in generate_latest(registry).splitlines())


def test_the_limit_holds_for_every_kind_of_label():
    registry = CollectorRegistry()
    exporter = monitoring.Exporter("r", registry)
    for first in range(0, 29_000, 14_500):
        stages = {f"stage{number}": 1 for number in range(first, first + 14_500)}
        for step in range(3):
            exporter.update(bus.StepMetrics(step=step, loss=0.5, stages=stages))
    assert _num_series(registry) <= monitoring.MAX_SERIES
    for number in range(6_000):
        exporter.update(bus.Outcome(command_id="c", code=f"code{number}"))
        exporter.update(bus.Alert(name=f"alert{number}", level="info", text=""))
    assert monitoring.MAX_SERIES - 100 <= _num_series(registry) <= monitoring.MAX_SERIES
    assert exporter.num_refused_series > 19_000


def test_a_flood_of_labels_leaves_room_for_the_others():
    registry = CollectorRegistry()
    exporter = monitoring.Exporter("r", registry)
    for number in range(10_500):
        exporter.update(bus.Outcome(command_id="c", code=f"code{number}"))
    exporter.update(bus.StepMetrics(step=3, loss=0.25, stages={"DORMANT": 4}))
    exporter.update(bus.Heartbeat(run="r", step=3))
    assert registry.get_sample_value("esper_loss", {"run": "r"}) == 0.25
    assert registry.get_sample_value("esper_heartbeats_total", {"run": "r"}) == 1.0
    assert _num_series(registry) <= monitoring.MAX_SERIES


def test_a_stage_without_seeds_falls_to_zero():
    registry = CollectorRegistry()
    exporter = monitoring.Exporter("r", registry)
    exporter.update(bus.StepMetrics(step=1, loss=0.5, stages={"TRAINING": 2}))
    exporter.update(bus.StepMetrics(step=2, loss=0.5, stages={"FOSSILIZED": 2}))
    for stage, seeds in (("TRAINING", 0.0), ("FOSSILIZED", 2.0)):
        value = registry.get_sample_value("esper_seeds", {"run": "r", "stage": stage})
        assert value == seeds
