"""What the bus inside one process keeps: streams, groups, leases."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from secrets import token_hex

from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import RUN_GROUP, Entry, order

MAX_PRODUCERS = 4_096


@dataclass(slots=True)
class Pending:
    """An entry handed out and not acknowledged."""

    consumer: str
    handed_at: float
    deliveries: int


@dataclass(slots=True)
class Group:
    """A consumer group."""

    last: tuple[int, int] = (0, 0)
    pending: dict[tuple[int, int], Pending] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """One topic of a run."""

    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    keys: list[tuple[int, int]] = field(default_factory=list)
    """Of the entries, rising."""
    last: tuple[int, int] = (0, 0)
    groups: dict[str, Group] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """The streams and the lease of a run."""

    streams: dict[Topic, Stream] = field(
        default_factory=lambda: {topic: Stream() for topic in Topic}
    )
    holder: str | None = None
    owner: str | None = None
    """Of the newest lease, also when it was given up."""
    identity: str = ""
    expires_at: float = 0.0
    epoch: int = 0
    number: int = 0
    cursor: dict[Topic, str] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    attempts: dict[tuple[Topic, str], int] = field(default_factory=dict)


class Broker:
    """What a server would be: the streams of several runs, for all threads of a process.

    Args:
      clock: seconds, rising, for leases and the idle time of claims.
      wall: seconds since 1970, for the names of entries.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self.clock = clock
        self.wall = wall
        self.lock = threading.Lock()
        self.generation = token_hex(8)
        self.runs: dict[str, Run] = {}
        self._sleepers: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def forget(self) -> None:
        """Loses everything, like a server restarted without its files."""
        with self.lock:
            self.runs.clear()
            self.generation = token_hex(8)
        self.wake()

    def lose(self, run: str, *topics: Topic) -> None:
        """Loses streams of a run with their groups, as by DEL or an eviction.

        Args:
          run: whose.
          topics: of the streams; where left out, they stay and all else that is known goes.
        """
        with self.lock:
            streams = self.run(run).streams
            if topics:
                streams.update({topic: Stream() for topic in topics})
            else:
                self.runs[run] = Run(streams=streams)
        self.wake()

    def lose_groups(self, run: str) -> None:
        """Loses the consumer groups of a run's streams, as by XGROUP DESTROY."""
        with self.lock:
            for stream in self.run(run).streams.values():
                stream.groups.clear()
        self.wake()

    def add(self, run: str, topic: Topic, entry: Entry) -> str:
        """Adds an entry past every check, as whoever writes to the server could."""
        with self.lock:
            entry_id = self.append(self.run(run).streams[topic], entry)
        self.wake()
        return entry_id

    def run(self, name: str) -> Run:
        """The streams of a run."""
        return self.runs.setdefault(name, Run())

    def now_ms(self) -> int:
        """The server's clock."""
        return int(self.wall() * 1000)

    def append(self, stream: Stream, entry: Entry) -> str:
        """Puts an entry at a stream's end; the caller holds the lock."""
        now = self.now_ms()
        stream.last = (now, 0) if now > stream.last[0] else (stream.last[0], stream.last[1] + 1)
        stream.entries[stream.last] = entry
        stream.keys.append(stream.last)
        return entry_name(stream.last)

    def sleep(self) -> asyncio.Future[None]:
        """A future that the next change ends; the caller holds the lock."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        item = (loop, future)
        self._sleepers.add(item)
        future.add_done_callback(lambda _: self._sleepers.discard(item))
        return future

    def wake(self) -> None:
        """Ends all sleep."""
        for loop, future in list(self._sleepers):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_finish, future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def entry_name(key: tuple[int, int]) -> str:
    """As a server writes it."""
    return f"{key[0]}-{key[1]}"


SHARED = Broker()
"""The broker behind the address `memory`."""


def entries_after(
    stream: Stream, last: tuple[int, int], limit: int
) -> list[tuple[tuple[int, int], Entry]]:
    """Entries after one."""
    first = bisect_right(stream.keys, last)
    return [(key, stream.entries[key]) for key in stream.keys[first : first + limit]]


def acknowledge(stream: Stream, group: str, entry_ids: Sequence[str]) -> int:
    """Takes entries off a group's list; returns how many were on it."""
    if group not in stream.groups:
        return 0
    pending = stream.groups[group].pending
    return sum(pending.pop(order(name), None) is not None for name in entry_ids)


def backlog(stream: Stream) -> int:
    """Entries that no run has settled."""
    group = next((g for name, g in stream.groups.items() if name.startswith(RUN_GROUP)), None)
    if group is None:
        return len(stream.keys)
    return len(stream.keys) - bisect_right(stream.keys, group.last) + len(group.pending)


def forget(stream: Stream, count: int) -> None:
    """Drops the oldest entries."""
    for key in stream.keys[: max(0, count)]:
        del stream.entries[key]
    del stream.keys[: max(0, count)]


def shorten(numbers: dict[str, int], limit: int) -> None:
    """Drops the oldest of more than so many."""
    for name in list(islice(numbers, max(0, len(numbers) - limit))):
        del numbers[name]
