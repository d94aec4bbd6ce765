"""Whether steps are what was acknowledged, and what is known of those that are not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from esper_fn.checkpoint import _files, _folder, _manifest, _retention
from esper_fn.checkpoint._folder import PathLike
from esper_fn.checkpoint._manifest import Manifest
from esper_fn.checkpoint._structure import check_structure
from esper_fn.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    UnreadableCheckpointError,
)


class Damage(NamedTuple):
    """What is wrong with a step."""

    step: int
    file: str
    """Relative to the checkpoint folder."""
    problem: str
    verdict: Literal["corrupt", "doubtful", "unreadable"] = "doubtful"
    """`corrupt`: a manifest that is authentic says so, and the step may be removed. `doubtful`: a
    reader with another key or version may find it sound. `unreadable`: it cannot be read just now.
    """

    def __str__(self) -> str:
        return f"step {self.step}: {self.file}: {self.problem}"


def damages(path: PathLike, step: int, *, key: bytes | None = None) -> Iterator[Damage]:
    """Finds everything that is wrong with a step, the manifest first; nothing for a sound one.

    Raises:
      CheckpointError: of a newer format.
      NoCheckpointError: no such step.
    """
    step = _folder.checked_step(step)
    folder = _folder.step_folder(path, step)
    name = _relative(step)
    try:
        manifest = _folder.inspect(path, step, key=key)
        check_structure(manifest.structure, len(manifest.leaves))
    except (CorruptCheckpointError, UnreadableCheckpointError) as error:
        yield damage_by(error, path, step)
        return
    except NoCheckpointError:
        if step in _folder.steps(path):
            yield Damage(step, _folder.RUN, "missing")
            return
        raise
    try:
        present = _files.sizes(folder)
    except CorruptCheckpointError as error:
        yield Damage(step, name, str(error))
        return
    except OSError as error:
        yield Damage(step, name, f"unreadable: {error.strerror}", "unreadable")
        return
    # A signed manifest proves nothing to a reader without the key.
    proof: Any = "doubtful" if manifest.is_signed and key is None else "corrupt"
    for file, listed in sorted(manifest.files.items()):
        size, verdict, problem = present.get(file), proof, ""
        if size is None:
            problem = "missing"
        elif size != listed.num_bytes:
            problem = f"{size} bytes instead of {listed.num_bytes}"
        else:
            try:
                if _files.sha256(folder / file) != listed.sha256:
                    problem = "its SHA-256 does not match"
            except OSError as error:
                problem, verdict = f"unreadable: {error.strerror}", "unreadable"
        if problem:
            yield Damage(step, f"{name}/{file}", problem, verdict)
    for file in _unlisted(manifest, present):
        yield Damage(step, f"{name}/{file}", "not listed in the manifest")


def _relative(step: int) -> str:
    return _folder.step_folder("", step).as_posix()


def _unlisted(manifest: Manifest, present: Iterable[str]) -> list[str]:
    return sorted(set(present) - manifest.files.keys() - {_manifest.NAME})


def damage_by(error: CheckpointError, path: PathLike, step: int) -> Damage:
    """Makes a damage of an error that `inspect` raised."""
    verdict: Any = "unreadable" if isinstance(error, UnreadableCheckpointError) else "doubtful"
    for name in (_folder.RUN, manifest := f"{_relative(step)}/{_manifest.NAME}"):
        prefix = f"{Path(path) / name}: "
        if str(error).startswith(prefix):
            return Damage(step, name, str(error).removeprefix(prefix), verdict)
    return Damage(step, manifest, str(error), verdict)


def judge(path: PathLike, step: int, *, key: bytes | None = None) -> Damage | None:
    """`worst` of a step's damages, a newer format being a doubt rather than an error."""
    try:
        return worst(path, step, key=key)
    except CheckpointError as error:
        return Damage(step, _relative(step), str(error))


def worst(path: PathLike, step: int, *, key: bytes | None = None) -> Damage | None:
    """The first damage of a step that leaves a doubt, else the first; None for a sound one."""
    all_damages = sorted(damages(path, step, key=key), key=lambda row: row.verdict == "corrupt")
    return all_damages[0] if all_damages else None


def verify(path: PathLike, *, key: bytes | None = None) -> dict[int, Damage | None]:
    """Reads every byte of every step.

    Args:
      path: a checkpoint folder.
      key: for the HMAC of the manifests.

    Returns:
      By step: its first damage, or None where it is sound.

    Raises:
      NoCheckpointError: not a checkpoint folder.
      CheckpointError: a step of a newer format.
    """
    if not _folder.steps(path):
        _folder.run_identity(path)
    return {step: next(damages(path, step, key=key), None) for step in _folder.steps(path)}


def history(
    path: PathLike, *, key: bytes | None = None, faults: Mapping[int, Damage]
) -> list[_retention.Step]:
    """Lists the steps on disk as a retention sees them. Only manifests are read.

    Args:
      path: a checkpoint folder.
      key: for the HMAC.
      faults: of steps known to be unsound. A step that is not proven corrupt cannot be judged; nor
        can one whose manifest cannot be read with this key and version, or does not list a file
        that is there.
    """
    rows = []
    for step in _folder.steps(path):
        folder, fault = _folder.step_folder(path, step), faults.get(step)
        is_corrupt = fault is not None and fault.verdict == "corrupt"
        doubt = "" if fault is None or is_corrupt else f"{fault.file}: {fault.problem}"
        metrics: Mapping[str, float] = {}
        statuses: Mapping[str, os.stat_result] = {}
        try:
            statuses = _files.statuses(folder)
            manifest = _folder.inspect(path, step, key=key)
            metrics = manifest.metrics
            if manifest.is_signed and key is None:
                doubt = doubt or "it is signed, and no key is given"
            if more := _unlisted(manifest, statuses):
                doubt = doubt or f"its manifest does not list {more[0]!r}"
        except CheckpointError as error:
            doubt = doubt or str(error)
        except OSError as error:
            doubt = doubt or f"{folder}: unreadable: {error.strerror}"
        # A file that several steps share is one file with several names.
        blobs = {f"file {row.st_dev} {row.st_ino}": row.st_size for row in statuses.values()}
        rows.append(
            _retention.Step(
                step=step, blobs=blobs, metrics=metrics, is_sound=not is_corrupt, doubt=doubt
            )
        )
    return rows
