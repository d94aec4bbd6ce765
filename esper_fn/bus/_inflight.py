"""Commands in flight: delivered to a run, and not acknowledged yet."""

from __future__ import annotations

from typing import NamedTuple

from esper_fn.bus._messages import Command, DeadLetter, Outcome, Topic
from esper_fn.bus._timing import ServerTime
from esper_fn.bus._transport import Delivery, entry_key

_MAX_STORED_BYTES = 64 * 1024


class InFlight(NamedTuple):
    """A command that was delivered and is not acknowledged."""

    delivery: Delivery
    command: Command
    producer: str
    """The producer and the topic, as `producer/topic`."""
    sequence: int
    arrived_at: float
    published_after: float
    """When the stream was last empty."""

    def age_seconds(self, time: ServerTime) -> float:
        """Seconds since the entry was published.

        The server's clock dates an entry, and nothing may depend on that clock being right.
        Whatever it shows, an entry has waited at least since its arrival, and at most since the
        stream was empty.
        """
        published_ms, _ = entry_key(self.delivery.entry_id)
        age, now = (time.now_ms() - published_ms) / 1000, time.clock()
        return max(min(age, now - self.published_after), now - self.arrived_at)


class Ack(NamedTuple):
    """An entry to acknowledge, and what to publish about it."""

    topic: Topic
    entry_id: str
    outcome: Outcome | None = None
    dead: DeadLetter | None = None


def dead_letter(delivery: Delivery, reason: str, text: str) -> DeadLetter:
    """Makes the dead letter of a delivery that is refused."""
    is_small = reason != "oversized" and len(delivery.payload) <= _MAX_STORED_BYTES
    return DeadLetter(
        reason=reason,
        text=text[:2_000],
        from_topic=delivery.topic,
        entry_id=delivery.entry_id,
        size_bytes=delivery.size_bytes,
        deliveries=delivery.deliveries,
        payload=delivery.payload if is_small else b"",
        signature=delivery.signature[:200] if is_small else b"",
    )
