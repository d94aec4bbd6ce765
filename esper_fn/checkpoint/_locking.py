"""One writer for a folder: its lock, and what a killed writer left."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from esper_fn._lock import BusyFolderError, FolderLock
from esper_fn.checkpoint import _files, _folder, _manifest
from esper_fn.checkpoint._folder import STEPS, WORK
from esper_fn.checkpoint._json import dumps
from esper_fn.errors import CheckpointError, CorruptCheckpointError

LOCK = "lock"


def _clear(work: Path) -> None:
    """Removes what a killed writer left of its own."""
    work.mkdir(exist_ok=True)
    for entry in list(os.scandir(work)):
        if entry.name.startswith(("save-", "drop-")):
            shutil.rmtree(entry.path, ignore_errors=True)


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
        _clear(path / WORK)
        if not _folder.exists(path / _folder.RUN):
            if _folder.steps(path):
                raise CorruptCheckpointError(
                    f"{path}: it holds steps but no {_folder.RUN}; restore that file, or use "
                    "another folder"
                )
            content = {"format": _manifest.FORMAT, "run": secrets.token_hex(16)}
            _files.write_synced(path / _folder.RUN, dumps(content) + b"\n")
        return _folder.run_identity(path), lock
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
