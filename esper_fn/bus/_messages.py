"""The messages of the bus, as frozen tagged structs, and the topics that carry them.

The tag of a struct is `kind/version`. A field with a default may be added within a version, as
readers ignore fields that they do not know. Every other change is a new version and a migration
(`Schema`).
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

import msgspec
import numpy as np
from msgspec import Meta

Name = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, Meta(max_length=2_000)]
Id = Annotated[str, Meta(min_length=1, max_length=80)]
Count = Annotated[int, Meta(ge=0, le=2**53)]


class Topic(StrEnum):
    """One stream of a run.

    URGENT and COMMANDS are delivered at least once and applied exactly once. OUTCOMES, EVENTS and
    DEAD are delivered at least once while the server keeps them. TELEMETRY is best effort.
    """

    URGENT = "urgent"
    COMMANDS = "commands"
    OUTCOMES = "outcomes"
    EVENTS = "events"
    TELEMETRY = "telemetry"
    DEAD = "dead"

    # An enumeration's own is a Python function, and topics are looked up for every message.
    __hash__ = str.__hash__


COMMAND_TOPICS = (Topic.URGENT, Topic.COMMANDS)
"""In the order in which they are served."""


class Limits(NamedTuple):
    """How much a topic may hold."""

    max_entries: int
    max_entry_bytes: int
    """Larger payloads are refused unread."""
    refuses: bool = False
    """A full topic refuses new entries; the others drop their oldest ones."""


LIMITS = {
    Topic.URGENT: Limits(1_000, 16 * 1024, refuses=True),
    Topic.COMMANDS: Limits(100_000, 64 * 1024, refuses=True),
    Topic.OUTCOMES: Limits(100_000, 64 * 1024),
    Topic.EVENTS: Limits(20_000, 64 * 1024),
    Topic.TELEMETRY: Limits(2_000, 1024 * 1024),
    Topic.DEAD: Limits(2_000, 128 * 1024),
}

MAX_BATCH = 256
"""Most commands in a batch."""


def new_id() -> str:
    """A unique id for a command, without a clock.

    >>> new_id() != new_id()
    True
    """
    return secrets.token_hex(12)


class Message(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True, gc=False
):
    """Base of all messages. No message can be part of a cycle, hence `gc=False`."""

    topic: ClassVar[Topic]


class Command(Message, frozen=True, kw_only=True):
    """A command to a run. It is delivered at least once and applied exactly once.

    Attributes:
      id: a second command with this id gets the outcome of the first.
      expires_after_seconds: an older command is refused. Its age counts on the sender's clock until
        it is published, and on the server's clock from then on.
      sender: a name for people.
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
    """A command to one seed.

    Attributes:
      seed: number of the seed within its site, or among all seeds without `site`.
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


AnySeedCommand = (
    Germinate | Transition | SetGraft | Cull | Cancel | RollBack | Release | PauseSeed | ResumeSeed
)


class Batch(Command, frozen=True, kw_only=True, tag="batch/1"):
    """Commands to different seeds that are applied in one step, or none of them is."""

    commands: Annotated[tuple[AnySeedCommand, ...], Meta(min_length=1, max_length=MAX_BATCH)]


class Stop(Command, frozen=True, kw_only=True, tag="stop/1"):
    """End the run at its next step boundary, ahead of all other commands."""

    topic: ClassVar[Topic] = Topic.URGENT
    reason: Text = ""


class SeedOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result for one seed, with codes and stages by name."""

    seed: int
    code: Name
    before: Name | None = None
    after: Name | None = None


class Outcome(Message, frozen=True, kw_only=True, tag="outcome/1"):
    """What became of a command; there is one outcome for each id.

    Attributes:
      command_id: id of the command.
      code: DONE, or the reason for a refusal.
      text: an explanation for people, with the remedy where there is one.
      step: the training step that applied the command, or before which it was refused.
      seeds: one row for each seed of the command.
    """

    topic: ClassVar[Topic] = Topic.OUTCOMES
    command_id: Id
    code: Name
    text: Text = ""
    step: int = -1
    seeds: tuple[SeedOutcome, ...] = ()

    @property
    def is_applied(self) -> bool:
        """Whether the command was applied."""
        return self.code == "DONE"


class Column(msgspec.Struct, frozen=True, array_like=True):
    """One little-endian array with the NumPy name of its dtype."""

    dtype: Annotated[str, Meta(pattern="^(u1|i1|i2|i4|i8|f4|f8)$")]
    data: bytes

    @classmethod
    def from_array(cls, values: Any) -> Column:
        """Packs an array with one axis."""
        array = np.ascontiguousarray(values)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return cls(array.dtype.str[1:], array.tobytes())

    def array(self) -> np.ndarray[Any, Any]:
        """The values, as a read-only array."""
        return np.frombuffer(self.data, np.dtype(f"<{self.dtype}"))


class Frame(Message, frozen=True, kw_only=True, tag="frame/1"):
    """The state of all seeds after a step.

    Attributes:
      step: the training step.
      columns: one column for each quantity, with one row for each seed.
    """

    topic: ClassVar[Topic] = Topic.TELEMETRY
    step: int
    columns: dict[Name, Column]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The values of one column."""
        return self.columns[name].array()


class StepMetrics(Message, frozen=True, kw_only=True, tag="step_metrics/1"):
    """The scalars of a step, or of the last step of a segment."""

    topic: ClassVar[Topic] = Topic.TELEMETRY
    step: int
    loss: float
    steps_per_second: float = 0.0
    num_live: int = 0
    num_parameters: int = 0
    num_rollbacks: int = 0
    num_dropped: int = 0
    """Telemetry and events that the run has dropped so far."""
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
    cause: Text
    blueprint: Name | None = None
    measured: dict[Name, float | None] = {}


class Alert(Message, frozen=True, kw_only=True, tag="alert/1"):
    """A condition that a person should look at."""

    topic: ClassVar[Topic] = Topic.EVENTS
    name: Name
    level: Annotated[str, Meta(pattern="^(info|warning|critical)$")]
    text: Text
    step: int = -1


class CheckpointEvent(Message, frozen=True, kw_only=True, tag="checkpoint_event/1"):
    """A checkpoint was saved, was restored, or could not be written."""

    topic: ClassVar[Topic] = Topic.EVENTS
    step: int
    what: Annotated[str, Meta(pattern="^(saved|restored|failed)$")]
    text: Text = ""


class Announcement(Message, frozen=True, kw_only=True, tag="announcement/1"):
    """A run has connected to the bus; the message lists what it serves."""

    topic: ClassVar[Topic] = Topic.EVENTS
    run: Name
    host: Name
    pid: int
    sites: dict[Name, int]
    """Number of seeds of each site."""
    blueprints: tuple[Name, ...] = ()
    grafts: tuple[Name, ...] = ()
    version: Name = ""


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat/1"):
    """A sign that a run is active."""

    topic: ClassVar[Topic] = Topic.EVENTS
    run: Name
    step: int
    is_paused: bool = False


class DeadLetter(Message, frozen=True, kw_only=True, tag="dead_letter/1"):
    """A message that was refused.

    Attributes:
      reason: undecodable, unsupported, oversized, forged, replayed, expired, failing or gap.
      text: what was wrong, for people.
      from_topic: topic of the message.
      entry_id: id of its stream entry.
      size_bytes: size of its payload.
      deliveries: number of times it was delivered.
      payload: its bytes; empty where they are too large to keep.
      signature: its signature.
    """

    topic: ClassVar[Topic] = Topic.DEAD
    reason: Name
    text: Text
    from_topic: Topic
    entry_id: Name
    size_bytes: int
    deliveries: int = 1
    payload: bytes = b""
    signature: bytes = b""


AnyCommand = AnySeedCommand | Batch | Pause | Resume | Checkpoint | Stop
COMMANDS: tuple[type[Command], ...] = get_args(AnyCommand)
"""All classes of commands; `esper_fn._verbs` describes them."""

AnyMessage = (
    AnyCommand | Outcome | Frame | StepMetrics | LifecycleEvent | Alert | CheckpointEvent
    | Announcement | Heartbeat | DeadLetter
)  # fmt: skip
