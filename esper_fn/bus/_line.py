"""The entries of one command stream that a run has taken in, and how old they are."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from esper_fn.bus._publisher import ServerTime
from esper_fn.bus._resilience import Clock
from esper_fn.bus._transport import order


@dataclass(slots=True)
class _Arrival:
    at: tuple[int, int]
    """`order` of the entry's name."""
    entry_id: str
    came_at: float
    not_before: float
    """Its stream was last seen empty then."""
    is_finished: bool = False


class Line:
    """Entries of one stream in order of arrival, up to the oldest unfinished one.

    The server's clock dates an entry, and nobody may trust it. Whatever it does, an entry has
    waited since it came here, and not since before its stream was last seen empty.

    Args:
      server_time: the server's clock.
      clock: seconds, rising.
    """

    def __init__(self, server_time: ServerTime, clock: Clock) -> None:
        self._time = server_time
        self._clock = clock
        self._arrivals: deque[_Arrival] = deque()
        self._by_name: dict[str, _Arrival] = {}
        self._lost: dict[str, _Arrival] = {}
        """Unfinished ones of a stream that is gone."""
        self._empty_at = -math.inf
        self._cursor = (-1, -1)

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._by_name

    def drained(self) -> None:
        """The stream has nothing more right now: whatever comes later is published later."""
        self._empty_at = self._clock()

    def came(self, entry_id: str, at: tuple[int, int], now: float) -> None:
        """An entry came out of the stream; `at` is the `order` of its name."""
        arrival = _Arrival(at, entry_id, now, self._empty_at)
        self._arrivals.append(arrival)
        self._by_name[entry_id] = arrival

    def forget(self) -> None:
        """The server has lost the stream: names mean nothing now; what came is as old as it was."""
        self._lost |= self._by_name
        self._by_name = {}
        self._arrivals.clear()
        self._cursor = (-1, -1)

    def finish(self, entry_id: str) -> str | None:
        """An entry is done with; returns the last one before which all are, where that moved."""
        arrivals, cursor = self._arrivals, None
        self._lost.pop(entry_id, None)
        if entry_id in self._by_name:
            self._by_name[entry_id].is_finished = True
        while arrivals and arrivals[0].is_finished:
            first = arrivals.popleft()
            del self._by_name[first.entry_id]
            if first.at > self._cursor:
                self._cursor, cursor = first.at, first.entry_id
        return cursor

    def seconds_in_stream(self, entry_id: str) -> float:
        """How long ago an entry was published."""
        now = self._clock()
        arrival = self._by_name.get(entry_id) or self._lost[entry_id]
        published_ms, _ = order(entry_id)
        dated = (self._time.now_ms() - published_ms) / 1000
        return max(min(dated, now - arrival.not_before), now - arrival.came_at)
