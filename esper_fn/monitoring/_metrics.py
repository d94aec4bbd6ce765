"""Lists each metric with the message it comes from and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from esper_fn import bus

Sample = tuple[tuple[str, ...], float]
"""Values of the labels, and the gauge's value or the counter's increment."""


class Metric(NamedTuple):
    """A metric, which cannot be written down without the message that feeds it."""

    kind: Literal["gauge", "counter"]
    name: str
    """Without the `_total` of a counter."""
    help: str
    message_type: type[bus.Message]
    read: Callable[[Any], Iterable[Sample]]
    """`read(message)` gives the samples in a message of that type."""
    labels: tuple[str, ...] = ()
    """Names of the labels after `run`."""

    @property
    def exposed_name(self) -> str:
        """The metric's name in Prometheus."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _step_gauge(field: str, help_: str, name: str | None = None) -> Metric:
    def read(message: bus.StepMetrics) -> list[Sample]:
        return [((), float(getattr(message, field)))]

    return Metric("gauge", f"esper_{name or field}", help_, bus.StepMetrics, read)


def _event_counter(
    name: str,
    help_: str,
    message_type: type[bus.Message],
    labels: tuple[str, ...] = (),
) -> Metric:
    """Makes a counter of messages; its labels are fields of the message."""

    def read(message: bus.Message) -> list[Sample]:
        return [(tuple(getattr(message, field) for field in labels), 1.0)]

    return Metric("counter", f"esper_{name}", help_, message_type, read, labels)


def _read_stages(message: bus.StepMetrics) -> list[Sample]:
    return [((stage,), float(count)) for stage, count in message.stages.items()]


def _read_cause(event: bus.LifecycleEvent) -> list[Sample]:
    return [((event.cause.partition(":")[0],), 1.0)]


def _read_is_paused(message: bus.Heartbeat) -> list[Sample]:
    return [((), float(message.is_paused))]


def _read_saved_step(message: bus.CheckpointEvent) -> list[Sample]:
    return [((), float(message.step))] if message.what == "saved" else []


METRICS = (
    _step_gauge("step", "training step"),
    _step_gauge("loss", "training loss of the last step"),
    _step_gauge("steps_per_second", "training steps a second"),
    _step_gauge("num_live", "adapters that compute", "live_adapters"),
    _step_gauge("num_parameters", "parameters of adapters that act", "adapter_parameters"),
    _step_gauge("num_rollbacks", "roll-backs of the host so far", "rollbacks"),
    Metric(
        "gauge", "esper_seeds", "seeds in each stage", bus.StepMetrics, _read_stages, ("stage",)
    ),
    _event_counter("transitions", "changes of a stage", bus.LifecycleEvent, ("source", "target")),
    Metric(
        "counter",
        "esper_decisions",
        "changes of a stage by who or what caused them",
        bus.LifecycleEvent,
        _read_cause,
        ("cause",),
    ),
    _event_counter("outcomes", "commands answered, by outcome", bus.Outcome, ("code",)),
    _step_gauge(
        "num_dropped", "telemetry and events dropped by back-pressure so far", "telemetry_dropped"
    ),
    _event_counter("heartbeats", "heartbeats of the run", bus.Heartbeat),
    Metric("gauge", "esper_paused", "1 while the run stands still", bus.Heartbeat, _read_is_paused),
    _event_counter("alerts", "alerts the run has raised", bus.Alert, ("name", "level")),
    _event_counter("dead_letters", "messages set aside, by reason", bus.DeadLetter, ("reason",)),
    _event_counter(
        "checkpoints", "checkpoints saved, restored and failed", bus.CheckpointEvent, ("what",)
    ),
    Metric(
        "gauge",
        "esper_checkpoint_step",
        "step of the last checkpoint saved",
        bus.CheckpointEvent,
        _read_saved_step,
    ),
)
