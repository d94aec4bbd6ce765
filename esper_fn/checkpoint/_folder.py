"""A checkpoint folder: its steps, their manifests, and how a step leaves it.

::

    run.json                     identity of the run
    steps/000000000100/          a step; it came here by one rename, whole
        manifest.jsonl           every file's size and SHA-256, sealed
        record.json              what the caller wants back
        data/<content>/          an Orbax checkpoint of a part of the value
    .work/                       what is being written or removed; nobody reads it
    set_aside/                   what lay where a step had to go, and is not proven corrupt
"""

from __future__ import annotations

import operator
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from esper_fn.checkpoint import _files, _manifest
from esper_fn.checkpoint._json import loads
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


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"{step:012d}"


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
    try:
        content = loads(_files.read_bounded(file, 4096), max_bytes=4096)
    except ValueError as error:
        raise CorruptCheckpointError(f"{file}: {error}") from None
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
    folder = Path(path) / STEPS / step_name(step)
    if step not in steps(path):
        raise NoCheckpointError(f"{path}: no step {step}; there are {steps(path) or 'none'}")
    file = folder / _manifest.NAME
    try:
        manifest = _manifest.decode(_files.read_bounded(file, _manifest.MAX_BYTES), key)
    except CorruptCheckpointError as error:
        text = str(error)
        raise CorruptCheckpointError(
            text if text.startswith(str(file)) else f"{file}: {text}"
        ) from None
    if manifest.step != step:
        raise CorruptCheckpointError(f"{file}: it is the manifest of step {manifest.step}")
    if manifest.run != run_identity(path):
        raise CorruptCheckpointError(f"{file}: it is the manifest of another run, {manifest.run}")
    return manifest


def drop(path: Path, step: int) -> None:
    """Removes a step: unlisted by one rename first, so that no half of it is ever seen."""
    work = path / WORK / f"drop-{step_name(step)}-{secrets.token_hex(4)}"
    work.parent.mkdir(exist_ok=True)
    os.rename(path / STEPS / step_name(step), work)
    shutil.rmtree(work)


def set_aside(path: Path, step: int) -> Path:
    """Moves away whatever lies where a step has to go; returns where to."""
    aside = path / ASIDE / f"{step_name(step)}-{secrets.token_hex(4)}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(path / STEPS / step_name(step), aside)
    return aside
