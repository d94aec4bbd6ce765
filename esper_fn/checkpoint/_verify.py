"""Whether steps are what was acknowledged, and what is known of those that are not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from esper_fn.checkpoint import _files, _manifest, _retention
from esper_fn.checkpoint._folder import (
    RUN,
    STEPS,
    PathLike,
    checked_step,
    inspect,
    run_identity,
    step_name,
    steps,
)
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
    step = checked_step(step)
    root = Path(path)
    folder = root / STEPS / step_name(step)
    prefix = f"{STEPS}/{step_name(step)}"
    try:
        manifest = inspect(path, step, key=key)
        check_structure(manifest.structure, len(manifest.leaves))
    except (CorruptCheckpointError, UnreadableCheckpointError) as error:
        yield of_manifest(root, step, error)
        return
    except NoCheckpointError:
        if step in steps(path):
            yield Damage(step, RUN, "missing")
            return
        raise
    try:
        present = _files.sizes(folder)
    except CorruptCheckpointError as error:
        yield Damage(step, prefix, str(error))
        return
    except OSError as error:
        yield Damage(step, prefix, f"unreadable: {error.strerror}", "unreadable")
        return
    # A signed manifest proves nothing to a reader without the key.
    proof: Any = "doubtful" if manifest.is_signed and key is None else "corrupt"
    for name, listed in sorted(manifest.files.items()):
        if name not in present:
            yield Damage(step, f"{prefix}/{name}", "missing", proof)
        elif present[name] != listed.num_bytes:
            problem = f"{present[name]} bytes instead of {listed.num_bytes}"
            yield Damage(step, f"{prefix}/{name}", problem, proof)
        else:
            try:
                digest = _files.sha256(folder / name)
            except OSError as error:
                problem = f"unreadable: {error.strerror}"
                yield Damage(step, f"{prefix}/{name}", problem, "unreadable")
                continue
            if digest != listed.sha256:
                yield Damage(step, f"{prefix}/{name}", "its SHA-256 does not match", proof)
    for name in sorted(present.keys() - manifest.files.keys() - {_manifest.NAME}):
        yield Damage(step, f"{prefix}/{name}", "not listed in the manifest")


def of_manifest(root: Path, step: int, error: CheckpointError) -> Damage:
    """Makes a damage of an error that `inspect` raised."""
    prefix, text = f"{STEPS}/{step_name(step)}", str(error)
    verdict: Any = "unreadable" if isinstance(error, UnreadableCheckpointError) else "doubtful"
    for name in (f"{prefix}/{_manifest.NAME}", RUN):
        if text.startswith(f"{root / name}: "):
            return Damage(step, name, text.removeprefix(f"{root / name}: "), verdict)
    return Damage(step, f"{prefix}/{_manifest.NAME}", text, verdict)


def first_damage(path: PathLike, step: int, *, key: bytes | None = None) -> Damage | None:
    """The first bad file of a step, or None for a sound one."""
    return next(damages(path, step, key=key), None)


def judge(path: PathLike, step: int, *, key: bytes | None = None) -> Damage | None:
    """`worst` of a step's damages, a newer format being a doubt rather than an error."""
    try:
        return worst(path, step, key=key)
    except CheckpointError as error:
        return Damage(step, f"{STEPS}/{step_name(step)}", str(error))


def worst(path: PathLike, step: int, *, key: bytes | None = None) -> Damage | None:
    """The first damage of a step that leaves a doubt, else the first; None for a sound one."""
    all_damages = list(damages(path, step, key=key))
    doubts = [damage for damage in all_damages if damage.verdict != "corrupt"]
    return next(iter([*doubts, *all_damages]), None)


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
    if not steps(path):
        run_identity(path)
    return {step: first_damage(path, step, key=key) for step in steps(path)}


def history(
    path: PathLike,
    *,
    key: bytes | None = None,
    unsound: frozenset[int] = frozenset(),
    doubtful: Mapping[int, str] = MappingProxyType({}),
) -> list[_retention.Step]:
    """Lists the steps on disk as a retention sees them. Only manifests are read.

    Args:
      path: a checkpoint folder.
      key: for the HMAC.
      unsound: steps that are proven corrupt.
      doubtful: steps that cannot be judged, and why; so are those whose manifest cannot be read
        with this key and version, or does not list a file that is there.
    """
    rows = []
    for step in steps(path):
        folder = Path(path) / STEPS / step_name(step)
        doubt = doubtful.get(step, "")
        metrics: Mapping[str, float] = {}
        statuses: Mapping[str, os.stat_result] = {}
        try:
            statuses = _files.statuses(folder)
            manifest = inspect(path, step, key=key)
            metrics = manifest.metrics
            doubt = doubt or _doubt(manifest, statuses, key)
        except CheckpointError as error:
            doubt = doubt or str(error)
        except OSError as error:
            doubt = doubt or f"{folder}: unreadable: {error.strerror}"
        rows.append(
            _retention.Step(
                step=step,
                # A file that several steps share is one file with several names.
                blobs={
                    f"file {status.st_dev} {status.st_ino}": status.st_size
                    for status in statuses.values()
                },
                metrics=metrics,
                is_sound=step not in unsound,
                doubt=doubt,
            )
        )
    return rows


def _doubt(manifest: Manifest, present: Mapping[str, Any], key: bytes | None) -> str:
    if manifest.is_signed and key is None:
        return "it is signed, and no key is given"
    more = sorted(present.keys() - manifest.files.keys() - {_manifest.NAME})
    return f"its manifest does not list {more[0]!r}" if more else ""
