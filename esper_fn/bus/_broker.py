"""The streams, groups and leases of a bus inside one process."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from secrets import token_hex

from esper_fn.bus._messages import Topic
from esper_fn.bus._transport import Entry

Key = tuple[int, int]
"""The two numbers of an entry id, which rise in a stream."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


@dataclass(slots=True)
class Stream:
    """One topic of a run, with the consumer group of the newest lease."""

    entries: dict[Key, Entry] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    """Keys of the entries, in order."""
    last: Key = (0, 0)
    sequences: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    """Epoch of the lease whose group this is; 0 without a group."""
    delivered: Key = (0, 0)
    pending: dict[Key, int] = field(default_factory=dict)
    """How often each entry was delivered that is not acknowledged."""

    @property
    def backlog(self) -> int:
        """Number of entries that no run has settled."""
        return len(self.keys) - bisect_right(self.keys, self.delivered) + len(self.pending)

    def start_group(self, epoch: int, after: Key = (0, 0)) -> dict[Key, int]:
        """Begins the group of another lease; returns what was pending in the last one."""
        pending, self.pending = self.pending, {}
        self.epoch, self.delivered = epoch, after
        return pending

    def entries_after(self, key: Key, limit: int) -> list[tuple[Key, Entry]]:
        """Entries after a key, in order."""
        first = bisect_right(self.keys, key)
        return [(key, self.entries[key]) for key in self.keys[first : first + limit]]

    def append(self, entries: Iterable[Entry]) -> None:
        """Appends entries, with ids of this machine's clock."""
        now = now_ms()
        for entry in entries:
            self.last = max((now, 0), (self.last[0], self.last[1] + 1))
            self.entries[self.last] = entry
            self.keys.append(self.last)

    def drop_oldest(self, count: int) -> None:
        """Removes the oldest entries."""
        for key in self.keys[: max(0, count)]:
            del self.entries[key]
        del self.keys[: max(0, count)]


@dataclass(slots=True)
class Run:
    """The streams and the lease of a run."""

    streams: dict[Topic, Stream] = field(
        default_factory=lambda: {topic: Stream() for topic in Topic}
    )
    holder: str | None = None
    owner: str | None = None
    """Holder of the newest lease, even after its release."""
    identity: str = ""
    expires_at: float = 0.0
    epoch: int = 0
    number: int = 0
    cursor: dict[Topic, str] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    attempts: dict[tuple[Topic, Key], int] = field(default_factory=dict)


class Broker:
    """Takes the part of a server: the streams of several runs, for all threads of a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.generation = token_hex(8)
        self.runs: defaultdict[str, Run] = defaultdict(Run)
        self._sleepers: set[asyncio.Future[None]] = set()

    def sleep(self) -> asyncio.Future[None]:
        """A future that the next change resolves; the caller has the lock."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.add(future)
        future.add_done_callback(self._sleepers.discard)
        return future

    def wake(self) -> None:
        """Wakes all sleepers."""
        for future in list(self._sleepers):
            if not future.get_loop().is_closed():
                future.get_loop().call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


SHARED = Broker()
"""The default broker of the address `memory`."""
