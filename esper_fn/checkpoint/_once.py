"""Saving one step, and pruning a folder: the writer's work without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esper_fn.checkpoint import _folder, _retention, _verify
from esper_fn.checkpoint._folder import PathLike, drop
from esper_fn.checkpoint._locking import take_lock
from esper_fn.checkpoint._writer import Writer


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

    def fail(error: BaseException) -> None:
        raise error

    with Writer(path, keep=_retention.everything(), key=key, on_failure=fail) as writer:
        writer.save(step, value, record=record)


def prune(
    path: PathLike,
    keep: _retention.Retention,
    *,
    dry_run: bool = False,
    key: bytes | None = None,
) -> list[_retention.Decision]:
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
    lock = None if dry_run else take_lock(root)
    try:
        unsound, doubtful, protected = set(), {}, {}
        for step in reversed(_folder.steps(root)):
            damage = _verify.judge(root, step, key=key)
            if damage is None:
                protected[step] = "the newest sound step"
                break
            if damage.verdict == "corrupt":
                unsound.add(step)
            else:
                doubtful[step] = f"{damage.file}: {damage.problem}"
        history = _verify.history(root, key=key, unsound=frozenset(unsound), doubtful=doubtful)
        decisions = _retention.decide(keep, history, protected=protected)
        for decision in decisions:
            if not (decision.is_kept or dry_run):
                drop(root, decision.step)
        return decisions
    finally:
        if lock is not None:
            lock.close()
