"""Files of a step: listing without following links, hashing, syncing, sharing."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

from esper_fn.errors import CorruptCheckpointError, UnreadableCheckpointError

MAX_FILES = 100_000
_NO_FILE = {"ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENXIO"}
"""What the system says where no plain file is; anything else may be over in a moment."""


def is_safe(relative: object) -> bool:
    """Whether a listed path stays inside its folder on every system."""
    if not isinstance(relative, str) or not 0 < len(relative) <= 512:
        return False
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or c in "\\:" for c in relative):
        return False
    return all(part not in ("", ".", "..") for part in relative.split("/"))


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each plain file below a folder, by path relative to it.

    Raises:
      CorruptCheckpointError: a symbolic link or a special file, or more than `MAX_FILES`.
      OSError: a folder cannot be read.
    """
    return {name: status.st_size for name, status in statuses(folder).items()}


def statuses(folder: Path) -> dict[str, os.stat_result]:
    """What the system says of each plain file below a folder; raises as `sizes`."""
    files: dict[str, os.stat_result] = {}
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                    continue
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    raise CorruptCheckpointError(f"{entry.path}: neither a plain file nor a folder")
                files[Path(entry.path).relative_to(folder).as_posix()] = status
                if len(files) > MAX_FILES:
                    raise CorruptCheckpointError(f"{folder}: more than {MAX_FILES} files")
    return files


def _plain(path: str, flags: int) -> int:
    """Opens a file, but not through a link, and without waiting for the end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))


def sha256(path: Path) -> str:
    """The SHA-256 of a plain file, which is not opened through a link."""
    with open(path, "rb", buffering=0, opener=_plain) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A plain file's bytes, at most `max_bytes` of them.

    Raises:
      CorruptCheckpointError: missing, not a plain file, or longer.
      UnreadableCheckpointError: whatever else the system says; it may be over in a moment.
    """
    try:
        with open(path, "rb", opener=_plain) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CorruptCheckpointError(f"{path}: not a plain file")
            if status.st_size > max_bytes:
                raise CorruptCheckpointError(
                    f"{path}: {status.st_size} bytes, at most {max_bytes} are read"
                )
            return file.read(max_bytes + 1)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) in _NO_FILE:
            raise CorruptCheckpointError(f"{path}: {error.strerror}") from None
        raise UnreadableCheckpointError(f"{path}: unreadable: {error.strerror}") from None


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Waits until all files and folders below one are on the disk, from the leaves up."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file that appears whole under its name, and is on the disk on return."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def share(source: Path, target: Path) -> bool:
    """Gives the files of a folder second names in another; False where the system cannot."""
    try:
        for relative in sizes(source):
            link = target / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(source / relative, link, follow_symlinks=False)
    except (OSError, NotImplementedError, CorruptCheckpointError):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def num_disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, those with several names counted once."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(Path(parent, name))
            except OSError:  # gone meanwhile, or not to be read just now
                continue
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())
