"""The streams, groups and leases of a bus inside one process."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from secrets import token_hex

from esper_fn.bus._messages import Topic
from esper_fn.bus._transport import RUN_GROUP, Entry, entry_key

MAX_PRODUCERS = 4_096


@dataclass(slots=True)
class Pending:
    """An entry that was delivered and not acknowledged."""

    consumer: str
    delivered_at: float
    deliveries: int


@dataclass(slots=True)
class Group:
    """A consumer group of a stream."""

    last: tuple[int, int] = (0, 0)
    pending: dict[tuple[int, int], Pending] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """One topic of a run."""

    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    keys: list[tuple[int, int]] = field(default_factory=list)
    """Keys of the entries, in order."""
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
    """Holder of the newest lease, even after its release."""
    identity: str = ""
    expires_at: float = 0.0
    epoch: int = 0
    number: int = 0
    cursor: dict[Topic, str] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    attempts: dict[tuple[Topic, str], int] = field(default_factory=dict)


class Broker:
    """Takes the part of a server: the streams of several runs, for all threads of a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.generation = token_hex(8)
        self.runs: dict[str, Run] = {}
        self._sleepers: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def run(self, name: str) -> Run:
        """The data of a run; the caller has the lock."""
        return self.runs.setdefault(name, Run())

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return int(time.time() * 1000)

    def append(self, stream: Stream, entry: Entry) -> str:
        """Appends an entry to a stream; the caller has the lock."""
        now = self.now_ms()
        stream.last = (now, 0) if now > stream.last[0] else (stream.last[0], stream.last[1] + 1)
        stream.entries[stream.last] = entry
        stream.keys.append(stream.last)
        return entry_id_of(stream.last)

    def sleep(self) -> asyncio.Future[None]:
        """A future that the next change resolves; the caller has the lock."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        item = (loop, future)
        self._sleepers.add(item)
        future.add_done_callback(lambda _: self._sleepers.discard(item))
        return future

    def wake(self) -> None:
        """Wakes all sleepers."""
        for loop, future in list(self._sleepers):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def entry_id_of(key: tuple[int, int]) -> str:
    """The entry id of a key."""
    return f"{key[0]}-{key[1]}"


SHARED = Broker()
"""The default broker of the address `memory`."""


def entries_after(
    stream: Stream, last: tuple[int, int], limit: int
) -> list[tuple[tuple[int, int], Entry]]:
    """Entries after a key, in order."""
    first = bisect_right(stream.keys, last)
    return [(key, stream.entries[key]) for key in stream.keys[first : first + limit]]


def acknowledge(stream: Stream, group: str, entry_ids: Sequence[str]) -> int:
    """Acknowledges entries of a group; returns how many were pending."""
    if group not in stream.groups:
        return 0
    pending = stream.groups[group].pending
    return sum(pending.pop(entry_key(name), None) is not None for name in entry_ids)


def backlog(stream: Stream) -> int:
    """Counts the entries that no run has settled."""
    group = next((g for name, g in stream.groups.items() if name.startswith(RUN_GROUP)), None)
    if group is None:
        return len(stream.keys)
    return len(stream.keys) - bisect_right(stream.keys, group.last) + len(group.pending)


def drop_oldest(stream: Stream, count: int) -> None:
    """Removes the oldest entries of a stream."""
    for key in stream.keys[: max(0, count)]:
        del stream.entries[key]
    del stream.keys[: max(0, count)]


def shorten(numbers: dict[str, int], limit: int) -> None:
    """Removes the oldest numbers beyond a limit."""
    for name in list(islice(numbers, max(0, len(numbers) - limit))):
        del numbers[name]
