"""Getting a step back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from esper_fn.checkpoint import _arrays, _files, _folder, _manifest, _orbax
from esper_fn.checkpoint._folder import PathLike
from esper_fn.checkpoint._json import corrupt_if_malformed, loads
from esper_fn.checkpoint._structure import assemble, check_structure, child_names, leaf_numbers
from esper_fn.checkpoint._verify import Damage, damage_by, damages, worst
from esper_fn.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    UnreadableCheckpointError,
)


class Restored(NamedTuple):
    """A step read back."""

    step: int
    value: Any
    """Arrays are NumPy's, on the host; typed random keys are JAX's."""
    record: Any
    """JSON that was saved along."""
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    """Of the packages that wrote it."""
    passed_over: tuple[Damage, ...]
    """Newer steps that were damaged; empty when nothing was."""


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

    It needs no template: the manifest has structure, dtypes, types of NamedTuples and random keys.

    Args:
      path: a checkpoint folder.
      step: one of `steps(path)`, which must be sound; left out, the newest sound one is taken, and
        `Restored.passed_over` says which newer ones were damaged.
      only: a path inside the value, as `state/params`; only this is read into memory.
      like: a value of the structure of what is restored; needed only where it has pytree nodes
        other than dicts, lists, tuples and registered NamedTuples.
      key: for the HMAC of the manifest, which is required then.
      max_bytes: largest size of all arrays together; the machine's memory when left out.

    Returns:
      The step, its value on the host, and what was saved along.

    Raises:
      NoCheckpointError: no step, or no sound one.
      CorruptCheckpointError: the step asked for is damaged.
      UnreadableCheckpointError: the step asked for cannot be read just now.
      CheckpointError: a newer format, a type that is not registered, more than `max_bytes`, or
        `only` names nothing.
    """
    read = partial(_read, path, only=only, like=like, key=key, max_bytes=max_bytes)
    if step is not None:
        step = _folder.checked_step(step)
        damage = next(damages(path, step, key=key), None)
        if damage is not None:
            message = f"{Path(path)}: {damage}; leave `step` out to take the newest sound one"
            if damage.verdict == "unreadable":
                raise UnreadableCheckpointError(message)
            raise CorruptCheckpointError(message)
        return read(step)
    passed: list[Damage] = []
    for candidate in reversed(_folder.steps(path)):
        damage = worst(path, candidate, key=key)
        if candidate not in _folder.steps(path):
            continue  # a writer has just collected it
        if damage is None:
            try:
                return read(candidate)._replace(passed_over=tuple(passed))
            except (CorruptCheckpointError, UnreadableCheckpointError) as error:
                damage = damage_by(error, path, candidate)
        passed.append(damage)
    if not passed:
        _folder.run_identity(path)
    problems = "; ".join(map(str, passed)) or "it holds no step"
    raise NoCheckpointError(f"{Path(path)}: nothing to restore: {problems}")


def _read(
    path: PathLike,
    step: int,
    *,
    only: str | None,
    like: Any,
    key: bytes | None,
    max_bytes: int | None,
) -> Restored:
    """Reads a step that is verified."""
    manifest = _folder.inspect(path, step, key=key)
    folder, leaves = _folder.step_folder(path, step), manifest.leaves
    check_structure(manifest.structure, len(leaves))
    structure = _selected(manifest.structure, only)
    indices = set(leaf_numbers(structure))
    size = sum(leaves[index].num_bytes for index in indices)
    limit = _memory_bytes() if max_bytes is None else max_bytes
    if size > limit:
        raise CheckpointError(
            f"{folder}: its arrays take {size} bytes, max_bytes is {limit}; pass a larger one, "
            "or restore a part with `only=`"
        )
    bits = {}
    for part in manifest.parts:
        if not indices.isdisjoint(index for index, _ in part.leaves):
            stored = _orbax.read(folder / part.folder, _arrays.expected(part, leaves))
            bits.update(_arrays.take(part, leaves, stored))
    values = {index: _arrays.verified(leaves[index], bits.get(index)) for index in indices}
    return Restored(
        step=step,
        value=assemble(structure, values, like),
        record=_record(folder) if _manifest.RECORD in manifest.files else None,
        metrics=manifest.metrics,
        versions=manifest.versions,
        passed_over=(),
    )


def _record(folder: Path) -> Any:
    file = folder / _manifest.RECORD
    data = _files.read_bounded(file, _folder.MAX_RECORD_BYTES)
    with corrupt_if_malformed(f"{file}"):
        return loads(data, max_bytes=_folder.MAX_RECORD_BYTES)


def _selected(node: Any, only: str | None) -> Any:
    """The part of the structure that `only` names."""
    for name in only.split("/") if only else ():
        names = child_names(node)
        if names.count(name) > 1:
            raise CheckpointError(
                f"only={only!r}: {names.count(name)} keys of other types are called {name!r} "
                "there; restore what lies above"
            )
        if name not in names:
            raise CheckpointError(
                f"only={only!r}: the checkpoint has no {name!r} there; it has "
                f"{', '.join(names[:20]) or 'nothing'}"
            )
        node = node["children"][names.index(name)]
    return node


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 36
