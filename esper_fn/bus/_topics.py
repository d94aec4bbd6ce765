"""What kinds of traffic there are, what each promises, and how large it may grow."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Guarantee(Enum):
    """What a topic promises to whoever reads it."""

    EFFECTIVELY_ONCE = "at least once on the wire, in force once"
    AT_LEAST_ONCE = "at least once; a reader may see a message twice"
    AT_MOST_ONCE = "dropped, and counted, rather than waited for"


class WhenFull(Enum):
    """What happens at a topic's limit."""

    REFUSE = "the publisher is told that the bus is busy"
    FORGET = "the oldest entries go"


class Topic(StrEnum):
    """One stream of a run."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicPolicy:
    """How a topic is kept.

    Attributes:
      guarantee: what its readers may count on.
      when_full: what happens at `max_entries`.
      max_entries: waiting entries (REFUSE) or entries kept (FORGET).
      max_entry_bytes: of one entry's payload; larger ones are refused unread.
    """

    guarantee: Guarantee
    when_full: WhenFull
    max_entries: int
    max_entry_bytes: int


POLICIES = {
    Topic.URGENT: TopicPolicy(
        guarantee=Guarantee.EFFECTIVELY_ONCE,
        when_full=WhenFull.REFUSE,
        max_entries=1_000,
        max_entry_bytes=16 * 1024,
    ),
    Topic.COMMANDS: TopicPolicy(
        guarantee=Guarantee.EFFECTIVELY_ONCE,
        when_full=WhenFull.REFUSE,
        max_entries=100_000,
        max_entry_bytes=64 * 1024,
    ),
    Topic.OUTCOMES: TopicPolicy(
        guarantee=Guarantee.AT_LEAST_ONCE,
        when_full=WhenFull.FORGET,
        max_entries=100_000,
        max_entry_bytes=64 * 1024,
    ),
    Topic.EVENTS: TopicPolicy(
        guarantee=Guarantee.AT_LEAST_ONCE,
        when_full=WhenFull.FORGET,
        max_entries=20_000,
        max_entry_bytes=64 * 1024,
    ),
    Topic.TELEMETRY: TopicPolicy(
        guarantee=Guarantee.AT_MOST_ONCE,
        when_full=WhenFull.FORGET,
        max_entries=2_000,
        max_entry_bytes=1024 * 1024,
    ),
    Topic.DEAD: TopicPolicy(
        guarantee=Guarantee.AT_LEAST_ONCE,
        when_full=WhenFull.FORGET,
        max_entries=2_000,
        max_entry_bytes=128 * 1024,
    ),
}
"""One row a topic."""
