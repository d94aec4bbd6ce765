"""A checkpoint folder: its steps, their manifests, how a step leaves it, and its one writer.

::

    run.json                     identity of the run
    steps/000000000100/          a step; it came here by one rename, whole
        manifest.jsonl           every file's size and SHA-256, sealed
        record.json              what the caller wants back
        data/<content>/          an Orbax checkpoint of a part of the value
    .work/                       what is being written or removed; nobody reads it
    set_aside/                   what lay where a step had to go, and is not proven corrupt
    lock                         names the one writer; the lock ends with its process
"""

from __future__ import annotations

import operator
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from esper_fn._lock import BusyFolderError, FolderLock
from esper_fn.checkpoint import _files, _manifest
from esper_fn.checkpoint._json import corrupt_if_malformed, dumps, loads
from esper_fn.checkpoint._manifest import Manifest
from esper_fn.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    UnreadableCheckpointError,
)

RUN = "run.json"
STEPS = "steps"
WORK = ".work"
ASIDE = "set_aside"
LOCK = "lock"
MAX_RECORD_BYTES = 1 << 30
_STEP_NAME = re.compile(r"\d{12}")

PathLike = str | os.PathLike[str]


def checked_step(step: Any) -> int:
    """A step as a plain int; raises `CheckpointError` for anything but a whole number in range."""
    try:
        if isinstance(step, bool | np.bool_):
            raise TypeError
        number = operator.index(step)
    except TypeError:
        number = -1
    if not 0 <= number <= _manifest.MAX_STEP:
        raise CheckpointError(
            f"step must be an int from 0 to {_manifest.MAX_STEP}, NumPy's and JAX's included, got "
            f"{step!r} ({type(step).__name__}); `int(...)` makes one"
        )
    return number


def step_folder(path: PathLike, step: int) -> Path:
    """Where a step lies."""
    return Path(path) / STEPS / f"{step:012d}"


def steps(path: PathLike) -> list[int]:
    """The acknowledged steps of a checkpoint folder, oldest first; damaged ones too.

    Args:
      path: a checkpoint folder; one that does not exist has no steps.

    >>> steps("/nowhere")
    []
    """
    try:
        with os.scandir(Path(path) / STEPS) as entries:
            return sorted(
                int(entry.name)
                for entry in entries
                if _STEP_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except (FileNotFoundError, NotADirectoryError):
        return []


def run_identity(path: PathLike) -> str:
    """The identity of the run that a folder belongs to.

    Raises:
      NoCheckpointError: not a checkpoint folder.
      CorruptCheckpointError: its `run.json` is damaged.
      UnreadableCheckpointError: it cannot be read just now.
    """
    file = Path(path) / RUN
    if not exists(file):
        raise NoCheckpointError(f"{path}: not a checkpoint folder (it has no {RUN})")
    data = _files.read_bounded(file, 4096)
    with corrupt_if_malformed(f"{file}"):
        content = loads(data, max_bytes=4096)
    run = content.get("run") if isinstance(content, dict) else None
    if not isinstance(run, str) or not re.fullmatch(r"[0-9a-f]{32}", run):
        raise CorruptCheckpointError(f"{file}: it names no run")
    return run


def exists(file: Path) -> bool:
    """Whether there is anything of that name, a dangling link too.

    Raises:
      UnreadableCheckpointError: the system cannot say just now.
    """
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UnreadableCheckpointError(f"{file}: unreadable: {error.strerror}") from None
    return True


def inspect(path: PathLike, step: int, *, key: bytes | None = None) -> Manifest:
    """Reads the manifest of a step and checks its seal; no other file is read.

    Raises:
      CorruptCheckpointError: damaged, forged, of another step or another run.
      UnreadableCheckpointError: it cannot be read just now.
      CheckpointError: of a newer format.
      NoCheckpointError: no such step.
    """
    step = checked_step(step)
    if step not in steps(path):
        raise NoCheckpointError(f"{path}: no step {step}; there are {steps(path) or 'none'}")
    file = step_folder(path, step) / _manifest.NAME
    data = _files.read_bounded(file, _manifest.MAX_BYTES)
    try:
        manifest = _manifest.decode(data, key)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{file}: {error}") from None
    if manifest.step != step:
        raise CorruptCheckpointError(f"{file}: it is the manifest of step {manifest.step}")
    if manifest.run != run_identity(path):
        raise CorruptCheckpointError(f"{file}: it is the manifest of another run, {manifest.run}")
    return manifest


def drop(path: Path, step: int) -> None:
    """Removes a step: unlisted by one rename first, so that no half of it is ever seen."""
    shutil.rmtree(_move(path, step, f"{WORK}/drop-"))


def set_aside(path: Path, step: int) -> Path:
    """Moves away whatever lies where a step has to go; returns where to."""
    return _move(path, step, f"{ASIDE}/")


def _move(path: Path, step: int, prefix: str) -> Path:
    target = path / f"{prefix}{step:012d}-{secrets.token_hex(4)}"
    target.parent.mkdir(exist_ok=True)
    os.rename(step_folder(path, step), target)
    return target


def open_folder(path: Path) -> tuple[str, FolderLock]:
    """Makes a folder ready for a writer.

    Args:
      path: the folder, made if need be.

    Returns:
      The run's identity, and the lock.

    Raises:
      CheckpointError: another process has the lock.
      CorruptCheckpointError: it holds steps but no run.
      OSError: it cannot be made or written.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path)
    try:
        (path / STEPS).mkdir(exist_ok=True)
        (path / WORK).mkdir(exist_ok=True)
        for entry in list(os.scandir(path / WORK)):  # what a killed writer left of its own
            if entry.name.startswith(("save-", "drop-")):
                shutil.rmtree(entry.path, ignore_errors=True)
        if not exists(path / RUN):
            if steps(path):
                raise CorruptCheckpointError(
                    f"{path}: it holds steps but no {RUN}; restore that file, or use another folder"
                )
            content = {"format": _manifest.FORMAT, "run": secrets.token_hex(16)}
            _files.write_synced(path / RUN, dumps(content) + b"\n")
        return run_identity(path), lock
    except BaseException:
        lock.close()
        raise


def take_lock(path: Path) -> FolderLock:
    """Takes the one writer's lock, which ends with the process however that ends."""
    try:
        return FolderLock(path / LOCK)
    except BusyFolderError as error:
        raise CheckpointError(
            f"{path}: another process is writing checkpoints there: {error}; wait for it, or use "
            "another folder"
        ) from None


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps writers out of every checkpoint folder at or below `path`, up to three levels deep.

    Raises:
      CheckpointError: one is writing already; the message names its process.
    """
    with ExitStack() as locks:
        for pattern in ("", "*/", "*/*/", "*/*/*/"):
            for file in sorted(path.glob(pattern + LOCK)):
                locks.callback(take_lock(file.parent).close)
        yield
