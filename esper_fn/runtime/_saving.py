"""What `fit` saves between segments, and how it goes on from it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import checkpoint
from esper_fn._growth import Growth
from esper_fn.errors import ResumeError
from esper_fn.runtime._packing import example, pack, parts_of, unpack
from esper_fn.runtime._plain import decoded, encoded, is_alike


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """Saving and resuming, for `fit` and `fit_host`.

    Attributes:
      writer: where to; `fit` neither opens nor closes it.
      every_steps: a step is saved at the end of the first segment that reaches a multiple of it,
        and at the end of the run.
      resume: go on from the newest sound step of the writer's folder, if it has one. With False, a
        folder that has steps is refused.
      note: gives JSON that is saved along, whatever the caller needs to go on. Also called before
        the first step, to find out then what cannot be saved. Infinities, NaN, NumPy numbers and
        arrays (as numbers and lists) and keys that are numbers come back too; tuples as lists.
      recall: gets the note of the step the run goes on from, before its first segment.
      settings: anything else that must be the same when the run goes on, under names of its own;
        of the same kinds as a note.

    Raises:
      ValueError: `every_steps` is no int of at least 1.
    """

    writer: checkpoint.Writer
    every_steps: int = 100
    resume: bool = True
    note: Callable[[], Any] | None = None
    recall: Callable[[Any], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = -1
        with suppress(TypeError):
            every = -1 if isinstance(self.every_steps, bool) else operator.index(self.every_steps)
        if every < 1:
            raise ValueError(f"every_steps must be an int, at least 1, got {self.every_steps!r}")
        object.__setattr__(self, "every_steps", every)

    def is_due(self, first: int, last: int) -> bool:
        """Whether a multiple of `every_steps` lies in `(first, last]`."""
        return last // self.every_steps > first // self.every_steps


class Progress(NamedTuple):
    """Where a run stands."""

    step: int
    state: Any
    losses: np.ndarray
    record: dict[str, Any]
    """JSON: totals and events."""


def save(
    checkpoints: Checkpoints, progress: Progress, settings: Mapping[str, Any], loss: float
) -> None:
    """Saves asynchronously.

    Args:
      checkpoints: where to.
      progress: what to save.
      settings: of the run, which must be the same when it goes on.
      loss: a metric for `checkpoint.best`.
    """
    note = None if checkpoints.note is None else checkpoints.note()
    checkpoints.writer.save(
        progress.step,
        _value(progress.state, progress.losses),
        record={
            **_encoded(checkpoints, settings, note),
            "record": encoded(progress.record, "record"),
        },
        metrics={"loss": loss},
        parts=parts_of(progress.state),
    )


def _value(state: Any, losses: np.ndarray) -> dict[str, Any]:
    return {"state": pack(state), "losses": losses}


def _encoded(checkpoints: Checkpoints, settings: Mapping[str, Any], note: Any) -> dict[str, Any]:
    all_settings = {**checkpoints.settings, **settings}
    return {"settings": encoded(all_settings, "settings"), "note": encoded(note, "note")}


def _check_can_save(checkpoints: Checkpoints, fresh: Any, settings: Mapping[str, Any]) -> None:
    """Raises before the first step for what could not be saved."""
    note = None
    if checkpoints.note is not None:
        with suppress(Exception):  # it may need a segment first, and is called again then
            note = checkpoints.note()
    record = _encoded(checkpoints, settings, note)
    checkpoint.check(_value(fresh, np.zeros(0)), record=record)


def load(
    checkpoints: Checkpoints, fresh: Any, settings: Mapping[str, Any], num_steps: int
) -> Progress | None:
    """The newest sound step, or None where there is none.

    Warns with a `CheckpointWarning` that names newer steps that are damaged.

    Args:
      checkpoints: where to look.
      fresh: the state a new run would begin with: structure, shapes and shardings must be its own.
      settings: of this run.
      num_steps: of this run.

    Raises:
      NoCheckpointError: there are steps, but none is sound.
      CheckpointError: the state, a setting or the note cannot be saved.
      ResumeError: saved with other settings, or longer than this run.
    """
    path = checkpoints.writer.path
    checkpoints.writer.wait()  # a save of an earlier run may still be under way
    steps = checkpoint.steps(path)
    if not steps:
        _check_can_save(checkpoints, fresh, settings)
        return None
    if not checkpoints.resume:
        raise ResumeError(
            f"{path}: it holds steps {steps} of an earlier run; go on from them (resume=True), or "
            "use another folder"
        )
    restored = checkpoints.writer.restore(like={"state": example(fresh), "losses": 0})
    if restored.passed_over:
        damages = "; ".join(map(str, restored.passed_over))
        warnings.warn(
            f"{path}: going on from step {restored.step}, since newer ones are damaged: {damages}",
            checkpoint.CheckpointWarning,
            stacklevel=2,
        )
    present = _encoded(checkpoints, settings, None)["settings"]
    record = _checked_record(path, restored, decoded(present), num_steps)
    state, losses = unpack(restored.value["state"]), restored.value["losses"]
    if len(losses) != restored.step:
        raise ResumeError(f"{path}: step {restored.step} holds {len(losses)} losses")
    _check_alike(fresh, state, str(path))
    if checkpoints.recall is not None:
        checkpoints.recall(decoded(record["note"]))
    return Progress(
        step=restored.step,
        state=jax.tree.map(_placed, fresh, state),
        losses=losses,
        record=decoded(record["record"]),
    )


def _checked_record(
    path: object, restored: checkpoint.Restored, present: dict[str, Any], num_steps: int
) -> dict[str, Any]:
    """The record of a step that `fit` saved with the same settings."""
    step, record = restored.step, restored.record
    if not isinstance(record, dict) or record.keys() != {"settings", "record", "note"}:
        raise ResumeError(f"{path}: step {step} was not saved by `fit`; use another folder")
    saved = decoded(record["settings"])
    for name in dict.fromkeys([*present, *saved]):
        if not is_alike(saved.get(name), present.get(name)):
            raise ResumeError(
                f"{path}: {name} is {present.get(name)!r} now and was {saved.get(name)!r} when the "
                "step was saved, so the run would not be the one that was stopped; set it back, or "
                "begin a new run in another folder (`runtime.enlarge` moves a state to a larger "
                "layout)"
            )
    if step > num_steps:
        raise ResumeError(
            f"{path}: step {step} lies beyond num_steps={num_steps}; ask for more, or prune it"
        )
    return record


def _check_alike(fresh: Any, state: Any, path: str) -> None:
    """Raises `ResumeError`, naming the leaf, where structure, shape or dtype differ."""
    now, saved = dict(_leaves(fresh)), dict(_leaves(state))
    for name in now | saved:
        if name not in now or name not in saved:
            side = "now" if name in now else "in the checkpoint"
            raise ResumeError(
                f"{path}: {name} exists only {side}; host, optimizer, policy or alpha schedules "
                "are not the ones of the run that was stopped"
            )
        if now[name] != saved[name]:
            raise ResumeError(
                f"{path}: {name} is {now[name]} now and {saved[name]} in the checkpoint"
            )
    if str(jax.tree.structure(fresh)) != str(jax.tree.structure(state)):
        raise ResumeError(f"{path}: the state has another structure now than in the checkpoint")


def _leaves(tree: Any) -> list[tuple[str, str]]:
    return [
        (jax.tree_util.keystr(path), f"{jnp.result_type(leaf)}{list(np.shape(leaf))}")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _placed(fresh: Any, leaf: Any) -> Any:
    """The leaf where the fresh one lies, in a buffer of its own, which a step may donate."""
    if len(fresh.sharding.device_set) > 1:
        return jax.device_put(leaf, fresh.sharding)
    return jnp.array(leaf, copy=True)


def settings_of(growth: Growth) -> dict[str, Any]:
    """What of a growth is no state and must be the same when a run goes on."""
    layout = growth.layout
    fields = ("name", "features", "chunks", "topology", "source_features", "layers", "positions")
    return {
        "sites": [[getattr(site, field) for field in fields] for site in layout.sites],
        "blueprints": list(layout.names),
        "capacity": layout.capacity,
        "dtype": str(jnp.dtype(layout.dtype)),
        "policy_rules": list(growth.policy.rules),
        "grafts": [graft.name for graft in growth.grafts],
        "adapters_at_once": growth.adapters_at_once,
        "implementation": growth.implementation,
        "max_ablations": growth.max_ablations,
        "directed_births": growth.directed_births,
    }
