"""The runner that all benchmarks share: `list`, `pages`, `NAME run` and `NAME check`."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from benchmarks._pages import newest_records, write_pages
from benchmarks._records import (
    BenchmarkError,
    Record,
    append_record,
    describe_run,
    read_records,
)
from benchmarks._targets import read_targets
from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved

__all__ = [
    "BENCHMARKS",
    "BenchmarkError",
    "Measure",
    "Row",
    "exact",
    "main",
    "ratio",
    "summarise",
    "time_interleaved",
]

BENCHMARKS: dict[str, str] = {
    "lifecycle": "benchmarks.lifecycle",
    "kernels": "benchmarks.kernels",
    "gpu": "benchmarks.gpu",
    "checkpoint": "benchmarks.checkpoint",
    "bridge": "benchmarks.bridge",
    "bus": "benchmarks.bus",
    "growth": "benchmarks.growth",
    "compile": "benchmarks.compile",
    "plastic_labels": "benchmarks.plastic_labels",
    "plastic_pixels": "benchmarks.plastic_pixels",
    "plastic_regression": "benchmarks.plastic_regression",
}
"""Every benchmark and the module whose `measure` takes its figures."""

_FOLDER = Path(__file__).resolve().parent
TARGETS = _FOLDER / "targets.toml"
RESULTS = _FOLDER / "results"
PAGES = _FOLDER.parent / "docs" / "benchmarks"


class Measure(Protocol):
    """What a benchmark's module offers as `measure`."""

    def __call__(self, *, quick: bool) -> Mapping[str, Row]:
        """Return ours and the rivals' figures, all taken in this one call.

        Args:
          quick: Take few samples: enough to see that it runs, not to hold a promise.
        """
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      arguments: The command line after `python -m benchmarks`; `None` reads `sys.argv`.

    Returns:
      The exit status: 0 done, 1 something falls short or cannot be used. Wrong usage exits
      with 2 at once.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parse(given)
    if chosen.name == "list":
        for name, module in BENCHMARKS.items():
            print(f"{name}  {module}")
        return 0
    if chosen.name == "pages":
        return _write_pages(chosen.results)
    results = chosen.results / f"{chosen.name}.jsonl"
    try:
        if chosen.action == "run":
            command = shlex.join(["python", "-m", "benchmarks", *given])
            return _run(chosen.name, results=results, quick=chosen.quick, command=command)
        return _check(chosen.name, results=results)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure ours and the rivals in one run, or hold the record to its targets.",
    )
    parser.add_argument(
        "name", choices=["list", "pages", *BENCHMARKS], help="a benchmark, list or pages"
    )
    parser.add_argument("action", nargs="?", choices=["run", "check"])
    parser.add_argument("--quick", action="store_true", help="few samples (run only)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the records"
    )
    chosen = parser.parse_args(arguments)
    if (chosen.name in {"list", "pages"}) != (chosen.action is None):
        parser.error("`list` and `pages` take no action; a benchmark needs one of run, check")
    if chosen.quick and chosen.action != "run":
        parser.error("--quick belongs to run")
    return chosen


def _write_pages(results: Path) -> int:
    try:
        files = write_pages(list(BENCHMARKS), results=results, targets=TARGETS, docs=PAGES)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {len(files)} pages to {PAGES}")
    return 0


def _run(name: str, *, results: Path, quick: bool, command: str) -> int:
    read_records(results)  # a file that cannot be read must not cost a measurement
    measure = cast(Measure, importlib.import_module(BENCHMARKS[name]).measure)
    rows = measure(quick=quick)
    if not rows:
        raise BenchmarkError(f"{name} measured no row; its measure must return at least one.")
    record = describe_run(name, rows=rows, command=command, quick=quick, root=_FOLDER)
    _print_heading(record)
    _print_table(
        ("row", "median", "low", "high", "unit", "count"),
        [
            (key, *(f"{x:.4g}" for x in (row.median, row.low, row.high)), row.unit, str(row.count))
            for key, row in rows.items()
        ],
    )
    append_record(results, record)  # after the table, so that no failure here loses the figures
    print(f"appended to {results}")
    return 0


def _check(name: str, *, results: Path) -> int:
    targets = read_targets(TARGETS).get(name)
    if not targets:
        raise BenchmarkError(f"{TARGETS} holds no target; add [{name}.ROW] before checking {name}.")
    records = newest_records(results)
    if not records:
        raise BenchmarkError(
            f"nothing is recorded in {results}; run `python -m benchmarks {name} run` first."
        )
    rows: dict[str, Row] = {}
    for record in records:
        _print_heading(record)
        rows |= record.rows
    lines, num_short = [], 0
    for key, target in targets.items():
        row = rows.get(key)
        failure = target.failure(row)
        num_short += failure is not None
        figure = "-" if row is None else f"{getattr(row, target.statistic):.4g} {row.unit}"
        lines.append((key, figure, str(target), f"FAIL: {failure}" if failure else "PASS"))
    _print_table(("row", "figure", "target", "result"), lines)
    if num_short:
        print(f"{num_short} of {len(targets)} targets fall short")
    return 1 if num_short else 0


def _print_heading(record: Record) -> None:
    device = record.device
    quick = ", quick" if record.quick else ""
    print(f"{record.name}, {record.date}, {device.get('name')}{quick}")
    print(f"$ {record.command}")


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        print("  ".join(map(str.ljust, line, widths)).rstrip())
