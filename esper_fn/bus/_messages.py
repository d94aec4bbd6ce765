"""Every message that crosses the bus, as frozen tagged structs.

A struct's tag is `kind/version`. Fields with a default may be added within a version: readers
ignore what they do not know. Anything else is a new version and a migration (`Schema`).
"""

from __future__ import annotations

import itertools
import os
from typing import Annotated, Any, ClassVar, get_args

import msgspec
import numpy as np
from msgspec import Meta

from esper_fn.bus._topics import Topic

Name = Annotated[str, Meta(max_length=200)]
Words = Annotated[str, Meta(max_length=2_000)]
Id = Annotated[str, Meta(min_length=1, max_length=80)]
Count = Annotated[int, Meta(ge=0, le=2**53)]

MAX_BATCH = 256
"""Commands in one all-or-nothing batch."""


def _new_origin() -> str:
    return f"{os.getpid():x}-{os.urandom(6).hex()}"


def _forked() -> None:
    global _ORIGIN  # noqa: PLW0603 -- a forked process must not repeat its parent's
    _ORIGIN = _new_origin()


_COUNTER = itertools.count()
_ORIGIN = _new_origin()
os.register_at_fork(after_in_child=_forked)


def new_id() -> str:
    """A name no other command has: process, chance and a counter; no clock, so none can repeat it.

    >>> new_id() != new_id()
    True
    """
    return f"{_ORIGIN}-{next(_COUNTER)}"


class Message(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True, gc=False
):
    """Root of all messages. None can lie in a cycle, so the garbage collector need not look."""

    topic: ClassVar[Topic]


class Command(Message, frozen=True, kw_only=True):
    """What is asked of a run. Delivered at least once, in force exactly once.

    Attributes:
      id: a command with the same id is answered with the first one's outcome.
      expires_after_seconds: refused, and never carried out, when it is older than that; its age
        is counted on the sender's clock until it is published, and then on the server's.
      sender: who asks, for people.
    """

    topic: ClassVar[Topic] = Topic.COMMANDS
    id: Id = msgspec.field(default_factory=new_id)
    expires_after_seconds: Annotated[float, Meta(gt=0, le=30 * 86_400)] | None = None
    sender: Name = ""


def verb(command: Command | type[Command]) -> str:
    """The verb of a command, as `esper_fn.commands` and the command line name it.

    >>> verb(Cull(seed=3))
    'cull'
    """
    kind = command if isinstance(command, type) else type(command)
    return str(kind.__struct_config__.tag).partition("/")[0]


class SeedCommand(Command, frozen=True, kw_only=True):
    """What is asked of one seed.

    Attributes:
      seed: its number within its site, or among all seeds where `site` is left out.
      site: name of the site.
    """

    seed: Count
    site: Name | None = None

    def arguments(self) -> dict[str, Any]:
        """The fields that say what to do to which seed, by name."""
        envelope = Command.__struct_fields__
        return {
            name: getattr(self, name) for name in self.__struct_fields__ if name not in envelope
        }


class Germinate(SeedCommand, frozen=True, kw_only=True, tag="germinate/1"):
    """Give a dormant seed an adapter."""

    blueprint: Name
    graft: Name | None = None


class Transition(SeedCommand, frozen=True, kw_only=True, tag="transition/1"):
    """Move a seed to a stage that may follow its own."""

    target: Name


class SetGraft(SeedCommand, frozen=True, kw_only=True, tag="set_graft/1"):
    """Change a seed's alpha schedule."""

    graft: Name


class Cull(SeedCommand, frozen=True, kw_only=True, tag="cull/1"):
    """Remove a seed's adapter."""


class Cancel(SeedCommand, frozen=True, kw_only=True, tag="cancel/1"):
    """Remove an adapter that does not act yet."""


class RollBack(SeedCommand, frozen=True, kw_only=True, tag="roll_back/1"):
    """Remove a seed's adapter and quarantine the seed."""


class Release(SeedCommand, frozen=True, kw_only=True, tag="release/1"):
    """End a quarantine or a fossil; the seed becomes dormant."""


class PauseSeed(SeedCommand, frozen=True, kw_only=True, tag="pause_seed/1"):
    """Freeze the stage and alpha of a seed; its adapter goes on training."""


class ResumeSeed(SeedCommand, frozen=True, kw_only=True, tag="resume_seed/1"):
    """End the pause of a seed."""


class Pause(Command, frozen=True, kw_only=True, tag="pause/1"):
    """Halt the run at its next step boundary, until `Resume`."""


class Resume(Command, frozen=True, kw_only=True, tag="resume/1"):
    """End the pause of the run."""


class Checkpoint(Command, frozen=True, kw_only=True, tag="checkpoint/1"):
    """Save the run at the next step boundary."""

    label: Name = ""


OneSeed = (
    Germinate | Transition | SetGraft | Cull | Cancel | RollBack | Release | PauseSeed | ResumeSeed
)


class Batch(Command, frozen=True, kw_only=True, tag="batch/1"):
    """Commands to different seeds that are applied in one step, or none of them is."""

    commands: Annotated[tuple[OneSeed, ...], Meta(min_length=1, max_length=MAX_BATCH)]


class Stop(Command, frozen=True, kw_only=True, tag="stop/1"):
    """End the run at its next step boundary, ahead of all other commands."""

    topic: ClassVar[Topic] = Topic.URGENT
    reason: Words = ""


class SeedOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one seed: codes and stages by name."""

    seed: int
    code: Name
    before: Name | None = None
    after: Name | None = None


class Outcome(Message, frozen=True, kw_only=True, tag="outcome/1"):
    """What became of a command; exactly one for each id.

    Attributes:
      command_id: of the command answered.
      code: DONE, or why not.
      words: the same for people, with the remedy where there is one.
      step: the training step it took force in, or was refused before.
      seeds: one row a seed asked for.
    """

    topic: ClassVar[Topic] = Topic.OUTCOMES
    command_id: Id
    code: Name
    words: Words = ""
    step: int = -1
    seeds: tuple[SeedOutcome, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether it took force."""
        return self.code == "DONE"


class Column(msgspec.Struct, frozen=True, array_like=True):
    """One array, little-endian, by its NumPy name of a dtype: `u1`, `i2`, `i4`, `f4` or `f8`."""

    dtype: Annotated[str, Meta(pattern="^(u1|i1|i2|i4|i8|f4|f8)$")]
    data: bytes

    @classmethod
    def of(cls, values: Any) -> Column:
        """The column of an array of one axis."""
        array = np.ascontiguousarray(values)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return cls(array.dtype.str[1:], array.tobytes())

    def array(self) -> np.ndarray[Any, Any]:
        """The values, read-only."""
        return np.frombuffer(self.data, np.dtype(f"<{self.dtype}"))


class Frame(Message, frozen=True, kw_only=True, tag="frame/1"):
    """The state of all seeds after a step, one column a quantity.

    Attributes:
      step: the training step it shows.
      columns: by name, all of the same length: a row a seed.
    """

    topic: ClassVar[Topic] = Topic.TELEMETRY
    step: int
    columns: dict[Name, Column]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """One column."""
        return self.columns[name].array()


class StepMetrics(Message, frozen=True, kw_only=True, tag="step_metrics/1"):
    """The scalars of one step, or of the last of several."""

    topic: ClassVar[Topic] = Topic.TELEMETRY
    step: int
    loss: float
    steps_per_second: float = 0.0
    num_live: int = 0
    num_parameters: int = 0
    num_rollbacks: int = 0
    num_dropped: int = 0
    """Telemetry messages the run has dropped so far."""
    stages: dict[Name, int] = {}
    values: dict[Name, float] = {}


class LifecycleEvent(Message, frozen=True, kw_only=True, tag="lifecycle_event/1"):
    """A seed changed its stage."""

    topic: ClassVar[Topic] = Topic.EVENTS
    step: int
    seed: int
    site: Name
    layer: int
    chunk: int
    source: Name
    target: Name
    cause: Words
    blueprint: Name | None = None
    measured: dict[Name, float | None] = {}


class Alert(Message, frozen=True, kw_only=True, tag="alert/1"):
    """Somebody should look."""

    topic: ClassVar[Topic] = Topic.EVENTS
    name: Name
    level: Annotated[str, Meta(pattern="^(info|warning|critical)$")]
    words: Words
    step: int = -1


class CheckpointEvent(Message, frozen=True, kw_only=True, tag="checkpoint_event/1"):
    """A checkpoint was saved, restored, or failed."""

    topic: ClassVar[Topic] = Topic.EVENTS
    step: int
    what: Annotated[str, Meta(pattern="^(saved|restored|failed)$")]
    words: Words = ""


class Announcement(Message, frozen=True, kw_only=True, tag="announcement/1"):
    """A run has taken its place on the bus: what it serves."""

    topic: ClassVar[Topic] = Topic.EVENTS
    run: Name
    host: Name
    pid: int
    sites: dict[Name, int]
    """Seeds of each site."""
    blueprints: tuple[Name, ...] = ()
    grafts: tuple[Name, ...] = ()
    version: Name = ""


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat/1"):
    """A run lives."""

    topic: ClassVar[Topic] = Topic.EVENTS
    run: Name
    step: int
    is_paused: bool = False


class DeadLetter(Message, frozen=True, kw_only=True, tag="dead_letter/1"):
    """A message that was set aside.

    Attributes:
      reason: one word: undecodable, unsupported, oversized, forged, replayed, expired, failing,
        gap.
      words: what was wrong, for people.
      from_topic: where it lay.
      entry_id: its name there.
      size_bytes: of its payload.
      deliveries: how often it was handed out.
      payload: its bytes; empty where it was too large to keep.
      signature: what it was signed with.
    """

    topic: ClassVar[Topic] = Topic.DEAD
    reason: Name
    words: Words
    from_topic: Topic
    entry_id: Name
    size_bytes: int
    deliveries: int = 1
    payload: bytes = b""
    signature: bytes = b""


AnyCommand = OneSeed | Batch | Pause | Resume | Checkpoint | Stop
COMMANDS: tuple[type[Command], ...] = get_args(AnyCommand)
"""All classes of commands; `esper_fn._verbs` describes them."""

AnyMessage = (
    AnyCommand
    | Outcome
    | Frame
    | StepMetrics
    | LifecycleEvent
    | Alert
    | CheckpointEvent
    | Announcement
    | Heartbeat
    | DeadLetter
)
