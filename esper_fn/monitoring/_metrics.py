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


def _gauge(
    name: str, help_: str, field: str, message_type: type[bus.Message] = bus.StepMetrics
) -> Metric:
    """Makes a gauge that shows a field of the last message."""
    return Metric(
        "gauge",
        f"esper_{name}",
        help_,
        message_type,
        lambda message: [((), float(getattr(message, field)))],
    )


def _counter(
    name: str, help_: str, message_type: type[bus.Message], labels: tuple[str, ...] = ()
) -> Metric:
    """Makes a counter of messages; its labels are fields of the message."""

    def read(message: bus.Message) -> list[Sample]:
        return [(tuple(getattr(message, field) for field in labels), 1.0)]

    return Metric("counter", f"esper_{name}", help_, message_type, read, labels)


METRICS = (
    _gauge("step", "training step", "step"),
    _gauge("loss", "training loss of the last step", "loss"),
    _gauge("steps_per_second", "training steps a second", "steps_per_second"),
    _gauge("live_adapters", "adapters that compute", "num_live"),
    _gauge("adapter_parameters", "parameters of adapters that act", "num_parameters"),
    _gauge("rollbacks", "roll-backs of the host so far", "num_rollbacks"),
    Metric(
        "gauge",
        "esper_seeds",
        "seeds in each stage",
        bus.StepMetrics,
        lambda message: [((stage,), float(count)) for stage, count in message.stages.items()],
        ("stage",),
    ),
    _counter("transitions", "changes of a stage", bus.LifecycleEvent, ("source", "target")),
    Metric(
        "counter",
        "esper_decisions",
        "changes of a stage by who or what caused them",
        bus.LifecycleEvent,
        lambda event: [((event.cause.partition(":")[0],), 1.0)],
        ("cause",),
    ),
    _counter("outcomes", "commands answered, by outcome", bus.Outcome, ("code",)),
    _gauge(
        "telemetry_dropped", "telemetry and events dropped by back-pressure so far", "num_dropped"
    ),
    _counter("heartbeats", "heartbeats of the run", bus.Heartbeat),
    _gauge("paused", "1 while the run stands still", "is_paused", bus.Heartbeat),
    _counter("alerts", "alerts the run has raised", bus.Alert, ("name", "level")),
    _counter("dead_letters", "messages set aside, by reason", bus.DeadLetter, ("reason",)),
    _counter(
        "checkpoints", "checkpoints saved, restored and failed", bus.CheckpointEvent, ("what",)
    ),
    Metric(
        "gauge",
        "esper_checkpoint_step",
        "step of the last checkpoint saved",
        bus.CheckpointEvent,
        lambda event: [((), float(event.step))] if event.what == "saved" else [],
    ),
)
