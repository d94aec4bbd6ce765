"""`esper watch`: a run as a live table."""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from esper_fn import bus, monitoring
from esper_fn._text import plain
from esper_fn.bus import Topic
from esper_fn.cli._say import say
from esper_fn.cli._steer import connect

_FOREVER_SECONDS = 10 * 365 * 86_400.0
_LONGEST_LINE = 500
_MOST_STAGES = 24
_TOPICS = (Topic.TELEMETRY, Topic.EVENTS, Topic.OUTCOMES, Topic.DEAD)


class Board:
    """The state of a run, as its messages show it."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.metrics: bus.StepMetrics | None = None
        self.lines: deque[str] = deque(maxlen=12)
        self.alerts: deque[str] = deque(maxlen=5)
        self.is_paused = False

    def update(self, message: bus.Message) -> str | None:
        """Updates the board by a message; returns a line for a plain terminal."""
        line: str | None = None
        match message:
            case bus.StepMetrics():
                self.metrics = message
            case bus.Heartbeat():
                self.is_paused = message.is_paused
            case bus.LifecycleEvent():
                line = (
                    f"step {message.step}: seed {message.seed} ({message.site}) "
                    f"{message.source} to {message.target}, {message.cause}"
                )
            case bus.Alert():
                line = f"{message.level}: {message.text}"
            case bus.DeadLetter():
                line = f"refused ({message.reason}): {message.text}"
            case bus.Outcome():
                line = f"step {message.step}: {message.code} {message.text}".rstrip()
            case bus.CheckpointEvent():
                line = f"checkpoint {message.what} at step {message.step} {message.text}".rstrip()
        if line is None:
            return None
        line = plain(line, limit=_LONGEST_LINE)
        self.lines.append(line)
        if isinstance(message, bus.Alert | bus.DeadLetter):
            self.alerts.append(line)
        return line

    def draw(self) -> Any:
        """Draws the tables and the last lines."""
        # As `Text`, since plain strings are markup here.
        table = Table(title=Text(f"{plain(self.run)}{' (paused)' if self.is_paused else ''}"))
        for column in ("step", "loss", "steps/s", "live", "parameters", "roll-backs", "dropped"):
            table.add_column(column, justify="right")
        if (m := self.metrics) is not None:
            table.add_row(
                f"{m.step:,}",
                f"{m.loss:.4f}",
                f"{m.steps_per_second:.1f}",
                str(m.num_live),
                f"{m.num_parameters:,}",
                str(m.num_rollbacks),
                str(m.num_dropped),
            )
        stages = Table(title="stages")
        shown = {} if self.metrics is None else self.metrics.stages
        for stage in list(shown)[:_MOST_STAGES]:
            stages.add_column(Text(plain(stage, limit=40)), justify="right")
        stages.add_row(*map(str, list(shown.values())[:_MOST_STAGES]))
        parts: list[Any] = [table, stages, Text("\n".join(self.lines))]
        if self.alerts:
            parts.append(Text("\n".join(self.alerts), style="bold red"))
        return Group(*parts)


def watch(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Shows a run until it is interrupted, or for so many seconds."""
    del parser
    seconds = options.seconds if options.seconds < math.inf else _FOREVER_SECONDS
    console = Console()
    with ExitStack() as end:
        client = end.enter_context(connect(options))
        client.check_active()
        run = client.run
        board = Board(run)
        messages = client.watch(_TOPICS, seconds=seconds)
        if options.metrics_port is not None:
            registry = CollectorRegistry()
            end.callback(monitoring.serve(registry, options.metrics_port))
            messages = _exported(messages, monitoring.Exporter(run, registry))
        if not console.is_terminal:
            for message in messages:
                line = board.update(message)
                if isinstance(message, bus.StepMetrics):
                    line = f"step {message.step}: loss {message.loss:.4f}, {message.stages}"
                if line is not None:
                    say(line)
            return 0
        with Live(board.draw(), console=console, refresh_per_second=8) as live:
            for message in messages:
                board.update(message)
                live.update(board.draw())
    return 0


def _exported(
    messages: Iterator[bus.Message], exporter: monitoring.Exporter
) -> Iterator[bus.Message]:
    for message in messages:
        exporter.update(message)
        yield message
