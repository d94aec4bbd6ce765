"""Writing steps: one writer a folder, asynchronous, a step whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from esper_fn.checkpoint import _arrays, _files, _folder, _manifest, _orbax, _retention, _verify
from esper_fn.checkpoint._check import numbers_of, record_bytes
from esper_fn.checkpoint._folder import STEPS, WORK, PathLike, step_name
from esper_fn.checkpoint._manifest import FileInfo, Manifest
from esper_fn.checkpoint._place import drop, open_folder, set_aside
from esper_fn.checkpoint._restore import Restored, restore
from esper_fn.checkpoint._structure import Leaf, describe
from esper_fn.errors import CheckpointError

MAX_SHARED = 16
"""Steps that may share one copy of a part. A flaw of the disk in it costs all of them."""

OVERHEAD_BYTES = 512 * 2**10
"""What a step takes beside its arrays, before the first one has been measured."""


ROOT_BYTES = 4096
"""What a folder holds beside its steps, at most; a byte budget has to pay for it too."""


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
    """

    def __init__(
        self,
        path: PathLike,
        *,
        keep: _retention.Retention | None = None,
        key: bytes | None = None,
        share_unchanged: bool = True,
        on_failure: Callable[[BaseException], None] = warn,
    ) -> None:
        """Opens a folder, making it if need be, and removes what a killed writer left.

        Args:
          path: the folder.
          keep: what stays on disk; `latest(3)` when left out.
          key: at least 16 bytes; manifests get an HMAC then.
          share_unchanged: give an unchanged part of at least 1 MiB a second name (a hard link)
            instead of writing it again, up to `MAX_SHARED` times. Where the file system cannot, it
            is written.
          on_failure: told of an asynchronous save that failed, in the next call of `save`, `poll`
            or `wait`; warns when left out.

        Raises:
          CheckpointError: another writer has the folder, or it holds something else.
          OSError: the folder cannot be made or written.
        """
        if key is not None and len(key) < 16:
            raise CheckpointError(f"key must have at least 16 bytes, got {len(key)}")
        self.path = Path(path)
        self.keep = _retention.latest(3) if keep is None else keep
        self._key = key
        self._share = share_unchanged
        self._on_failure = on_failure
        self._run, self._lock = open_folder(self.path)
        self._pool: list[np.ndarray] = []
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copiers = ThreadPoolExecutor(2, thread_name_prefix="checkpoint-copy")
        self._is_closed = False
        self._overhead = OVERHEAD_BYTES
        self._corrupt: set[int] = set()
        self._doubtful: dict[int, str] = {}
        self._notices: list[str] = []
        self._noticed: set[int] = set()
        self._last_good: int | None = None
        self._written: int | None = None
        self._found: int | None = None
        self.num_saved = 0
        self.num_failed = 0

    @property
    def last_acknowledged(self) -> int | None:
        """The newest step written by this writer, or found sound by `restore`."""
        return self._written if self._written is not None else self._last_good

    def restore(self, step: int | None = None, **options: Any) -> Restored:
        """`checkpoint.restore` from this writer's folder, with its key, after the save under way.

        What is found sound stays from now on. What is proven corrupt makes way for later steps;
        what cannot be judged stays, and is set aside where a step of its number is written.
        """
        self._settle()
        restored = restore(self.path, step, key=self._key, **options)
        for damage in restored.passed_over:
            self._note(damage)
        if self._written is None:
            self._last_good = max(restored.step, self._last_good or 0)
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
          record: JSON that the host wants back.
          metrics: finite numbers for `best`; others are left out.
          parts: paths inside `value`; what lies below one is stored, and shared with other steps,
            on its own.

        Raises:
          CheckpointError: the writer is closed, the step exists already and is sound, or the value
            cannot be stored, which `check` says beforehand. What goes wrong later goes to
            `on_failure`.
        """
        if self._is_closed:
            raise CheckpointError(f"{self.path}: this writer is closed")
        step = _folder.checked_step(step)
        self._settle()
        structure, leaves, arrays = describe(value)
        noted = None if record is None else record_bytes(record)
        numbers = numbers_of(metrics or {})
        try:
            is_sound = self._is_sound(step)
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
        self._pending = self._thread.submit(
            self._write, step, structure, tuple(leaves), copies, noted, numbers, tuple(parts)
        )

    def poll(self) -> bool:
        """Whether nothing is under way; tells `on_failure` of a save that failed."""
        if self._pending is not None and self._pending.done():
            self._settle()
        return self._pending is None

    def wait(self) -> bool:
        """Waits until the last save is acknowledged; False where it failed."""
        return self._settle()

    def close(self) -> None:
        """Waits, and lets the folder go."""
        if self._is_closed:
            return
        try:
            self._settle()
        finally:
            self._is_closed = True
            self._thread.shutdown()
            self._copiers.shutdown()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- parts ---------------------------------------------------------------------------------

    def _settle(self) -> bool:
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        error = pending.exception()
        if error is not None:
            self._fail(error)
            return False
        self.num_saved += 1
        notices, self._notices = self._notices, []
        for notice in notices:
            warnings.warn(f"{self.path}: {notice}", CheckpointWarning, stacklevel=3)
        return True

    def _fail(self, error: BaseException) -> None:
        self.num_failed += 1
        self._on_failure(error)

    def _note(self, damage: _verify.Damage) -> None:
        if damage.verdict == "corrupt":
            self._corrupt.add(damage.step)
        else:
            self._doubtful[damage.step] = f"{damage.file}: {damage.problem}"

    def _is_sound(self, step: int) -> bool:
        """Whether the step exists and is what was saved; what it is else is noted."""
        if step not in _folder.steps(self.path):
            return False
        if step not in self._corrupt and step not in self._doubtful:
            damage = _verify.judge(self.path, step, key=self._key)
            if damage is None:
                return True
            self._note(damage)
        return False

    def _write(
        self,
        step: int,
        structure: Any,
        leaves: tuple[Leaf, ...],
        copies: list[Any],
        noted: bytes | None,
        metrics: Mapping[str, float],
        prefixes: tuple[str, ...],
    ) -> None:
        leaf_digests = _arrays.digests(leaves, copies)
        planned = _arrays.plan(leaves, copies, leaf_digests, prefixes)
        self._make_room(step, self._incoming(planned, noted))
        work = self.path / WORK / f"save-{step_name(step)}-{secrets.token_hex(4)}"
        try:
            work.mkdir(parents=True)
            known: dict[str, str] = {}
            for one in planned:
                target = work / one.part.folder
                if target.exists():
                    continue
                shared = self._shared(one, target)
                known |= shared
                if not shared:
                    target.parent.mkdir(exist_ok=True)
                    _orbax.write(target, one.arrays)
            if noted is not None:
                (work / _manifest.RECORD).write_bytes(noted)
            _files.sync_tree(work)
            sizes = _files.sizes(work)
            manifest = Manifest(
                run=self._run,
                step=step,
                structure=structure,
                leaves=leaves,
                digests=tuple(leaf_digests),
                parts=tuple(one.part for one in planned),
                files={
                    name: FileInfo(
                        num_bytes=size, sha256=known.get(name) or _files.sha256(work / name)
                    )
                    for name, size in sorted(sizes.items())
                },
                metrics=metrics,
                versions={name: version(name) for name in _PACKAGES},
            )
            data = _manifest.encode(manifest, self._key)
            _files.write_synced(work / _manifest.NAME, data)
            self._commit(step, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        new = sum(one.num_bytes for one in planned)
        self._overhead = max(OVERHEAD_BYTES, 2 * (sum(sizes.values()) + len(data) - new))
        try:
            self._collect(0)
        except OSError as error:  # the step itself is on the disk
            self._notices.append(f"step {step} was saved, an older one was not removed: {error}")

    def _make_room(self, step: int, incoming: int) -> None:
        """Removes what the retention does not keep beside a step known to be sound.

        Corrupt steps wait for the new one, unless a byte budget needs their room.
        """
        if self.last_acknowledged is not None:
            self._collect(incoming + ROOT_BYTES, spared=frozenset(self._corrupt))
        limit = self.keep.max_bytes
        if limit is None:
            return
        if _files.num_disk_bytes(self.path) + incoming > limit:
            if self.last_acknowledged is None:
                self._find_sound()
            self._collect(incoming + ROOT_BYTES)
        rest = _files.num_disk_bytes(self.path)
        if rest + incoming > limit:
            raise CheckpointError(
                f"step {step} needs about {incoming} bytes beside {rest} that must stay, but "
                f"the budget of {self.keep.name} is {limit}; it must have room for two steps"
            )

    def _find_sound(self) -> None:
        """Verifies what an earlier process wrote, until a step is known that may not go."""
        for step in reversed(_folder.steps(self.path)):
            if self._is_sound(step):
                self._found = step
                return

    def _incoming(self, planned: list[_arrays.Planned], noted: bytes | None) -> int:
        new = {
            one.content: one.num_bytes for one in planned if self._source(one.part.folder) is None
        }
        return sum(new.values()) + self._overhead + len(noted or b"")

    def _source(self, folder: str) -> Path | None:
        """A folder of the same content in a sound step, if it may get another name."""
        if not self._share:
            return None
        for step in reversed(_folder.steps(self.path)):
            candidate = self.path / STEPS / step_name(step) / folder
            if step in self._corrupt or step in self._doubtful:
                continue
            try:
                links = [status.st_nlink for status in _files.statuses(candidate).values()]
            except (OSError, CheckpointError):  # not there, or not to be read just now
                continue
            return candidate if max(links, default=MAX_SHARED) < MAX_SHARED else None
        return None

    def _shared(self, one: _arrays.Planned, target: Path) -> dict[str, str]:
        """Digests of the files that got another name in this step; empty where none did."""
        if one.num_bytes < _arrays.PART_BYTES:
            return {}
        source = self._source(one.part.folder)
        if source is None:
            return {}
        digests = self._intact(source)
        return digests if digests and _files.share(source, target) else {}

    def _intact(self, source: Path) -> dict[str, str]:
        """Digests of a part's files if they are what their step's manifest says, else nothing.

        So damage is not handed on.
        """
        base = source.parents[1]
        try:
            told = _folder.inspect(self.path, int(base.name), key=self._key).files
            names = [
                f"{source.relative_to(base).as_posix()}/{inner}" for inner in _files.sizes(source)
            ]
            is_intact = all(told[name].sha256 == _files.sha256(base / name) for name in names)
            return {name: told[name].sha256 for name in names} if is_intact else {}
        except (CheckpointError, OSError, KeyError):
            return {}

    def _commit(self, step: int, work: Path) -> None:
        target = self.path / STEPS / step_name(step)
        is_corrupt = self._is_still_corrupt(step)
        # A step of the same number that is not sound, or anything else of that name.
        aside = set_aside(self.path, step) if os.path.lexists(target) else None
        try:
            os.rename(work, target)
        except BaseException:
            if aside is not None:
                os.rename(aside, target)
            raise
        _files.sync(target.parent)
        self._last_good, self._written = self.last_acknowledged, step
        self._corrupt.discard(step)
        doubt = self._doubtful.pop(step, "it was no sound step")
        if aside is None:
            return
        if is_corrupt:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            self._notices.append(f"what lay at step {step} is in {aside} now, unjudged: {doubt}")

    def _collect(self, incoming: int, spared: frozenset[int] = frozenset()) -> None:
        decisions = self.plan(incoming_bytes=incoming)
        for step in [one.step for one in decisions if not one.is_kept and one.step not in spared]:
            if step not in self._corrupt or self._is_still_corrupt(step):
                drop(self.path, step)
            self._corrupt.discard(step)

    def _is_still_corrupt(self, step: int) -> bool:
        """Looks again before a step goes for what was found in it: it may have been mended."""
        if step not in self._corrupt:
            return False
        damage = _verify.judge(self.path, step, key=self._key)
        return damage is not None and damage.verdict == "corrupt"

    def plan(self, *, incoming_bytes: int = 0) -> list[_retention.Decision]:
        """What the retention would do now."""
        protected = {}
        if self._found is not None and incoming_bytes > 0:
            protected[self._found] = "the newest sound step"
        if self._last_good is not None and incoming_bytes == 0:
            protected[self._last_good] = "the last good step before the one just written"
        if self.last_acknowledged is not None:
            protected[self.last_acknowledged] = "the step just written"
        history = _verify.history(
            self.path, key=self._key, unsound=frozenset(self._corrupt), doubtful=self._doubtful
        )
        self._notice(history)
        return _retention.decide(
            self.keep, history, protected=protected, incoming_bytes=incoming_bytes
        )

    def _notice(self, history: Sequence[_retention.Step]) -> None:
        new = [one for one in history if one.doubt and one.step not in self._noticed]
        self._noticed |= {one.step for one in new}
        if new:
            numbers = ", ".join(str(one.step) for one in new)
            self._notices.append(
                f"steps that cannot be judged stay ({numbers}; step {new[-1].step}: "
                f"{new[-1].doubt}); remove them by hand if they are of no use"
            )


_PACKAGES = ("esper-fn", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
