"""Puts steps into a folder, each whole or not at all, and collects those that may go."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from esper_fn.checkpoint import _arrays, _files, _folder, _manifest, _orbax, _retention, _verify
from esper_fn.checkpoint._folder import WORK, drop, open_folder, set_aside, step_folder
from esper_fn.checkpoint._leaf import Leaf
from esper_fn.checkpoint._manifest import FileInfo, Manifest
from esper_fn.errors import CheckpointError

MAX_SHARED = 16
"""Steps that may share one copy of a part. A flaw of the disk in it costs all of them."""

OVERHEAD_BYTES = 512 * 2**10
"""What a step takes beside its arrays, before the first one has been measured."""

ROOT_BYTES = 4096
"""What a folder holds beside its steps, at most; a byte budget has to pay for it too."""

_PACKAGES = ("esper-fn", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


class Content(NamedTuple):
    """What a step consists of, copied from the program that saves it."""

    step: int
    structure: Any
    leaves: tuple[Leaf, ...]
    arrays: list[Any]
    record: bytes | None
    metrics: Mapping[str, float]
    prefixes: tuple[str, ...]
    """Paths whose leaves are stored on their own."""


class Store:
    """A folder and its lock, and what is known of its steps.

    Attributes:
      path: of the folder.
      keep: what stays.
      notices: what the caller should be warned of.
    """

    def __init__(
        self, path: Path, keep: _retention.Retention, key: bytes | None, share_unchanged: bool
    ) -> None:
        self.path, self.keep = path, keep
        self.notices: list[str] = []
        self._key, self._should_share = key, share_unchanged
        self._run, self._lock = open_folder(path)
        self._overhead = OVERHEAD_BYTES
        self._faults: dict[int, _verify.Damage] = {}
        self._noticed: set[int] = set()
        self._last_good: int | None = None
        self._written: int | None = None
        self._newest_sound: int | None = None

    def close(self) -> None:
        """Ends the lock."""
        self._lock.close()

    @property
    def last_acknowledged(self) -> int | None:
        """The newest step written here, or found sound when it was restored."""
        return self._written if self._written is not None else self._last_good

    def note_restored(self, step: int, damages: Sequence[_verify.Damage]) -> None:
        """Keeps a step that was restored from now on, and remembers the damage of newer ones."""
        self._faults |= {damage.step: damage for damage in damages}
        if self._written is None:
            self._last_good = max(step, self._last_good or 0)

    def is_sound(self, step: int) -> bool:
        """Whether the step exists and is what was saved; remembers what is wrong with it else."""
        if step not in _folder.steps(self.path):
            return False
        if step not in self._faults:
            damage = _verify.judge(self.path, step, key=self._key)
            if damage is None:
                return True
            self._faults[step] = damage
        return False

    @property
    def _corrupt(self) -> set[int]:
        return {step for step, fault in self._faults.items() if fault.verdict == "corrupt"}

    # --- writing -------------------------------------------------------------------------------

    def write(self, content: Content) -> None:
        """Writes a step and renames it into place, then removes those that may go.

        Args:
          content: of the step.

        Raises:
          CheckpointError: the byte budget has no room for it.
          OSError: or another error of the disk; nothing of the step stays then.
        """
        leaves = _arrays.with_digests(content.leaves, content.arrays)
        content = content._replace(leaves=leaves)
        parts = _arrays.plan(leaves, content.arrays, content.prefixes)
        self._make_room(content.step, self._incoming_bytes(parts, content.record))
        work = self.path / WORK / f"save-{content.step:012d}-{secrets.token_hex(4)}"
        try:
            work.mkdir(parents=True)
            known = self._write_parts(work, parts)
            if content.record is not None:
                (work / _manifest.RECORD).write_bytes(content.record)
            _files.sync_tree(work)
            size = self._write_manifest(work, content, parts, known)
            self._commit(content.step, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        new = sum(part.num_bytes for part in parts)
        self._overhead = max(OVERHEAD_BYTES, 2 * (size - new))
        try:
            self._collect(0)
        except OSError as error:  # the step itself is on the disk
            self.notices.append(
                f"step {content.step} was saved, an older one was not removed: {error}"
            )

    def _write_parts(self, work: Path, parts: Sequence[_arrays.Planned]) -> dict[str, str]:
        """Writes or shares every part; returns the digests that are known already."""
        known: dict[str, str] = {}
        for planned in parts:
            target = work / planned.part.folder
            if target.exists():
                continue
            shared = self._share(planned, target)
            known |= shared
            if not shared:
                target.parent.mkdir(exist_ok=True)
                _orbax.write(target, planned.arrays)
        return known

    def _write_manifest(
        self,
        work: Path,
        content: Content,
        parts: Sequence[_arrays.Planned],
        known: Mapping[str, str],
    ) -> int:
        """Writes the manifest, last of all; returns the bytes of the whole step."""
        sizes = _files.sizes(work)
        manifest = Manifest(
            run=self._run,
            step=content.step,
            structure=content.structure,
            leaves=content.leaves,
            parts=tuple(planned.part for planned in parts),
            files={
                name: FileInfo(num_bytes=size, sha256=known.get(name) or _files.sha256(work / name))
                for name, size in sorted(sizes.items())
            },
            metrics=content.metrics,
            versions={name: version(name) for name in _PACKAGES},
        )
        data = _manifest.encode(manifest, self._key)
        _files.write_synced(work / _manifest.NAME, data)
        return sum(sizes.values()) + len(data)

    def _commit(self, step: int, work: Path) -> None:
        target = step_folder(self.path, step)
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
        fault = self._faults.pop(step, None)
        if aside is not None and is_corrupt:
            shutil.rmtree(aside, ignore_errors=True)
        elif aside is not None:
            doubt = f"{fault.file}: {fault.problem}" if fault else "it was no sound step"
            self.notices.append(f"what lay at step {step} is in {aside} now, unjudged: {doubt}")

    # --- sharing -------------------------------------------------------------------------------

    def _share(self, planned: _arrays.Planned, target: Path) -> dict[str, str]:
        """Digests of the files that got another name in this step; empty where none did."""
        if planned.num_bytes < _arrays.PART_BYTES:
            return {}
        source = self._source(planned.part.folder)
        digests = {} if source is None else self._intact(source)
        return digests if source and digests and _files.share(source, target) else {}

    def _source(self, folder: str) -> Path | None:
        """A folder of the same content in a sound step, if it may get another name."""
        for step in self._newest_first() if self._should_share else ():
            candidate = step_folder(self.path, step) / folder
            if step in self._faults:
                continue
            try:
                links = [status.st_nlink for status in _files.statuses(candidate).values()]
            except (OSError, CheckpointError):  # not there, or not to be read just now
                continue
            return candidate if max(links, default=MAX_SHARED) < MAX_SHARED else None
        return None

    def _intact(self, source: Path) -> dict[str, str]:
        """Digests of a part's files if they are what their step's manifest says, else nothing.

        So damage is not handed on.
        """
        base = source.parents[1]
        try:
            files = _folder.inspect(self.path, int(base.name), key=self._key).files
            names = [
                f"{source.relative_to(base).as_posix()}/{inner}" for inner in _files.sizes(source)
            ]
            is_intact = all(files[name].sha256 == _files.sha256(base / name) for name in names)
            return {name: files[name].sha256 for name in names} if is_intact else {}
        except (CheckpointError, OSError, KeyError):
            return {}

    # --- room ----------------------------------------------------------------------------------

    def _decide(self, incoming_bytes: int) -> list[_retention.Decision]:
        """What the retention would do now, beside a step about to be written."""
        protected = {}
        if self._newest_sound is not None and incoming_bytes > 0:
            protected[self._newest_sound] = "the newest sound step"
        if self._last_good is not None and incoming_bytes == 0:
            protected[self._last_good] = "the last good step before the one just written"
        if self.last_acknowledged is not None:
            protected[self.last_acknowledged] = "the step just written"
        history = _verify.history(self.path, key=self._key, faults=self._faults)
        self._notice(history)
        return _retention.decide(
            self.keep, history, protected=protected, incoming_bytes=incoming_bytes
        )

    def _incoming_bytes(self, parts: Sequence[_arrays.Planned], record: bytes | None) -> int:
        new = {planned.part.folder: planned.num_bytes for planned in parts}
        size = sum(size for folder, size in new.items() if self._source(folder) is None)
        return size + self._overhead + len(record or b"")

    def _make_room(self, step: int, incoming: int) -> None:
        """Removes what the retention does not keep beside a step known to be sound.

        Corrupt steps wait for the new one, unless a byte budget needs their room.
        """
        if self.last_acknowledged is not None:
            self._collect(incoming + ROOT_BYTES, spared=self._corrupt)
        limit = self.keep.max_bytes
        if limit is None:
            return
        if _files.num_disk_bytes(self.path) + incoming > limit:
            if self.last_acknowledged is None:
                # Steps of an earlier process: one must be known that may not go.
                self._newest_sound = next(filter(self.is_sound, self._newest_first()), None)
            self._collect(incoming + ROOT_BYTES)
        rest = _files.num_disk_bytes(self.path)
        if rest + incoming > limit:
            raise CheckpointError(
                f"step {step} needs about {incoming} bytes beside {rest} that must stay, but "
                f"the budget of {self.keep.name} is {limit}; it must have room for two steps"
            )

    def _newest_first(self) -> Sequence[int]:
        return _folder.steps(self.path)[::-1]

    def _collect(self, incoming: int, spared: Set[int] = frozenset()) -> None:
        for step, is_kept, _ in self._decide(incoming):
            if is_kept or step in spared:
                continue
            if step not in self._corrupt or self._is_still_corrupt(step):
                drop(self.path, step)
            self._faults.pop(step, None)

    def _is_still_corrupt(self, step: int) -> bool:
        """Judges a corrupt step again before it goes: it may have been mended."""
        if step not in self._corrupt:
            return False
        damage = _verify.judge(self.path, step, key=self._key)
        return damage is not None and damage.verdict == "corrupt"

    def _notice(self, history: Sequence[_retention.Step]) -> None:
        new = [row for row in history if row.doubt and row.step not in self._noticed]
        self._noticed |= {row.step for row in new}
        if new:
            numbers = ", ".join(str(row.step) for row in new)
            self.notices.append(
                f"steps that cannot be judged stay ({numbers}; step {new[-1].step}: "
                f"{new[-1].doubt}); remove them by hand if they are of no use"
            )
