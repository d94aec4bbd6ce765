"""What `fit` saves between segments, and how it goes on from it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import checkpoint
from esper_fn._growth import Growth
from esper_fn.errors import ResumeError
from esper_fn.runtime._plain import decoded, encoded, is_alike
from esper_fn.runtime._ring import example, live_form, saved_form, saved_parts
from esper_fn.runtime._step import TrainState


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """Saving and resuming, for `fit` and `fit_host`.

    Attributes:
      writer: where to; `fit` neither opens nor closes it.
      every_steps: a step is saved at the end of the first segment that reaches a multiple of it,
        and at the end of the run.
      resume: go on from the newest sound step of the writer's folder, if it has one. With False, a
        folder that holds steps is refused.
      note: gives JSON that is saved along, whatever the caller needs to go on. Also called before
        the first step, to say then what cannot be saved. Infinities, NaN, NumPy numbers and arrays
        (as numbers and lists) and keys that are numbers come back too; tuples are lists then.
      recall: told the note of the step the run goes on from, before its first segment.
      settings: anything else that must be the same when the run goes on, under names of its own;
        of the same kinds as a note.
    """

    writer: checkpoint.Writer
    every_steps: int = 100
    resume: bool = True
    note: Callable[[], Any] | None = None
    recall: Callable[[Any], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            every = -1 if isinstance(self.every_steps, bool) else operator.index(self.every_steps)
        except TypeError:
            every = -1
        if every < 1:
            raise ValueError(f"every_steps must be an int, at least 1, got {self.every_steps!r}")
        object.__setattr__(self, "every_steps", every)


class Progress(NamedTuple):
    """Where a run stands."""

    step: int
    state: Any
    losses: np.ndarray
    record: dict[str, Any]
    """JSON: totals and events."""


def save(to: Checkpoints, progress: Progress, settings: Mapping[str, Any], loss: float) -> None:
    """Saves asynchronously."""
    state = progress.state
    to.writer.save(
        progress.step,
        _value(progress),
        record={
            "settings": encoded({**to.settings, **settings}, "settings"),
            "record": encoded(progress.record, "record"),
            "note": None if to.note is None else encoded(to.note(), "note"),
        },
        metrics={"loss": loss},
        parts=saved_parts(state) if isinstance(state, TrainState) else (),
    )


def _value(progress: Progress) -> dict[str, Any]:
    state = progress.state
    form = saved_form(state) if isinstance(state, TrainState) else state
    return {"state": form, "losses": progress.losses}


def _check(to: Checkpoints, fresh: Any, settings: Mapping[str, Any]) -> None:
    """Says before the first step what could not be saved."""
    record = {"settings": encoded({**to.settings, **settings}, "settings")}
    if to.note is not None:
        try:
            note = to.note()
        except Exception:  # it may need a segment first, and is called again then
            note = None
        record["note"] = encoded(note, "note")
    checkpoint.check(_value(Progress(0, fresh, np.zeros(0), {})), record=record)


def is_due(to: Checkpoints, first: int, last: int) -> bool:
    """Whether a multiple of `every_steps` lies in `(first, last]`."""
    return last // to.every_steps > first // to.every_steps


def load(
    to: Checkpoints, fresh: Any, settings: Mapping[str, Any], num_steps: int
) -> Progress | None:
    """The newest sound step, or None where there is none.

    Args:
      to: where to look.
      fresh: the state a new run would begin with: structure, shapes and shardings must be its own.
      settings: of this run.
      num_steps: of this run.

    Raises:
      NoCheckpointError: there are steps, but none is sound.
      CheckpointError: the state, a setting or the note cannot be saved.
      ResumeError: saved with other settings, or longer than this run.

    Warns with a `CheckpointWarning` that names newer steps that are damaged.
    """
    path = to.writer.path
    to.writer.wait()  # a save of an earlier run may still be under way
    there = checkpoint.steps(path)
    if not there:
        _check(to, fresh, settings)
        return None
    if not to.resume:
        raise ResumeError(
            f"{path}: it holds steps {there} of an earlier run; go on from them (resume=True), or "
            "use another folder"
        )
    is_grown = isinstance(fresh, TrainState)
    restored = to.writer.restore(like={"state": example(fresh) if is_grown else fresh, "losses": 0})
    step, record = restored.step, restored.record
    if restored.passed_over:
        told = "; ".join(map(str, restored.passed_over))
        warnings.warn(
            f"{path}: going on from step {step}, since newer ones are damaged: {told}",
            checkpoint.CheckpointWarning,
            stacklevel=2,
        )
    if not isinstance(record, dict) or record.keys() != {"settings", "record", "note"}:
        raise ResumeError(f"{path}: step {step} was not saved by `fit`; use another folder")
    saved = decoded(record["settings"])
    present = decoded(encoded({**to.settings, **settings}, "settings"))
    _check_settings(path, saved, present)
    if step > num_steps:
        raise ResumeError(
            f"{path}: step {step} lies beyond num_steps={num_steps}; ask for more, or prune it"
        )
    state, losses = restored.value["state"], restored.value["losses"]
    if len(losses) != step:
        raise ResumeError(f"{path}: step {step} holds {len(losses)} losses")
    if is_grown and isinstance(state, TrainState):
        state = live_form(state)
    check_alike(fresh, state, str(path))
    if to.recall is not None:
        to.recall(decoded(record["note"]))
    return Progress(
        step=step,
        state=jax.tree.map(_placed, fresh, state),
        losses=losses,
        record=decoded(record["record"]),
    )


def _check_settings(path: object, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    # Older versions saved keys that are numbers as strings.
    saved, present = ({str(n): v for n, v in of.items()} for of in (saved, present))
    for name in sorted(saved.keys() | present.keys()):
        if not is_alike(saved.get(name), present.get(name)):
            raise ResumeError(
                f"{path}: {name} is {present.get(name)!r} now and was {saved.get(name)!r} when the "
                "step was saved, so the run would not be the one that was stopped; set it back, or "
                "begin a new run in another folder (`runtime.carry_over` moves a state to a "
                "larger layout)"
            )


def check_alike(fresh: Any, state: Any, where: str) -> None:
    """Raises `ResumeError`, naming the path, where structure, shape or dtype differ."""
    of_fresh = dict(_leaves(fresh))
    of_state = dict(_leaves(state))
    for name in [*of_fresh, *(name for name in of_state if name not in of_fresh)]:
        if name not in of_fresh or name not in of_state:
            side = "now" if name in of_fresh else "in the checkpoint"
            raise ResumeError(
                f"{where}: {name} exists only {side}; host, optimizer, policy or alpha schedules "
                "are not the ones of the run that was stopped"
            )
        if of_fresh[name] != of_state[name]:
            raise ResumeError(
                f"{where}: {name} is {of_fresh[name]} now and {of_state[name]} in the checkpoint"
            )
    structures = [str(jax.tree.structure(tree)) for tree in (fresh, state)]
    if structures[0] != structures[1]:
        raise ResumeError(f"{where}: the state has another structure now than in the checkpoint")


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


def describe(growth: Growth) -> dict[str, Any]:
    """What of a growth is no state and must be the same when a run goes on."""
    return {
        "sites": [
            [
                place.name, place.features, place.chunks, place.topology,
                place.source_features, place.layers, place.positions,
            ]
            for place in growth.layout.sites
        ],
        "blueprints": list(growth.layout.names),
        "capacity": growth.layout.capacity,
        "dtype": str(jnp.dtype(growth.layout.dtype)),
        "policy_rules": list(growth.policy.rules),
        "grafts": [graft.name for graft in growth.grafts],
        "adapters_at_once": growth.adapters_at_once,
        "implementation": growth.implementation,
        "max_ablations": growth.max_ablations,
        "directed_births": growth.directed_births,
    }  # fmt: skip
