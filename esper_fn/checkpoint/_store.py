"""Puts steps into a folder, each whole or not at all, and collects those that may go."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esper_fn.checkpoint import _arrays, _files, _folder, _manifest, _orbax, _retention, _verify
from esper_fn.checkpoint._folder import WORK, drop, open_folder, set_aside, step_folder
from esper_fn.checkpoint._manifest import FileInfo, Manifest
from esper_fn.errors import CheckpointError

MAX_SHARED = 16
"""Steps that may share one copy of a part. A flaw of the disk in it costs all of them."""

OVERHEAD_BYTES = 512 * 2**10
"""What a step takes beside its arrays, before the first one has been measured."""

ROOT_BYTES = 4096
"""What a folder holds beside its steps, at most; a byte budget has to pay for it too."""

_PACKAGES = ("esper-fn", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


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

    def write(
        self, draft: Manifest, arrays: Sequence[Any], record: bytes | None, prefixes: Sequence[str]
    ) -> None:
        """Writes a step and renames it into place, then removes those that may go.

        Args:
          draft: step, structure, leaves and metrics.
          arrays: of the leaves, copied from the program that saves them; None for scalars.
          record: the caller's JSON.
          prefixes: paths whose leaves are stored on their own.

        Raises:
          CheckpointError: the byte budget has no room for it.
          OSError: or another error of the disk; nothing of the step stays then.
        """
        step, leaves = draft.step, _arrays.with_digests(draft.leaves, arrays)
        parts = _arrays.plan(leaves, arrays, prefixes)
        self._make_room(step, self._incoming_bytes(parts, record))
        work = self.path / WORK / f"save-{step:012d}-{secrets.token_hex(4)}"
        try:
            work.mkdir(parents=True)
            known = self._write_parts(work, parts)
            if record is not None:
                (work / _manifest.RECORD).write_bytes(record)
            _files.sync_tree(work)
            sizes = _files.sizes(work)
            files = {
                name: FileInfo(size, known.get(name) or _files.sha256(work / name))
                for name, size in sorted(sizes.items())
            }
            manifest = draft._replace(
                run=self._run,
                leaves=leaves,
                parts=tuple(planned.part for planned in parts),
                files=files,
                versions={name: version(name) for name in _PACKAGES},
            )
            data = _manifest.encode(manifest, self._key)
            _files.write_synced(work / _manifest.NAME, data)  # last of all
            self._commit(step, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        beside = sum(sizes.values()) + len(data) - sum(part.num_bytes for part in parts)
        self._overhead = max(OVERHEAD_BYTES, 2 * beside)
        try:
            self._collect(0)
        except OSError as error:  # the step itself is on the disk
            self.notices.append(f"step {step} was saved, an older one was not removed: {error}")

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
            doubt = "it was no sound step"
            if fault is not None and fault.verdict != "corrupt":
                doubt = f"{fault.file}: {fault.problem}"
            self.notices.append(f"what lay at step {step} is in {aside} now, unjudged: {doubt}")

    # --- sharing -------------------------------------------------------------------------------

    def _share(self, planned: _arrays.Planned, target: Path) -> dict[str, str]:
        """Digests of the files that got another name in this step; empty where none did.

        Files that are not what their own step's manifest says are not shared, so damage is not
        handed on.
        """
        folder = planned.part.folder
        source = self._source(folder) if planned.num_bytes >= _arrays.PART_BYTES else None
        if source is None:
            return {}
        step = source.parents[1]
        try:
            listed = _folder.inspect(self.path, int(step.name), key=self._key).files
            digests = {
                name: listed[name].sha256
                for name in (f"{folder}/{inner}" for inner in _files.sizes(source))
            }
            is_intact = all(_files.sha256(step / name) == sha for name, sha in digests.items())
        except (CheckpointError, OSError, KeyError):
            return {}
        return digests if is_intact and _files.share(source, target) else {}

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
