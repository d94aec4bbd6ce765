"""Writing steps: one writer a folder, asynchronous, a step whole or not at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np

from esper_fn.checkpoint import _arrays, _folder, _verify
from esper_fn.checkpoint._folder import PathLike
from esper_fn.checkpoint._json import dumps
from esper_fn.checkpoint._leaf import leaf_from_json, leaf_to_json, value_of
from esper_fn.checkpoint._manifest import Manifest
from esper_fn.checkpoint._restore import Restored, restore
from esper_fn.checkpoint._retention import Decision, Retention, decide, everything, latest
from esper_fn.checkpoint._store import Store
from esper_fn.checkpoint._structure import build, describe
from esper_fn.errors import CheckpointError


class CheckpointWarning(UserWarning):
    """A step was not written, or lies beside others that cannot be judged; training goes on."""


def warn(error: BaseException) -> None:
    """The default of `Writer(on_failure=)`: a `CheckpointWarning`."""
    warnings.warn(f"a checkpoint was not written: {error}", CheckpointWarning, stacklevel=2)


class Writer:
    """Writes the steps of one run into a folder; close it, or use it as a context manager.

    `save` copies the arrays and returns; hashing, writing and syncing go on in a thread. A step is
    acknowledged when its folder, manifest and all, has been renamed into place and the rename is
    on the disk. Until then nobody lists it; after that it is whole.

    Args:
      path: the folder, made if need be; what a killed writer left in it is removed.
      keep: what stays on disk; `latest(3)` when left out.
      key: at least 16 bytes; manifests get an HMAC then.
      share_unchanged: give an unchanged part of at least 1 MiB a second name (a hard link)
        instead of writing it again, up to 16 times. Where the file system cannot, it is written.
      on_failure: called with the error of an asynchronous save that failed, in the next call of
        `save`, `poll` or `wait`; warns when left out.

    Raises:
      CheckpointError: another writer has the folder, it holds something else, or the key is short.
      OSError: the folder cannot be made or written.

    Attributes:
      path: the folder.
      num_saved: steps acknowledged.
      num_failed: saves that failed.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        keep: Retention | None = None,
        key: bytes | None = None,
        share_unchanged: bool = True,
        on_failure: Callable[[BaseException], None] = warn,
    ) -> None:
        if key is not None and len(key) < 16:
            raise CheckpointError(f"key must have at least 16 bytes, got {len(key)}")
        self.path = Path(path)
        self._key = key
        self._on_failure = on_failure
        keep = latest(3) if keep is None else keep
        self._store = Store(self.path, keep, key, share_unchanged)
        self._pool: list[np.ndarray] = []
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copiers = ThreadPoolExecutor(2, thread_name_prefix="checkpoint-copy")
        self._is_closed = False
        self.num_saved = 0
        self.num_failed = 0

    @property
    def last_acknowledged(self) -> int | None:
        """The newest step written by this writer, or found sound by `restore`."""
        return self._store.last_acknowledged

    def restore(self, step: int | None = None, **options: Any) -> Restored:
        """`checkpoint.restore` from this writer's folder, with its key, after the save under way.

        What is sound stays from now on. What is proven corrupt makes way for later steps; what
        cannot be judged stays, and is set aside where a step of its number is written.
        """
        self._settle()
        restored = restore(self.path, step, key=self._key, **options)
        self._store.note_restored(restored.step, restored.passed_over)
        return restored

    def save(
        self,
        step: int,
        value: Any,
        *,
        record: Any = None,
        metrics: Mapping[str, float] | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        """Saves a value, asynchronously.

        Waits for the save before it, if that is still under way. The arrays may be donated or
        changed as soon as this returns.

        Args:
          step: training steps done.
          value: a pytree of arrays, random keys, Python numbers and strings.
          record: JSON to have back.
          metrics: finite numbers for `best`; others are left out.
          parts: paths inside `value`; what lies below one is stored, and shared with other steps,
            on its own.

        Raises:
          CheckpointError: the writer is closed, the step exists already and is sound, or the value
            cannot be stored, which `check` finds out beforehand. What goes wrong later goes to
            `on_failure`.
        """
        if self._is_closed:
            raise CheckpointError(f"{self.path}: this writer is closed")
        step = _folder.checked_step(step)
        self._settle()
        structure, leaves, arrays = describe(value)
        data = None if record is None else _record_bytes(record)
        numbers = _numbers(metrics or {})
        try:
            is_sound = self._store.is_sound(step)
        except OSError as error:  # the folder cannot be listed just now
            self._fail(error)
            return
        if is_sound:
            raise CheckpointError(
                f"{self.path}: step {step} exists and is sound; prune it first, or write to "
                "another folder"
            )
        copies = _arrays.fetch(arrays, leaves, self._pool, self._copiers)
        self._pool = [copy for copy in copies if copy is not None]
        draft = Manifest(step=step, structure=structure, leaves=tuple(leaves), metrics=numbers)
        self._pending = self._thread.submit(self._store.write, draft, copies, data, tuple(parts))

    def poll(self) -> bool:
        """Whether nothing is under way; passes an error of a save to `on_failure`."""
        if self._pending is not None and self._pending.done():
            self._settle()
        return self._pending is None

    def wait(self) -> bool:
        """Waits until the last save is acknowledged; False where it failed."""
        return self._settle()

    def close(self) -> None:
        """Waits for the save under way, and ends the lock."""
        if self._is_closed:
            return
        try:
            self._settle()
        finally:
            self._is_closed = True
            self._thread.shutdown()
            self._copiers.shutdown()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _settle(self) -> bool:
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        error = pending.exception()
        if error is not None:
            self._fail(error)
            return False
        self.num_saved += 1
        notices, self._store.notices = self._store.notices, []
        for notice in notices:
            warnings.warn(f"{self.path}: {notice}", CheckpointWarning, stacklevel=3)
        return True

    def _fail(self, error: BaseException) -> None:
        self.num_failed += 1
        self._on_failure(error)


def check(value: Any, *, record: Any = None, metrics: Mapping[str, float] | None = None) -> None:
    """Finds out before the first step whether `Writer.save` and `restore` can cope with a value.

    `fit` does so by itself; call it in a loop of your own. Nothing is written.

    Args:
      value: as for `Writer.save`.
      record: as there.
      metrics: as there.

    Raises:
      CheckpointError: they cannot; names the path of what is in the way, and the remedy.

    >>> check({1: 2.0, "layers": [{"weight": None}]})
    """
    structure, leaves, arrays = describe(value)
    again = [leaf_from_json(leaf_to_json(leaf)) for leaf in leaves]
    build(structure, list(map(value_of, again, arrays)), value)
    dumps(structure)
    _numbers(metrics or {})
    if record is not None:
        _record_bytes(record)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones, as floats; raises `CheckpointError` for what is no number."""
    numbers = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise CheckpointError(f"metrics must have strings for names, got {name!r}")
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"metrics[{name!r}] must be a number, got {type(value).__name__}: {error}"
            ) from None
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _record_bytes(record: Any) -> bytes:
    """The record's file; raises `CheckpointError` for what would not be read back."""
    try:
        data = dumps(record)
    except ValueError as error:
        raise CheckpointError(f"record: {error}") from None
    if len(data) > _folder.MAX_RECORD_BYTES:
        raise CheckpointError(
            f"record takes {len(data)} bytes, at most {_folder.MAX_RECORD_BYTES} are read back"
        )
    return data


def _raise(error: BaseException) -> None:
    raise error


def save(
    path: PathLike, step: int, value: Any, *, record: Any = None, key: bytes | None = None
) -> None:
    """Saves one step and waits until it is on the disk; all other steps stay.

    Args:
      path: the folder, made if need be.
      step: training steps done.
      value: as for `Writer.save`.
      record: JSON to have back.
      key: for an HMAC; see `Writer`.

    Raises:
      CheckpointError: as for `Writer.save`.
      OSError: the disk is full, or refuses.

    >>> import tempfile, numpy as np
    >>> from esper_fn.checkpoint import restore
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, 7, {"weight": np.ones(3)})
    ...     restore(folder).value["weight"].tolist()
    [1.0, 1.0, 1.0]
    """
    with Writer(path, keep=everything(), key=key, on_failure=_raise) as writer:
        writer.save(step, value, record=record)


def prune(
    path: PathLike,
    keep: Retention,
    *,
    dry_run: bool = False,
    key: bytes | None = None,
) -> list[Decision]:
    """Removes the steps of a folder that a retention does not keep.

    The newest sound step stays, and so does every step that cannot be judged: signed with another
    key, of a newer format, unreadable just now.

    Args:
      path: a checkpoint folder that no writer has open (unless `dry_run`).
      keep: what stays.
      dry_run: decide only.
      key: for the HMAC.

    Returns:
      Every step's fate and why, oldest first.

    Raises:
      NoCheckpointError: not a checkpoint folder.
      CheckpointError: a writer has it open.
    """
    root = Path(path)
    _folder.run_identity(root)
    with nullcontext() if dry_run else closing(_folder.take_lock(root)):
        faults, protected = {}, {}
        for step in reversed(_folder.steps(root)):
            damage = _verify.judge(root, step, key=key)
            if damage is None:
                protected[step] = "the newest sound step"
                break
            faults[step] = damage
        history = _verify.history(root, key=key, faults=faults)
        decisions = decide(keep, history, protected=protected)
        for decision in decisions:
            if not (decision.is_kept or dry_run):
                _folder.drop(root, decision.step)
        return decisions
