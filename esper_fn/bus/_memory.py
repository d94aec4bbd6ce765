"""A broker and a transport inside one process: the same contract, without a server."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from esper_fn.bus._messages import COMMAND_TOPICS, LIMITS, Topic
from esper_fn.bus._position import MAX_PRODUCERS
from esper_fn.bus._transport import (
    BEGINNING,
    Attachment,
    Delivery,
    Entry,
    Lease,
    LeaseRequest,
    OtherRunError,
    Publication,
    Renewal,
    Settlement,
    busy_error,
    entry_id,
    entry_key,
    fenced_error,
)
from esper_fn.errors import BusUnavailableError, LeaseHeldError

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
    holder: str = ""
    """Holder of the newest lease, even after its end."""
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


class MemoryTransport:
    """A `Transport` within this process.

    Args:
      run: name of the run.
      broker: the broker; by default the one that all of the process share.
    """

    def __init__(self, run: str, broker: Broker | None = None) -> None:
        self._broker = broker or SHARED
        self.run = run
        self._is_closed = False

    def stream(self, topic: Topic) -> str:
        """See `Transport`."""
        return f"esper:{{{self.run}}}:{topic.value}"

    async def open(self) -> int:
        """See `Transport`."""
        self._run()
        return now_ms()

    async def publish(
        self, topic: Topic, producer: str, first: int, entries: Sequence[Entry], identity: str = ""
    ) -> Publication:
        """See `Transport`."""
        limits = LIMITS[topic]
        with self._broker.lock:
            run = self._run()
            stream = run.streams[topic]
            fresh = entries[max(0, stream.sequences.get(producer, -1) - first + 1) :]
            if fresh and identity not in {"", run.identity}:
                raise OtherRunError(run.identity)
            if fresh and limits.refuses:
                waiting, total = stream.backlog, len(stream.keys) + len(fresh)
                if waiting + len(fresh) > limits.max_entries or total > 10 * limits.max_entries:
                    raise busy_error(self.stream(topic), waiting, topic)
            if fresh:
                stream.append(fresh)
                stream.sequences.pop(producer, None)
                stream.sequences[producer] = first + len(entries) - 1
                if len(stream.sequences) > MAX_PRODUCERS:
                    del stream.sequences[next(iter(stream.sequences))]
            if not limits.refuses:
                stream.drop_oldest(len(stream.keys) - limits.max_entries)
            publication = Publication(len(fresh), self._broker.generation)
        self._broker.wake()
        return publication

    async def read(
        self, lease: Lease, topic: Topic, *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""

        def read_new() -> list[Delivery]:
            stream = self._group(lease, topic)
            entries = stream.entries_after(stream.delivered, limit)
            for key, _ in entries:
                stream.delivered, stream.pending[key] = key, 1
            return [_delivery(topic, key, entry) for key, entry in entries]

        return await self._wait_for(read_new, wait_seconds)

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""

        def read_new() -> list[Delivery]:
            streams = self._run().streams
            return [
                _delivery(topic, key, entry)
                for topic, last in after.items()
                for key, entry in streams[topic].entries_after(entry_key(last), limit)
            ]

        return await self._wait_for(read_new, wait_seconds)

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        with self._broker.lock:
            streams = self._run().streams
            return {topic: entry_id(streams[topic].last) for topic in topics}

    async def claim(self, lease: Lease, topic: Topic) -> list[Delivery]:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._group(lease, topic)
            stream.pending = {
                key: count + 1 for key, count in stream.pending.items() if key in stream.entries
            }
            return [
                _delivery(topic, key, stream.entries[key], count)
                for key, count in stream.pending.items()
            ]

    async def attach(self, request: LeaseRequest) -> Attachment:
        """See `Transport`."""
        with self._broker.lock:
            run, holder = self._run(), request.holder
            left = run.expires_at - time.monotonic()
            if run.holder != holder and left > 0 and not request.should_take_over:
                raise LeaseHeldError(run.holder, left, run.epoch)
            run.epoch = max(run.epoch, request.least_epoch) + 1
            run.holder, run.number, run.identity = holder, 0, request.identity
            run.expires_at = time.monotonic() + request.seconds
            cursor = run.cursor if request.cursor is None else request.cursor
            start, leftovers, lost = {}, [], set()
            for topic in COMMAND_TOPICS:
                stream = run.streams[topic]
                start[topic] = cursor.get(topic, BEGINNING)
                if entry_key(start[topic]) > stream.last:
                    # This is not the stream that the cursor is of.
                    lost.add(topic)
                    start[topic] = BEGINNING
                last, is_counted = entry_key(start[topic]), not request.counts_attempts
                for key, count in stream.start_group(run.epoch, last).items():
                    if key not in stream.entries:
                        run.attempts.pop((topic, key), None)
                    elif key <= last:
                        leftovers.append(_delivery(topic, key, stream.entries[key], count + 1))
                    elif not is_counted:
                        is_counted = True
                        run.attempts[topic, key] = run.attempts.get((topic, key), 0) + 1
            self._broker.wake()
            return Attachment(
                lease=Lease(holder, run.epoch, request.seconds),
                generation=self._broker.generation,
                cursor=start,
                sequences=dict(run.sequences),
                leftovers=leftovers,
                attempts={
                    (topic, entry_id(key)): count for (topic, key), count in run.attempts.items()
                },
                server_ms=now_ms(),
                lost=frozenset(lost),
            )

    async def renew(
        self, lease: Lease, *, identity: str = "", last_read: Mapping[Topic, str] | None = None
    ) -> Renewal:
        """See `Transport`."""
        del last_read  # nothing moves a group in memory
        with self._broker.lock:
            run = self._check(lease)
            run.identity, run.expires_at = identity, time.monotonic() + lease.seconds
            for topic in COMMAND_TOPICS:
                self._group(lease, topic)
            return Renewal(now_ms())

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            if (run.holder, run.epoch) == lease[:2]:
                run.expires_at = 0.0

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._check(lease)
            if settlement.number <= run.number:
                return
            run.number = settlement.number
            for topic, entry_ids in settlement.acks.items():
                for key in map(entry_key, entry_ids):
                    run.streams[topic].pending.pop(key, None)
                    run.attempts.pop((topic, key), None)
            run.cursor.update(settlement.cursor)
            for producer, number in settlement.sequences.items():
                run.sequences.pop(producer, None)
                if number >= 0:
                    run.sequences[producer] = number
            for topic, entries in (
                (Topic.OUTCOMES, settlement.outcomes),
                (Topic.DEAD, settlement.dead),
            ):
                stream = run.streams[topic]
                stream.append(entries)
                stream.drop_oldest(len(stream.keys) - LIMITS[topic].max_entries)
        self._broker.wake()

    async def trim(self, topic: Topic, before: str) -> int:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            count = bisect_left(stream.keys, entry_key(before))
            stream.drop_oldest(count)
            return count

    async def discard(self, topic: Topic, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            count = sum(stream.entries.pop(entry_key(name), None) is not None for name in entry_ids)
            stream.keys = list(stream.entries)
            return count

    async def holder(self) -> str | None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            return run.holder if run.expires_at > time.monotonic() else None

    async def active_runs(self) -> list[str]:
        """See `Transport`."""
        now = time.monotonic()
        with self._broker.lock:
            runs = self._broker.runs.items()
            return sorted(name for name, run in runs if run.expires_at > now)

    async def close(self) -> None:
        """See `Transport`."""
        self._is_closed = True
        self._broker.wake()

    def _run(self) -> Run:
        if self._is_closed:
            raise BusUnavailableError("this connection to the bus is closed; open another one")
        return self._broker.runs[self.run]

    def _check(self, lease: Lease) -> Run:
        run = self._run()
        if (run.holder, run.epoch) != lease[:2]:
            raise fenced_error(self.run, lease, run.epoch, run.holder)
        return run

    def _group(self, lease: Lease, topic: Topic) -> Stream:
        """The stream of a topic, whose group is that of the lease."""
        stream = self._run().streams[topic]
        if stream.epoch != lease.epoch:
            raise fenced_error(self.run, lease)
        return stream

    async def _wait_for(
        self, read: Callable[[], list[Delivery]], wait_seconds: float | None
    ) -> list[Delivery]:
        try:
            async with asyncio.timeout(wait_seconds):
                while True:
                    with self._broker.lock:
                        if deliveries := read():
                            return deliveries
                        sleep = self._broker.sleep()
                    await sleep
        except TimeoutError:
            return []


def _delivery(topic: Topic, key: Key, entry: Entry, deliveries: int = 1) -> Delivery:
    return Delivery(topic, entry_id(key), *entry, deliveries)
