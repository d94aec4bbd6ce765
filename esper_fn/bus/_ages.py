"""How old a command is, with clocks that nobody may trust."""

from __future__ import annotations

import math

from esper_fn.bus._publisher import ServerTime
from esper_fn.bus._resilience import Clock
from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import order

Name = tuple[Topic, str]
"""Topic and name of an entry."""


class Ages:
    """How long entries have lain in their streams.

    The server's clock dates an entry. Whatever it does, an entry has waited since it came here, and
    not since before its stream was last seen empty.

    Args:
      server_time: the server's clock.
      clock: seconds, rising.
    """

    def __init__(self, server_time: ServerTime, clock: Clock) -> None:
        self._time = server_time
        self._clock = clock
        self._came_at: dict[Name, float] = {}
        self._bound: dict[Name, float] = {}
        self._empty_at: dict[Topic, float] = {}

    def drained(self, topic: Topic) -> None:
        """A stream has nothing more right now: whatever comes later is published later."""
        self._empty_at[topic] = self._clock()

    def came(self, name: Name) -> None:
        """An entry came out of its stream."""
        self._came_at[name] = self._clock()
        if name[0] in self._empty_at:
            self._bound[name] = self._empty_at[name[0]]

    def forget(self, name: Name) -> None:
        """An entry is done with."""
        self._came_at.pop(name, None)
        self._bound.pop(name, None)

    def seconds_in_stream(self, name: Name) -> float:
        """How long ago an entry was published."""
        now = self._clock()
        published_ms, _ = order(name[1])
        dated = (self._time.now_ms() - published_ms) / 1000
        at_most = now - self._bound.get(name, -math.inf)
        return max(min(dated, at_most), now - self._came_at.get(name, now))
