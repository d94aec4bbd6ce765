"""The figures that were promised, and whether a record holds them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks._records import BenchmarkError, is_number
from benchmarks._timing import Row

STATISTICS = ("median", "low", "high")
_KEYS = {"at_most", "at_least", "unit", "statistic", "source"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A bound on one statistic of one row, and who promised it.

    Args:
      bound: `at_most` or `at_least`.
      value: The bound, in `unit`.
      unit: Unit that the row must have too.
      statistic: One of `STATISTICS`.
      source: The line that promises it.
    """

    bound: str
    value: float
    unit: str
    statistic: str
    source: str

    def __str__(self) -> str:
        return f"{self.statistic} {self.bound.replace('_', ' ')} {self.value:g} {self.unit}"

    def failure(self, row: Row | None) -> str | None:
        """Return why a row falls short, or `None` when it holds the target."""
        if row is None:
            return "not measured"
        if row.unit != self.unit:
            return f"measured in {row.unit}"
        figure = getattr(row, self.statistic)
        holds = figure <= self.value if self.bound == "at_most" else figure >= self.value
        return None if holds else "falls short"


def read_targets(path: Path) -> dict[str, dict[str, Target]]:
    """Return the targets of every benchmark, by benchmark and row.

    Raises:
      BenchmarkError: When the file is missing or a target is malformed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}.") from error
    targets: dict[str, dict[str, Target]] = {}
    for name, rows in content.items():
        if not isinstance(rows, dict):
            raise BenchmarkError(f"{path}: {name} must be a table of rows, [{name}.ROW].")
        targets[name] = {row: _parse(f"{path}: [{name}.{row}]", of) for row, of in rows.items()}
    return targets


def _parse(where: str, content: object) -> Target:
    if not isinstance(content, Mapping) or content.keys() - _KEYS:
        raise BenchmarkError(f"{where} must be a table with keys among {', '.join(sorted(_KEYS))}.")
    bounds = [key for key in ("at_most", "at_least") if key in content]
    if len(bounds) != 1 or not is_number(content[bounds[0]]):
        raise BenchmarkError(f"{where} needs exactly one of at_most and at_least, a finite number.")
    for key in ("unit", "source"):
        if not isinstance(content.get(key), str) or not content[key]:
            raise BenchmarkError(f"{where} needs {key}, a string.")
    statistic = content.get("statistic")
    if statistic not in STATISTICS:
        raise BenchmarkError(
            f"{where} has statistic = {statistic!r}; choose one of {', '.join(STATISTICS)}."
        )
    return Target(
        bound=bounds[0],
        value=content[bounds[0]],
        unit=content["unit"],
        statistic=statistic,
        source=content["source"],
    )
