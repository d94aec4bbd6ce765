"""Getting a step back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
from esper_fn.checkpoint._structure import build
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
    """What the host remembered, JSON."""
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    """Of what wrote it."""
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
      UnreadableCheckpointError: the step asked for cannot be read just now.
      CheckpointError: a newer format, a type that is not registered, more than `max_bytes`, or
        `only` names nothing.
    """
    if step is not None:
        step = checked_step(step)
        damage = first_damage(path, step, key=key)
        if damage is not None:
            message = f"{Path(path)}: {damage}; leave `step` out to take the newest sound one"
            if damage.verdict == "unreadable":
                raise UnreadableCheckpointError(message)
            raise CorruptCheckpointError(message)
        return _read(Path(path), step, only, like, key, max_bytes, ())
    passed: list[Damage] = []
    for candidate in reversed(steps(path)):
        damage = worst(path, candidate, key=key)
        if candidate not in steps(path):
            continue  # a writer has just collected it
        if damage is None:
            try:
                return _read(Path(path), candidate, only, like, key, max_bytes, tuple(passed))
            except (CorruptCheckpointError, UnreadableCheckpointError) as error:
                damage = of_manifest(Path(path), candidate, error)
        passed.append(damage)
    if not passed:
        run_identity(path)
    problems = "; ".join(map(str, passed)) or "it holds no step"
    raise NoCheckpointError(f"{Path(path)}: nothing to restore: {problems}")


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
        except CheckpointError:
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
        labels = _labels(keys) if isinstance(keys, list) else [str(n) for n in range(len(of))]
        if labels.count(label) > 1:
            raise CheckpointError(
                f"only={only!r}: {labels.count(label)} keys of other types are called {label!r} "
                "there; restore what lies above"
            )
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


def _labels(keys: list[Any]) -> list[str]:
    try:
        return [key_label(key) for key in keys]
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
        raise CorruptCheckpointError("the keys of a node have another form") from None


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
