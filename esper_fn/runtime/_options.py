"""The numbers of a run, and who acts on it between its segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper_fn import rollback
from esper_fn._arguments import is_count
from esper_fn.commands import Command
from esper_fn.runtime._records import Listener, Segment
from esper_fn.runtime._saving import Checkpoints

if TYPE_CHECKING:
    from esper_fn.runtime._steering import Steering


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """The numbers of a `fit`.

    Attributes:
      survey_every: steps between surveys; None for none. Where segments begin and end with one
        (their length a multiple of it) it stands between steps, else in each as a conditional.
      snapshot_every: steps between the snapshots of the roll-back; None for none.
      num_snapshots: how many are kept; 0 for none. Each takes the memory of parameters, optimiser
        state and adapters; see `rollback.init`.
      segment_steps: steps between reports, at most; the largest divisor of `num_steps` is taken.
      max_commands: commands applied in one segment, at most.
      max_rollbacks: the run ends with an error at the next one.

    Raises:
      ValueError: a number that is no int, or less than it may be.
    """

    survey_every: int | None = 25
    snapshot_every: int | None = 50
    num_snapshots: int = rollback.NUM_SNAPSHOTS
    segment_steps: int = 25
    max_commands: int = 4
    max_rollbacks: int = 5

    def __post_init__(self) -> None:
        least = {"num_snapshots": 0, "max_rollbacks": 0}
        for name in self.__slots__:
            value, bound = getattr(self, name), least.get(name, 1)
            if value is None and name in ("survey_every", "snapshot_every"):
                continue
            if not is_count(value, bound):
                raise ValueError(f"{name} must be an int, at least {bound}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Hooks:
    """Who acts on a run between its segments.

    Attributes:
      commands: gives the commands of the segment that begins with a step.
      listener: gets each segment.
      should_stop: whether to end; called after each segment.
      checkpoints: where to save.
      should_start: whether to begin at all; called once.
      should_save: whether to save now; called after each segment.
      answer: gets a segment's first step, and a function that brings its `Outcomes` to the host.
    """

    commands: Callable[[int], Sequence[Command]] | None = None
    listener: Listener | None = None
    should_stop: Callable[[], bool] | None = None
    checkpoints: Checkpoints | None = None
    should_start: Callable[[], bool] | None = None
    should_save: Callable[[], bool] | None = None
    answer: Callable[[int, Callable[[], Any]], None] | None = None


def steered(hooks: Hooks, steering: Steering) -> Hooks:
    """The hooks of a run that is also steered over a bus.

    Raises:
      ValueError: it has commands of its own.
    """
    if hooks.commands is not None:
        raise ValueError("commands must be None with steering, which brings its own")

    def listen(segment: Segment) -> None:
        steering.listener(segment)
        if hooks.listener is not None:
            hooks.listener(segment)

    return Hooks(
        commands=steering.commands,
        answer=steering.answer,
        listener=listen,
        should_start=steering.should_start,
        should_stop=steering.stop_condition(hooks.should_stop),
        should_save=steering.should_save,
        checkpoints=steering.with_position(hooks.checkpoints),
    )
