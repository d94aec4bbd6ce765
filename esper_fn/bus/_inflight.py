"""Commands in flight: delivered to a run, and not acknowledged yet."""

from __future__ import annotations

import math
from collections import OrderedDict
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


class _Arrival(NamedTuple):
    key: tuple[int, int]
    arrived_at: float
    published_after: float
    """When the stream was last empty."""


class AckWindow:
    """The entries of one command stream from their arrival up to the oldest one in flight.

    The server's clock dates an entry, and nothing may depend on that clock being right. Whatever it
    shows, an entry has waited at least since its arrival, and at most since the stream was empty.

    Args:
      server_time: the server's clock.
    """

    def __init__(self, server_time: ServerTime) -> None:
        self._time = server_time
        self._arrivals: OrderedDict[str, _Arrival] = OrderedDict()
        self._acked: set[str] = set()
        self._orphans: dict[str, _Arrival] = {}
        """Entries in flight whose stream the server has lost."""
        self._empty_at = -math.inf
        self._cursor = (-1, -1)

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._arrivals

    def note_empty(self) -> None:
        """Records that the stream is empty now: later entries are published later."""
        self._empty_at = self._time.clock()

    def add(self, entry_id: str, key: tuple[int, int], now: float) -> None:
        """Adds an entry that has arrived; `key` is its `entry_key`."""
        self._arrivals[entry_id] = _Arrival(key, now, self._empty_at)

    def reset(self) -> None:
        """Forgets the ids of a stream that the server has lost, but not the age of its entries."""
        self._orphans.update(self._arrivals)
        self._arrivals.clear()
        self._acked.clear()
        self._cursor = (-1, -1)

    def ack(self, entry_id: str) -> str | None:
        """Acknowledges an entry; returns the new cursor if it moves."""
        self._orphans.pop(entry_id, None)
        if entry_id in self._arrivals:
            self._acked.add(entry_id)
        cursor = None
        while self._arrivals and (first := next(iter(self._arrivals))) in self._acked:
            self._acked.remove(first)
            key = self._arrivals.pop(first).key
            if key > self._cursor:
                self._cursor, cursor = key, first
        return cursor

    def age_seconds(self, entry_id: str) -> float:
        """Seconds since an entry in flight was published."""
        now = self._time.clock()
        arrival = self._arrivals.get(entry_id) or self._orphans[entry_id]
        published_ms, _ = entry_key(entry_id)
        age = (self._time.now_ms() - published_ms) / 1000
        return max(min(age, now - arrival.published_after), now - arrival.arrived_at)
