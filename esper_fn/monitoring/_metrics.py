"""One table: each metric with the message it comes from, how it is read, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from esper_fn import bus


class Kind(StrEnum):
    """How a metric moves."""

    GAUGE = "gauge"
    COUNTER = "counter"


Sample = tuple[tuple[str, ...], float]
"""Values of the labels, and the gauge's value or the counter's increment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric. It cannot be written down without its emitter, nor drawn without being one.

    Attributes:
      name: without a counter's `_total`.
      kind: gauge or counter.
      help: one line.
      of: the message it comes from.
      read: the samples in such a message.
      labels: names, after `run`.
      unit: of a panel, as Grafana names it.
      group: row of the dashboard: loop, lifecycle, policy, bus or checkpoint.
    """

    name: str
    kind: Kind
    help: str
    of: type[bus.Message]
    read: Callable[[Any], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    unit: str = "short"
    group: str

    @property
    def exposed(self) -> str:
        """Its name in Prometheus."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """An alert on metrics of the table.

    Attributes:
      name: of the alert.
      expression: with `{metric}` for the exposed name.
      metric: what it looks at.
      lasting: how long it must hold, as Prometheus writes it.
      level: warning or critical.
      words: what happened and what to do.
    """

    name: str
    expression: str
    metric: str
    lasting: str
    level: str
    words: str


def _gauge(field: str, help_: str, *, unit: str = "short", name: str | None = None) -> Metric:
    return Metric(
        name=f"esper_{name or field}",
        kind=Kind.GAUGE,
        help=help_,
        of=bus.StepMetrics,
        read=lambda message: [((), float(getattr(message, field)))],
        unit=unit,
        group="loop",
    )


def _cause(event: bus.LifecycleEvent) -> str:
    return event.cause.partition(":")[0]


METRICS = (
    _gauge("step", "training step"),
    _gauge("loss", "training loss of the last step"),
    _gauge("steps_per_second", "training steps a second", unit="ops"),
    _gauge("num_live", "adapters that compute", name="live_adapters"),
    _gauge("num_parameters", "parameters of adapters that act", name="adapter_parameters"),
    _gauge("num_rollbacks", "roll-backs of the host so far", name="rollbacks"),
    Metric(
        name="esper_seeds",
        kind=Kind.GAUGE,
        help="seeds in each stage",
        of=bus.StepMetrics,
        read=lambda message: [((stage,), float(n)) for stage, n in message.stages.items()],
        labels=("stage",),
        group="lifecycle",
    ),
    Metric(
        name="esper_transitions",
        kind=Kind.COUNTER,
        help="changes of a stage",
        of=bus.LifecycleEvent,
        read=lambda message: [((message.source, message.target), 1.0)],
        labels=("source", "target"),
        group="lifecycle",
    ),
    Metric(
        name="esper_decisions",
        kind=Kind.COUNTER,
        help="changes of a stage by who or what caused them",
        of=bus.LifecycleEvent,
        read=lambda message: [((_cause(message),), 1.0)],
        labels=("cause",),
        group="policy",
    ),
    Metric(
        name="esper_outcomes",
        kind=Kind.COUNTER,
        help="commands answered, by outcome",
        of=bus.Outcome,
        read=lambda message: [((message.code,), 1.0)],
        labels=("code",),
        group="bus",
    ),
    Metric(
        name="esper_telemetry_dropped",
        kind=Kind.GAUGE,
        help="telemetry and events dropped by back-pressure so far",
        of=bus.StepMetrics,
        read=lambda message: [((), float(message.num_dropped))],
        group="bus",
    ),
    Metric(
        name="esper_heartbeats",
        kind=Kind.COUNTER,
        help="signs of life",
        of=bus.Heartbeat,
        read=lambda _: [((), 1.0)],
        group="bus",
    ),
    Metric(
        name="esper_paused",
        kind=Kind.GAUGE,
        help="1 while the run stands still",
        of=bus.Heartbeat,
        read=lambda message: [((), float(message.is_paused))],
        group="bus",
    ),
    Metric(
        name="esper_alerts",
        kind=Kind.COUNTER,
        help="alerts the run has raised",
        of=bus.Alert,
        read=lambda message: [((message.name, message.level), 1.0)],
        labels=("name", "level"),
        group="bus",
    ),
    Metric(
        name="esper_dead_letters",
        kind=Kind.COUNTER,
        help="messages set aside, by reason",
        of=bus.DeadLetter,
        read=lambda message: [((message.reason,), 1.0)],
        labels=("reason",),
        group="bus",
    ),
    Metric(
        name="esper_checkpoints",
        kind=Kind.COUNTER,
        help="checkpoints saved, restored and failed",
        of=bus.CheckpointEvent,
        read=lambda message: [((message.what,), 1.0)],
        labels=("what",),
        group="checkpoint",
    ),
    Metric(
        name="esper_checkpoint_step",
        kind=Kind.GAUGE,
        help="step of the last checkpoint saved",
        of=bus.CheckpointEvent,
        read=lambda message: [((), float(message.step))] if message.what == "saved" else [],
        group="checkpoint",
    ),
)

RULES = (
    Rule(
        name="EsperRunSilent",
        expression="increase({metric}[1m]) == 0",
        metric="esper_heartbeats",
        lasting="1m",
        level="critical",
        words="The run gives no sign of life: look at its process and at the server.",
    ),
    Rule(
        name="EsperLossNotFinite",
        expression="{metric} != {metric}",
        metric="esper_loss",
        lasting="0m",
        level="critical",
        words="The training loss is not a number.",
    ),
    Rule(
        name="EsperRollBacks",
        expression="delta({metric}[10m]) > 2",
        metric="esper_rollbacks",
        lasting="0m",
        level="warning",
        words="The governor rolls back again and again: lower the learning rate or look at data.",
    ),
    Rule(
        name="EsperForgedMessages",
        expression='increase({metric}{{reason=~"forged|replayed"}}[5m]) > 0',
        metric="esper_dead_letters",
        lasting="0m",
        level="critical",
        words="Somebody without a valid key sends commands: see `esper dlq list`.",
    ),
    Rule(
        name="EsperTelemetryDropped",
        expression="delta({metric}[5m]) > 0",
        metric="esper_telemetry_dropped",
        lasting="5m",
        level="warning",
        words="The server or its network is slower than the telemetry; the run is not affected.",
    ),
    Rule(
        name="EsperCheckpointFailed",
        expression='increase({metric}{{what="failed"}}[15m]) > 0',
        metric="esper_checkpoints",
        lasting="0m",
        level="critical",
        words="A checkpoint was not written: look at the disk.",
    ),
)
