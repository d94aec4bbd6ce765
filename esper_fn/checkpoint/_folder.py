"""Reading a checkpoint folder: what is there, whether it is sound, and getting it back.

::

    run.json                     identity of the run
    steps/000000000100/          a step; it came here by one rename, whole
        manifest.jsonl           every file's size and SHA-256, sealed
        record.json              what the host remembered
        data/<content>/          an Orbax checkpoint of a part of the value
    .work/                       what is being written or removed; nobody reads it
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esper_fn.checkpoint import _arrays, _files, _manifest, _orbax, _retention
from esper_fn.checkpoint._json import loads
from esper_fn.checkpoint._manifest import Manifest
from esper_fn.checkpoint._structure import build
from esper_fn.errors import CheckpointError, CorruptCheckpointError, NoCheckpointError

RUN = "run.json"
STEPS = "steps"
WORK = ".work"
MAX_RECORD_BYTES = 1 << 30
_STEP_NAME = re.compile(r"\d{12}")

PathLike = str | os.PathLike[str]


class Damage(NamedTuple):
    """What is wrong with a step."""

    step: int
    file: str
    """Relative to the checkpoint folder."""
    problem: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.file}: {self.problem}"


class Restored(NamedTuple):
    """A step read back."""

    step: int
    value: Any
    """Arrays are NumPy's, on the host; typed random keys are JAX's."""
    record: Any
    """What the host remembered, JSON."""
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    """Of what wrote it."""
    passed_over: tuple[Damage, ...]
    """Newer steps that were damaged; empty when nothing was."""


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"{step:012d}"


def steps(path: PathLike) -> list[int]:
    """Acknowledged steps of a checkpoint folder, oldest first; damaged ones too.

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
    """Identity of the run a folder belongs to.

    Raises:
      NoCheckpointError: not a checkpoint folder.
      CorruptCheckpointError: its `run.json` is damaged.
    """
    file = Path(path) / RUN
    if not file.is_file():
        raise NoCheckpointError(f"{path}: not a checkpoint folder (it has no {RUN})")
    try:
        content = loads(_files.read_bounded(file, 4096), max_bytes=4096)
    except ValueError as error:
        raise CorruptCheckpointError(f"{file}: {error}") from None
    run = content.get("run") if isinstance(content, dict) else None
    if not isinstance(run, str) or not re.fullmatch(r"[0-9a-f]{32}", run):
        raise CorruptCheckpointError(f"{file}: it names no run")
    return run


def inspect(path: PathLike, step: int, *, key: bytes | None = None) -> Manifest:
    """The manifest of a step, its seal checked; no other file is looked at.

    Raises:
      CorruptCheckpointError: damaged, forged, of another step or another run.
      CheckpointError: of a newer format.
      NoCheckpointError: no such step.
    """
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


def damages(path: PathLike, step: int, *, key: bytes | None = None) -> Iterator[Damage]:
    """Everything that is wrong with a step, the manifest first; nothing for a sound one.

    Raises:
      CheckpointError: of a newer format.
      NoCheckpointError: no such step.
    """
    root = Path(path)
    folder = root / STEPS / step_name(step)
    where = f"{STEPS}/{step_name(step)}"
    try:
        manifest = inspect(path, step, key=key)
    except CorruptCheckpointError as error:
        text = str(error)
        for name, file in (
            (f"{where}/{_manifest.NAME}", folder / _manifest.NAME),
            (RUN, root / RUN),
        ):
            if text.startswith(f"{file}: "):
                yield Damage(step, name, text.removeprefix(f"{file}: "))
                return
        yield Damage(step, f"{where}/{_manifest.NAME}", text)
        return
    except NoCheckpointError:
        if step in steps(path):
            yield Damage(step, RUN, "missing")
            return
        raise
    try:
        present = _files.sizes(folder)
    except (CorruptCheckpointError, OSError) as error:
        yield Damage(step, where, str(error))
        return
    for name, told in sorted(manifest.files.items()):
        if name not in present:
            yield Damage(step, f"{where}/{name}", "missing")
        elif present[name] != told.num_bytes:
            yield Damage(
                step, f"{where}/{name}", f"{present[name]} bytes instead of {told.num_bytes}"
            )
        else:
            try:
                found = _files.sha256(folder / name)
            except OSError as error:
                yield Damage(step, f"{where}/{name}", f"unreadable: {error.strerror}")
                continue
            if found != told.sha256:
                yield Damage(step, f"{where}/{name}", "its SHA-256 does not match")
    for name in sorted(present.keys() - manifest.files.keys() - {_manifest.NAME}):
        yield Damage(step, f"{where}/{name}", "not listed in the manifest")


def first_damage(path: PathLike, step: int, *, key: bytes | None = None) -> Damage | None:
    """The first bad file of a step, or None for a sound one."""
    return next(damages(path, step, key=key), None)


def verify(path: PathLike, *, key: bytes | None = None) -> dict[int, Damage | None]:
    """Reads every byte of every step: the first bad file of each, or None where it is sound.

    Args:
      path: a checkpoint folder.
      key: for the HMAC of the manifests.

    Raises:
      NoCheckpointError: not a checkpoint folder.
      CheckpointError: a step of a newer format.
    """
    if not steps(path):
        run_identity(path)
    return {step: first_damage(path, step, key=key) for step in steps(path)}


def restore(
    path: PathLike,
    step: int | None = None,
    *,
    only: str | None = None,
    like: Any = None,
    key: bytes | None = None,
    max_bytes: int | None = None,
) -> Restored:
    """Reads a step back, after verifying every byte of it.

    Needs no template: structure, dtypes, types of NamedTuples and random keys stand in the
    manifest.

    Args:
      path: a checkpoint folder.
      step: one of `steps(path)`, which must be sound; left out, the newest sound one is taken, and
        `Restored.passed_over` says which newer ones were damaged.
      only: a path inside the value, as `state/params`; only this is read into memory.
      like: a value of the structure of what is restored; needed only where it has pytree nodes
        other than dicts, lists, tuples and registered NamedTuples.
      key: for the HMAC of the manifest, which is required then.
      max_bytes: largest size of all arrays together; the machine's memory when left out.

    Raises:
      NoCheckpointError: no step, or no sound one.
      CorruptCheckpointError: the step asked for is damaged.
      CheckpointError: a newer format, a type that is not registered, more than `max_bytes`, or
        `only` names nothing.
    """
    if step is not None:
        damage = first_damage(path, step, key=key)
        if damage is not None:
            raise CorruptCheckpointError(
                f"{Path(path)}: {damage}; leave `step` out to take the newest sound one"
            )
        return _read(Path(path), step, only, like, key, max_bytes, ())
    passed: list[Damage] = []
    for candidate in reversed(steps(path)):
        damage = first_damage(path, candidate, key=key)
        if candidate not in steps(path):
            continue  # a writer has just collected it
        if damage is None:
            try:
                return _read(Path(path), candidate, only, like, key, max_bytes, tuple(passed))
            except CorruptCheckpointError as error:
                damage = Damage(candidate, f"{STEPS}/{step_name(candidate)}", str(error))
        passed.append(damage)
    if not passed:
        run_identity(path)
    told = "; ".join(map(str, passed)) or "it holds no step"
    raise NoCheckpointError(f"{Path(path)}: nothing to restore: {told}")


def _read(
    root: Path,
    step: int,
    only: str | None,
    like: Any,
    key: bytes | None,
    max_bytes: int | None,
    passed: Sequence[Damage],
) -> Restored:
    manifest = inspect(root, step, key=key)
    folder = root / STEPS / step_name(step)
    structure, wanted = _selected(manifest, only)
    size = sum(manifest.leaves[index].num_bytes for index in wanted)
    limit = _memory_bytes() if max_bytes is None else max_bytes
    if size > limit:
        raise CheckpointError(
            f"{folder}: its arrays take {size} bytes, max_bytes is {limit}; pass a larger one, or "
            "restore a part with `only=`"
        )
    bits = {}
    for part in manifest.parts:
        if wanted.isdisjoint(index for index, _ in part.leaves):
            continue
        stored = _orbax.read(folder / part.folder, _arrays.expected(part, manifest.leaves))
        bits.update(_arrays.take(part, manifest.leaves, stored))
    places = sorted(wanted)
    values = [
        _arrays.value_of(manifest.leaves[i], bits.get(i), manifest.digests[i]) for i in places
    ]
    record = None
    if _manifest.RECORD in manifest.files:
        try:
            record = loads(
                _files.read_bounded(folder / _manifest.RECORD, MAX_RECORD_BYTES),
                max_bytes=MAX_RECORD_BYTES,
            )
        except CorruptCheckpointError:
            raise
        except ValueError as error:
            raise CorruptCheckpointError(f"{folder / _manifest.RECORD}: {error}") from None
    return Restored(
        step=step,
        value=build(_renumbered(structure, {i: n for n, i in enumerate(places)}), values, like),
        record=record,
        metrics=manifest.metrics,
        versions=manifest.versions,
        passed_over=tuple(passed),
    )


def _selected(manifest: Manifest, only: str | None) -> tuple[Any, set[int]]:
    """The part of the structure that `only` names, and the leaves it has."""
    node = manifest.structure
    for label in only.split("/") if only else ():
        of = node.get("of", []) if isinstance(node, dict) else []
        keys = node.get("keys") if isinstance(node, dict) else None
        labels = keys if isinstance(keys, list) else [str(n) for n in range(len(of))]
        if label not in labels or len(labels) != len(of):
            raise CheckpointError(
                f"only={only!r}: the checkpoint has no {label!r} there; it has "
                f"{', '.join(map(str, labels[:20])) or 'nothing'}"
            )
        node = of[labels.index(label)]
    wanted: set[int] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if type(one) is int:
            if not 0 <= one < len(manifest.leaves):
                raise CorruptCheckpointError(f"the structure names leaf {one}, which is none")
            wanted.add(one)
        elif isinstance(one, dict) and isinstance(one.get("of", []), list):
            waiting.extend(one.get("of", []))
        else:
            raise CorruptCheckpointError("a node of the structure has another form")
    return node, wanted


def _renumbered(node: Any, places: Mapping[int, int]) -> Any:
    if type(node) is int:
        return places[node]
    if "of" not in node:
        return node
    return node | {"of": [_renumbered(child, places) for child in node["of"]]}


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 36


def history(
    path: PathLike, *, key: bytes | None = None, unsound: frozenset[int] = frozenset()
) -> list[_retention.Step]:
    """The steps on disk as a retention sees them. Only manifests are read.

    Args:
      path: a checkpoint folder.
      key: for the HMAC.
      unsound: steps that are known to be damaged; so are those whose manifest is.
    """
    found = []
    for step in steps(path):
        folder = Path(path) / STEPS / step_name(step)
        try:
            manifest = inspect(path, step, key=key)
        except CheckpointError:
            blobs = {f"step {step}": _files.num_disk_bytes(folder)}
            found.append(_retention.Step(step=step, blobs=blobs, metrics={}, is_sound=False))
            continue
        blobs = {f"step {step}": (folder / _manifest.NAME).stat().st_size}
        for name, told in manifest.files.items():
            try:
                status = os.lstat(folder / name)
            except OSError:
                continue
            # A file that several steps share is one file with several names.
            blobs[f"file {status.st_dev} {status.st_ino}"] = told.num_bytes
        found.append(
            _retention.Step(
                step=step,
                blobs=blobs,
                metrics=manifest.metrics,
                is_sound=step not in unsound,
            )
        )
    return found
