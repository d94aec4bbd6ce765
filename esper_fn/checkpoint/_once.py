"""Saving one step, and pruning a folder: the writer's work without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esper_fn.checkpoint import _folder, _retention, _verify
from esper_fn.checkpoint._folder import PathLike
from esper_fn.checkpoint._place import drop, take_lock
from esper_fn.checkpoint._writer import Writer


def save(
    path: PathLike, step: int, value: Any, *, record: Any = None, key: bytes | None = None
) -> None:
    """Saves one step and waits until it is on the disk; everything already there is kept.

    Raises:
      CheckpointError: as for `Writer.save`.
      OSError: or whatever went wrong beneath.

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
    """Removes the steps of a folder that a retention does not keep; never the newest sound one.

    Nor one that cannot be judged: signed with another key, of a newer format, unreadable just now.

    Args:
      path: a checkpoint folder that no writer has open (unless `dry_run`).
      keep: what stays.
      dry_run: decide only.
      key: for the HMAC.

    Returns:
      Every step's fate and why.
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
