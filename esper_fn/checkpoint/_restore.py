"""Getting a step back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from esper_fn.checkpoint import _arrays, _files, _manifest, _orbax
from esper_fn.checkpoint._folder import (
    MAX_RECORD_BYTES,
    STEPS,
    PathLike,
    checked_step,
    inspect,
    run_identity,
    step_name,
    steps,
)
from esper_fn.checkpoint._json import loads
from esper_fn.checkpoint._keys import label as key_label
from esper_fn.checkpoint._manifest import Manifest
from esper_fn.checkpoint._structure import build, check_structure
from esper_fn.checkpoint._verify import Damage, first_damage, of_manifest, worst
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
    reader = _Reader(Path(path), only, like, key, max_bytes)
    if step is not None:
        step = checked_step(step)
        damage = first_damage(path, step, key=key)
        if damage is not None:
            message = f"{Path(path)}: {damage}; leave `step` out to take the newest sound one"
            if damage.verdict == "unreadable":
                raise UnreadableCheckpointError(message)
            raise CorruptCheckpointError(message)
        return reader.read(step)
    passed: list[Damage] = []
    for candidate in reversed(steps(path)):
        damage = worst(path, candidate, key=key)
        if candidate not in steps(path):
            continue  # a writer has just collected it
        if damage is None:
            try:
                return reader.read(candidate)._replace(passed_over=tuple(passed))
            except (CorruptCheckpointError, UnreadableCheckpointError) as error:
                damage = of_manifest(Path(path), candidate, error)
        passed.append(damage)
    if not passed:
        run_identity(path)
    problems = "; ".join(map(str, passed)) or "it holds no step"
    raise NoCheckpointError(f"{Path(path)}: nothing to restore: {problems}")


@dataclass(frozen=True)
class _Reader:
    """Reads steps that are verified, as `restore` was called."""

    root: Path
    only: str | None
    like: Any
    key: bytes | None
    max_bytes: int | None

    def read(self, step: int) -> Restored:
        manifest = inspect(self.root, step, key=self.key)
        folder = self.root / STEPS / step_name(step)
        structure, indices = _selected(manifest, self.only)
        size = sum(manifest.leaves[index].num_bytes for index in indices)
        limit = _memory_bytes() if self.max_bytes is None else self.max_bytes
        if size > limit:
            raise CheckpointError(
                f"{folder}: its arrays take {size} bytes, max_bytes is {limit}; pass a larger one, "
                "or restore a part with `only=`"
            )
        bits = {}
        for part in manifest.parts:
            if not indices.isdisjoint(index for index, _ in part.leaves):
                stored = _orbax.read(folder / part.folder, _arrays.expected(part, manifest.leaves))
                bits.update(_arrays.take(part, manifest.leaves, stored))
        order = sorted(indices)
        values = [
            _arrays.value_of(manifest.leaves[i], bits.get(i), manifest.digests[i]) for i in order
        ]
        structure = _renumbered(structure, {index: n for n, index in enumerate(order)})
        return Restored(
            step=step,
            value=build(structure, values, self.like),
            record=_record(folder) if _manifest.RECORD in manifest.files else None,
            metrics=manifest.metrics,
            versions=manifest.versions,
            passed_over=(),
        )


def _record(folder: Path) -> Any:
    file = folder / _manifest.RECORD
    data = _files.read_bounded(file, MAX_RECORD_BYTES)
    try:
        return loads(data, max_bytes=MAX_RECORD_BYTES)
    except ValueError as error:
        raise CorruptCheckpointError(f"{file}: {error}") from None


def _selected(manifest: Manifest, only: str | None) -> tuple[Any, set[int]]:
    """The part of the structure that `only` names, and its leaves."""
    node = manifest.structure
    check_structure(node, len(manifest.leaves))
    for name in only.split("/") if only else ():
        children = [] if type(node) is int else node.get("children", [])
        labels = [str(n) for n in range(len(children))]
        if children and node["kind"] in ("dict", "named"):
            labels = _labels(node["keys"])
        if labels.count(name) > 1:
            raise CheckpointError(
                f"only={only!r}: {labels.count(name)} keys of other types are called {name!r} "
                "there; restore what lies above"
            )
        if name not in labels:
            raise CheckpointError(
                f"only={only!r}: the checkpoint has no {name!r} there; it has "
                f"{', '.join(map(str, labels[:20])) or 'nothing'}"
            )
        node = children[labels.index(name)]
    indices: set[int] = set()
    pending = [node]
    while pending:
        inner = pending.pop()
        if type(inner) is int:
            indices.add(inner)
        else:
            pending.extend(inner.get("children", []))
    return node, indices


def _labels(keys: list[Any]) -> list[str]:
    try:
        return [key_label(key) for key in keys]
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
        raise CorruptCheckpointError("the keys of a node have another form") from None


def _renumbered(node: Any, numbers: Mapping[int, int]) -> Any:
    if type(node) is int:
        return numbers[node]
    if "children" not in node:
        return node
    return node | {"children": [_renumbered(child, numbers) for child in node["children"]]}


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 36
