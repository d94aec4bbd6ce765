"""One process at a time for a folder.

It is a lock of the system where there is one: it ends with the process, however that ends. Where
there is none (some network folders, no `fcntl`), the file names the process, and on that machine
the lock finds out whether that process still runs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_MAX_BYTES = 4096


class BusyFolderError(Exception):
    """Another process has the lock; the message names it."""


class FolderLock:
    """An exclusive lock on a file; the file stays when the lock ends, and its JSON names the owner.

    Args:
      path: the file; made if need be.
      content: further fields of the JSON.

    Raises:
      BusyFolderError: another process has it.
      OSError: the file cannot be made.
    """

    def __init__(self, path: Path, content: dict[str, Any] | None = None) -> None:
        self._path = path
        flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
        self._file: IO[bytes] = os.fdopen(handle, "r+b", buffering=0)
        try:
            self.was_empty, owner = self._read()
            if not self._take() and _may_live(owner):
                raise BusyFolderError(_named(owner, path))
            self._content = dict(content or {})
            self._write({**self._content, "owner": _this_process()})
        except BaseException:
            self._file.close()
            raise

    def _take(self) -> bool:
        """Takes the system's lock; False where the system has none."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise BusyFolderError(_named(self._read()[1], self._path)) from None
            return False
        return True

    def _read(self) -> tuple[bool, dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read(_MAX_BYTES)
        try:
            owner = json.loads(data)["owner"]
        except (ValueError, TypeError, KeyError, RecursionError):
            owner = None
        return not data, owner if isinstance(owner, dict) else {}

    def _write(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode() + b"\n"
        self._file.seek(0)
        self._file.truncate()
        self._file.write(data)

    def close(self) -> None:
        """Ends the lock; the file stays and names no process."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            self._write(self._content)
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "began": _began(pid)}


def _began(pid: int) -> str | None:
    """When a process began, as the system counts: so two processes of one number differ."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return None


def _may_live(owner: dict[str, Any]) -> bool:
    """Whether the owner may still run; a process of another machine may."""
    pid = owner.get("pid")
    if type(pid) is not int or pid < 1:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    began = _began(pid)
    return began is None or owner.get("began") in {None, began}


def _named(owner: dict[str, Any], path: Path) -> str:
    pid, host = owner.get("pid"), owner.get("host")
    if pid is None:
        return f"another process (`fuser {path}` names it)"
    if host != socket.gethostname():
        return (
            f"process {pid!r} on {host!r}; if it is gone and this is a network folder without "
            f"locks, remove {path}"
        )
    if pid == os.getpid():
        return f"this very process ({pid}), which has not closed it yet"
    return f"process {pid!r} on this machine"
