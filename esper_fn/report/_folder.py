"""Writes the folder of a run line by line while it trains, and reads it when it is finished."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np

from esper_fn._lock import BusyFolderError, FolderLock
from esper_fn.errors import RunFolderError
from esper_fn.report._records import EVENT, MAX_LINE_BYTES, METRICS, Field, check, loads, plain
from esper_fn.report._words import SCHEMA, STAGES

MARKER: Final = "esper-run.json"
SUMMARY: Final = "summary.json"
EVENTS_FILE: Final = "events.jsonl"
METRICS_FILE: Final = "metrics.jsonl"
REPORT: Final = "report.html"

MAX_SUMMARY_BYTES: Final = 16 * 2**20
MAX_LINES_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run, as read from its folder.

    Attributes:
      summary: the final numbers and the settings of the run.
      events: every stage change of every seed, in the order in which they were written.
      metrics: what was measured while training, one record per arm and measured step.
    """

    summary: dict[str, Any]
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]


class RunFolder:
    """The writer of one run folder, from `create`.

    Lines are flushed as they are appended, so that a run that dies leaves what it had seen;
    `summary.json` appears, whole, with `finish` and not before. As a context manager it closes
    the files and finishes nothing.
    """

    __slots__ = ("_events", "_is_finished", "_lock", "_metrics", "path")

    def __init__(self, path: Path, events: BinaryIO, metrics: BinaryIO, lock: FolderLock) -> None:
        self.path: Final = path
        self._events: Final = events
        self._metrics: Final = metrics
        self._lock: Final = lock
        self._is_finished = False

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Appends one stage change to `events.jsonl`.

        Args:
          event: `arm` and a row of `runtime.lifecycle_events`.

        Raises:
          RunFolderError: the event does not hold what the schema requires, or the folder is
            finished or closed.
        """
        self._append(self._events, EVENTS_FILE, event, EVENT)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Appends what one arm measured at one step to `metrics.jsonl`.

        Args:
          metrics: `arm`, `step` and any of `loss`, `test_accuracy`, `test_loss`, `parameters`,
            `stages` (seeds in each stage) and `alpha` (of each seed with an adapter).

        Raises:
          RunFolderError: as for `append_event`.
        """
        self._append(self._metrics, METRICS_FILE, metrics, METRICS)

    def record(
        self,
        segment: Any,
        *,
        arm: str = "grown",
        host_parameters: int = 0,
        test_accuracy: float | None = None,
        test_loss: float | None = None,
    ) -> None:
        """Appends the events of a segment of training and what it measured.

        Args:
          segment: a `runtime.Segment`, as the listener of `runtime.fit` or `fit_host` gets it.
          arm: name of the arm, one of `host`, `grown`, `uniform`, `random`, `static`.
          host_parameters: number of parameters of the host, without adapters.
          test_accuracy: fraction of held-out targets that are predicted, where it was measured.
          test_loss: loss on held-out data, where it was measured.

        Raises:
          RunFolderError: as for `append_event`.
        """
        for event in segment.events:
            self.append_event({"arm": arm, **event})
        scores = {"test_accuracy": test_accuracy, "test_loss": test_loss}
        row = measure_segment(segment, arm=arm, host_parameters=host_parameters) | scores
        self.append_metrics({key: row[key] for key in row if row[key] is not None or key == "loss"})

    def finish(self, summary: Mapping[str, Any]) -> Path:
        """Writes `summary.json` in one step and closes the folder.

        Args:
          summary: anything that JSON can hold; the report shows what it does not know as settings.

        Returns:
          The path of the file.

        Raises:
          RunFolderError: `summary` has no form in JSON, is too large, or has another schema than
            this version writes, or the folder is finished or closed.
        """
        target = self.path / SUMMARY
        self._require_open(SUMMARY)
        try:
            record = check(plain(summary, "summary"), {})
        except ValueError as error:
            raise RunFolderError(f"{target}: {error}") from None
        schema = record.setdefault("schema", SCHEMA)
        if schema != SCHEMA:
            raise RunFolderError(
                f"{target}: schema is {schema!r}; this version writes schema {SCHEMA}: leave the"
                " key out"
            )
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        if len(text) > MAX_SUMMARY_BYTES:
            raise RunFolderError(
                f"{target}: the summary takes {len(text)} bytes, at most {MAX_SUMMARY_BYTES} are"
                " read back; move long records to metrics.jsonl"
            )
        for file in (self._events, self._metrics):
            os.fsync(file.fileno())
        write_atomically(target, text)
        self._is_finished = True
        self.close()
        return target

    def close(self) -> None:
        """Closes the files and lets another process have the folder.

        What was appended stays; a folder without summary is unfinished.
        """
        self._events.close()
        self._metrics.close()
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self, name: str) -> None:
        if self._is_finished or self._events.closed:
            state = "finished" if self._is_finished else "closed"
            raise RunFolderError(
                f"{self.path / name}: this run folder is {state} and takes nothing more; make"
                " another one with create(path)"
            )

    def _append(
        self, file: BinaryIO, name: str, record: Mapping[str, Any], table: Mapping[str, Field]
    ) -> None:
        self._require_open(name)
        try:
            checked = check(plain(record, "record"), table)
        except ValueError as error:
            raise RunFolderError(
                f"{self.path / name}: cannot append this record: {error}"
            ) from None
        line = json.dumps(checked, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise RunFolderError(
                f"{self.path / name}: this record takes {len(line)} bytes, at most"
                f" {MAX_LINE_BYTES} are read back; record fewer seeds a line"
            )
        file.write(line)
        file.flush()


def measure_segment(segment: Any, *, arm: str, host_parameters: int) -> dict[str, Any]:
    """Summarizes a segment of training in one record of `metrics.jsonl`.

    Args:
      segment: as for `RunFolder.record`.
      arm: name of the arm.
      host_parameters: number of parameters of the host, without adapters.

    Returns:
      `arm`, `step`, the mean `loss`, `parameters`, `stages` and `alpha`.
    """
    metrics = {
        "arm": arm,
        "step": segment.first_step + segment.num_steps,
        "loss": float(np.mean(segment.losses)),
        "parameters": host_parameters,
        "stages": None,
        "alpha": None,
    }
    if segment.infos is None:
        return metrics
    stage, alpha = segment.infos.stage[-1], segment.infos.alpha[-1]
    names = tuple(STAGES)
    counts = np.bincount(np.ravel(stage), minlength=len(names))
    has_adapter = (stage >= names.index("GERMINATED")) & (stage <= names.index("FOSSILIZED"))
    return metrics | {
        "parameters": host_parameters + int(segment.infos.num_parameters[-1]),
        "stages": {name: int(n) for name, n in zip(names, counts, strict=True) if n},
        "alpha": {str(seed): float(alpha[seed]) for seed in np.flatnonzero(has_adapter).tolist()},
    }


def create(path: str | os.PathLike[str], *, overwrite: bool = False) -> RunFolder:
    """Makes a run folder, with its parents, and open it for writing.

    Args:
      path: the folder; it may exist if it is empty.
      overwrite: replace the run that `path` holds. Only files that a run folder owns are
        removed; anything else in it stays.

    Returns:
      The open folder.

    Raises:
      RunFolderError: `path` is not a folder, holds files that are no run of ours, holds a run and
        `overwrite` is False, or a living process writes a run there, which is named.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RunFolderError(
            f"{folder}: it, or a parent of it, is a file; name another folder"
        ) from None
    if not (folder / MARKER).is_file() and next(folder.iterdir(), None) is not None:
        raise RunFolderError(
            f"{folder}: it is not empty and holds no run of ours (no {MARKER}), so nothing in it"
            " is touched; name a new or an empty folder"
        )
    # Nothing is removed or made before the folder is this process's alone.
    try:
        lock = FolderLock(folder / MARKER, {"format": "esper-fn run", "schema": SCHEMA})
    except BusyFolderError as error:
        raise RunFolderError(
            f"{folder}: a run is being written there by {error}; wait until it ends, stop it, or"
            " name another folder"
        ) from None
    try:
        if not (lock.was_empty or overwrite):
            raise RunFolderError(
                f"{folder}: it already holds a run; name another folder, or pass overwrite=True to"
                " replace that run"
            )
        _remove_run(folder)
        events = open(folder / EVENTS_FILE, "xb")  # noqa: SIM115 - closed by RunFolder.close
        metrics = open(folder / METRICS_FILE, "xb")  # noqa: SIM115 - the same
    except BaseException:
        lock.close()
        raise
    return RunFolder(folder, events, metrics, lock)


def _remove_run(folder: Path) -> None:
    # The summary goes first: a folder with a summary is always whole.
    for name in (SUMMARY, REPORT, EVENTS_FILE, METRICS_FILE):
        (folder / name).unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp"):
        if leftover.name.startswith((f".{SUMMARY}.", f".{REPORT}.")):
            leftover.unlink(missing_ok=True)


def write_atomically(target: Path, text: str) -> None:
    """Writes `text` to `target` so that a reader sees the old file or the new one, whole."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], *, max_bytes: int = MAX_LINES_BYTES) -> Run:
    """Reads a finished run.

    Args:
      path: the run folder.
      max_bytes: the largest `events.jsonl` and `metrics.jsonl` to read, in bytes each.

    Returns:
      The run.

    Raises:
      RunFolderError: a file is missing, too large, or holds something that a run does not; the
        message names the file, the line, and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder; name the folder of a run")
    summary = _read_summary(folder / SUMMARY)
    return Run(
        summary=summary,
        events=_read_lines(folder / EVENTS_FILE, EVENT, max_bytes),
        metrics=_read_lines(folder / METRICS_FILE, METRICS, max_bytes),
    )


def _read_summary(file: Path) -> dict[str, Any]:
    remedy = "the run has not finished, or it died: let it finish, or run it again"
    _require_file(file, MAX_SUMMARY_BYTES, remedy)
    try:
        summary = check(loads(file.read_bytes()), {})
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise RunFolderError(
            f"{file}, line {line}: {error}; restore the file, or run again"
        ) from None
    if summary.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{file}: schema is {summary.get('schema')!r}; this version reads schema {SCHEMA}:"
            " install the version of esper-fn that wrote the run"
        )
    return summary


def _read_lines(file: Path, table: Mapping[str, Field], max_bytes: int) -> list[dict[str, Any]]:
    _require_file(file, max_bytes, "restore it from a copy of the run, or run again")
    records = []
    with open(file, "rb") as lines:
        line_number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            line_number += 1
            if len(line) > MAX_LINE_BYTES:
                problem = f"the line is longer than {MAX_LINE_BYTES} bytes"
            elif not line.endswith(b"\n"):
                problem = "the line breaks off (it has no end of line)"
            else:
                try:
                    records.append(check(loads(line), table))
                except ValueError as error:
                    problem = str(error)
                else:
                    continue
            raise RunFolderError(
                f"{file}, line {line_number}: {problem}; remove or repair this line, or run again"
            )
    return records


def _require_file(file: Path, max_bytes: int, remedy: str) -> None:
    try:
        status = file.stat()
    except FileNotFoundError:
        raise RunFolderError(f"{file}: the file is missing; {remedy}") from None
    if not stat.S_ISREG(status.st_mode):
        raise RunFolderError(f"{file}: it is not a plain file; {remedy}")
    if status.st_size > max_bytes:
        raise RunFolderError(
            f"{file}: it has {status.st_size} bytes and at most {max_bytes} are read; record less"
            " often, or pass a larger max_bytes to read(path)"
        )
