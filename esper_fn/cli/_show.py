"""Prints what `esper grow` does while it runs and when it is done."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from esper_fn._text import plain
from esper_fn.demo import jobs
from esper_fn.demo.hosts import count_parameters
from esper_fn.report._words import ACCURACY_KEY, DIFFERENCE_KEY, PARAMS_KEY, STAGES

_ARMS = {
    "host": "host, no growth",
    "grown": "grown where measured",
    "uniform": "grown in every layer",
    "random": "grown at random",
    "static": "static, equal size",
}
_SECONDS_BETWEEN_LINES = 0.5


class Screen:
    """Prints progress and summary, on stderr where stdout is for JSON."""

    def __init__(self, comparison: jobs.Comparison, *, num_repeats: int, is_quiet: bool) -> None:
        self._console = Console(file=sys.stderr if is_quiet else sys.stdout, highlight=False)
        self._steps = comparison.steps
        self._repeats = num_repeats
        self._done = 0
        self._last = 0.0
        self._accuracy = ""
        layout = comparison.growth.layout
        self._console.print(
            f"[bold]{comparison.job.data}[/bold]: a {comparison.host.name} host of "
            f"{count_parameters(comparison.host):,} parameters with {layout.num_seeds} seeds at "
            f"{len(layout.sites)} sites, {comparison.steps:,} steps, policy "
            f"{comparison.policy_name}",
            soft_wrap=True,
        )

    def announce(self, arm: str) -> None:
        """Says which arm comes next, since nothing is reported while it compiles."""
        if self._done == 0:
            self._console.print(f"  {_ARMS[arm]}: compiling ...", soft_wrap=True)

    def show(self, progress: jobs.Progress) -> None:
        """Prints a line on the arm, at most every half second, and one at its end."""
        if progress.test_accuracy is not None:
            self._accuracy = f"{progress.test_accuracy:.1%}"
        now = time.monotonic()
        is_last = progress.step == self._steps
        if not is_last and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        stages = ", ".join(
            f"{count} {STAGES[stage].label.lower()}"
            for stage, count in (progress.stages or {}).items()
        )
        self._console.print(
            f"  {_ARMS[progress.arm]:<21} step {progress.step:>6,}  loss {progress.loss:7.4f}  "
            f"test {self._accuracy:>6}  {progress.parameters:>8,} parameters"
            + (f"  [dim]{stages}[/dim]" if stages else ""),
            soft_wrap=True,
        )

    def finish(self, row: dict[str, Any]) -> None:
        """Prints a line on a finished run, where there are several."""
        self._done += 1
        if self._repeats == 1:
            return
        scores = ", ".join(f"{arm} {row[key]:.1%}" for arm, key in ACCURACY_KEY.items())
        self._console.print(
            f"run {self._done}/{self._repeats}, seed {row['seed']}: {scores}  "
            f"({row['seeds_fossilized']} kept, {row['seeds_culled']} removed, "
            f"{row['wall_seconds']:.0f} s)",
            soft_wrap=True,
        )

    def summarize(self, summary: dict[str, Any], page: Path) -> None:
        """Prints the closing table and the path of the report."""
        repeats = summary["repeats"]
        table = Table(title=f"held-out test accuracy after {summary['steps']:,} steps")
        for column in ("arm", "accuracy", "parameters", "training GFLOP"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for arm, label in _ARMS.items():
            name = ACCURACY_KEY[arm]
            accuracy = (
                f"{summary[name]:.1%}" if repeats is None else _interval(repeats["intervals"][name])
            )
            flops = f"{summary['train_flops'][arm] / 1e9:.2f}"
            table.add_row(label, accuracy, f"{summary[PARAMS_KEY[arm]]:,}", flops)
        self._console.print(table)
        if repeats is not None:
            for rival, name in DIFFERENCE_KEY.items():
                difference = _interval(repeats["intervals"][name], is_difference=True)
                self._console.print(
                    f"grown minus {rival}, paired over {repeats['count']} runs: {difference}"
                )
        first = "" if repeats is None else " (first run; parameters and GFLOP too)"
        self._console.print(
            f"{summary['seeds_fossilized']} of {summary['seeds_total']} seeds kept, "
            f"{summary['seeds_culled']} removed{first}; "
            f"{summary['recompilations_after_first_step']} recompilations after the first step; "
            f"{summary['wall_seconds']:.0f} s"
        )
        self._console.print(f"report: {plain(page)}", soft_wrap=True, markup=False)


def _interval(interval: dict[str, float], *, is_difference: bool = False) -> str:
    sign = "+" if is_difference else ""
    mean, low, high = (f"{100 * interval[end]:{sign}.1f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" + (" points" if is_difference else " %")
