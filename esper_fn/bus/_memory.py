"""The bus inside one process: the same contract, without a server."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from secrets import token_hex

from esper_fn.bus._topics import COMMAND_TOPICS, POLICIES, Topic, WhenFull
from esper_fn.bus._transport import (
    BEGINNING,
    RUN_GROUP,
    Attached,
    Delivery,
    Entry,
    Lease,
    LeaseHeldError,
    Published,
    Settlement,
    order,
)
from esper_fn.errors import BusUnavailableError, BusyError, FencedError

_MAX_PRODUCERS = 4_096


@dataclass(slots=True)
class _Pending:
    consumer: str
    handed_at: float
    deliveries: int


@dataclass(slots=True)
class _Group:
    last: tuple[int, int] = (0, 0)
    pending: dict[tuple[int, int], _Pending] = field(default_factory=dict)


@dataclass(slots=True)
class _Stream:
    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    keys: list[tuple[int, int]] = field(default_factory=list)
    """Of the entries, rising."""
    last: tuple[int, int] = (0, 0)
    groups: dict[str, _Group] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    streams: dict[Topic, _Stream] = field(
        default_factory=lambda: {topic: _Stream() for topic in Topic}
    )
    holder: str | None = None
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
        self.runs: dict[str, _Run] = {}
        self._sleepers: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def forget(self) -> None:
        """Loses everything, like a server restarted without its files."""
        with self.lock:
            self.runs.clear()
            self.generation = token_hex(8)
        self.wake()

    def add(self, run: str, topic: Topic, entry: Entry) -> str:
        """Adds an entry past every check, as whoever writes to the server could."""
        with self.lock:
            entry_id = self.append(self.run(run).streams[topic], entry)
        self.wake()
        return entry_id

    def run(self, name: str) -> _Run:
        """The streams of a run."""
        return self.runs.setdefault(name, _Run())

    def now_ms(self) -> int:
        """The server's clock."""
        return int(self.wall() * 1000)

    def append(self, stream: _Stream, entry: Entry) -> str:
        """Puts an entry at a stream's end; the caller holds the lock."""
        now = self.now_ms()
        stream.last = (now, 0) if now > stream.last[0] else (stream.last[0], stream.last[1] + 1)
        stream.entries[stream.last] = entry
        stream.keys.append(stream.last)
        return _name(stream.last)

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


def _name(key: tuple[int, int]) -> str:
    return f"{key[0]}-{key[1]}"


SHARED = Broker()
"""The broker behind the address `memory`."""


class MemoryTransport:
    """A `Transport` within this process.

    Args:
      run: whose streams.
      broker: what keeps them; the process's own where left out.
    """

    def __init__(self, run: str, broker: Broker | None = None) -> None:
        self._broker = broker or SHARED
        self._name = run
        self._is_closed = False

    @property
    def run(self) -> str:
        """See `Transport`."""
        return self._name

    def stream(self, topic: Topic) -> str:
        """See `Transport`."""
        return f"esper:{{{self._name}}}:{topic.value}"

    async def open(self) -> int:
        """See `Transport`."""
        self._run()
        return self._broker.now_ms()

    async def publish(
        self, topic: Topic, producer: str, first: int, entries: Sequence[Entry]
    ) -> Published:
        """See `Transport`."""
        policy = POLICIES[topic]
        with self._broker.lock:
            stream = self._run().streams[topic]
            skip = max(0, stream.sequences.get(producer, -1) - first + 1)
            fresh = entries[skip:]
            if fresh and policy.when_full is WhenFull.REFUSE:
                waiting = _backlog(stream)
                kept = len(stream.keys) + len(fresh)
                if waiting + len(fresh) > policy.max_entries or kept > 10 * policy.max_entries:
                    raise BusyError(
                        f"{waiting:,} entries wait on {self.stream(topic)}, at most "
                        f"{policy.max_entries:,}; send more slowly, or wait for outcomes"
                    )
            for entry in fresh:
                self._broker.append(stream, entry)
            if fresh:
                stream.sequences.pop(producer, None)
                stream.sequences[producer] = first + len(entries) - 1
                _shorten(stream.sequences, _MAX_PRODUCERS)
            if policy.when_full is WhenFull.FORGET:
                _forget(stream, len(stream.keys) - policy.max_entries)
            published = Published(len(fresh), self._broker.generation)
        self._broker.wake()
        return published

    async def read(
        self,
        topics: Sequence[Topic],
        group: str,
        consumer: str,
        *,
        limit: int,
        wait_seconds: float | None,
    ) -> list[Delivery]:
        """See `Transport`."""

        def take() -> list[Delivery]:
            out = []
            for topic in topics:
                stream = self._run().streams[topic]
                if group.startswith(RUN_GROUP) and group not in stream.groups:
                    raise FencedError(f"the lease on run {self._name!r} of group {group} is over")
                of = stream.groups.setdefault(group, _Group())
                now = self._broker.clock()
                for key, entry in _after(stream, of.last, limit):
                    of.last = key
                    of.pending[key] = _Pending(consumer, now, 1)
                    out.append(Delivery(topic, _name(key), *entry))
            return out

        return await self._wait_for(take, wait_seconds)

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""

        def take() -> list[Delivery]:
            return [
                Delivery(topic, _name(key), *entry)
                for topic, last in after.items()
                for key, entry in _after(self._run().streams[topic], order(last), limit)
            ]

        return await self._wait_for(take, wait_seconds)

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        with self._broker.lock:
            return {topic: _name(self._run().streams[topic].last) for topic in topics}

    async def acknowledge(self, topic: Topic, group: str, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        with self._broker.lock:
            return _acknowledge(self._run().streams[topic], group, entry_ids)

    async def claim(
        self, topic: Topic, group: str, consumer: str, *, idle_seconds: float, limit: int
    ) -> list[Delivery]:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            of = stream.groups.setdefault(group, _Group())
            now = self._broker.clock()
            out: list[Delivery] = []
            for key, pending in sorted(of.pending.items()):
                if len(out) == limit:
                    break
                if now - pending.handed_at < idle_seconds:
                    continue
                if key not in stream.entries:
                    del of.pending[key]
                    continue
                of.pending[key] = _Pending(consumer, now, pending.deliveries + 1)
                out.append(
                    Delivery(topic, _name(key), *stream.entries[key], pending.deliveries + 1)
                )
            return out

    async def bury(self, topic: Topic, group: str, entry_ids: Sequence[str], dead: Entry) -> None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            if _acknowledge(run.streams[topic], group, entry_ids):
                self._add(run, Topic.DEAD, [dead])
        self._broker.wake()

    async def attach(
        self,
        holder: str,
        *,
        lease_seconds: float,
        least_epoch: int = 0,
        cursor: Mapping[Topic, str] | None = None,
        should_take_over: bool = False,
    ) -> Attached:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            left = run.expires_at - self._broker.clock()
            if run.holder not in {None, holder} and left > 0 and not should_take_over:
                raise LeaseHeldError(str(run.holder), left)
            run.epoch = max(run.epoch, least_epoch) + 1
            run.holder, run.number = holder, 0
            run.expires_at = self._broker.clock() + lease_seconds
            start, leftovers = {}, []
            for topic in COMMAND_TOPICS:
                stream = run.streams[topic]
                start[topic] = (run.cursor if cursor is None else cursor).get(topic, BEGINNING)
                at, is_counted = order(start[topic]), False
                for name in [name for name in stream.groups if name.startswith(RUN_GROUP)]:
                    for key, pending in sorted(stream.groups.pop(name).pending.items()):
                        entry_id, entry = _name(key), stream.entries.get(key)
                        if entry is None:
                            run.attempts.pop((topic, entry_id), None)
                        elif key <= at:
                            count = pending.deliveries + 1
                            leftovers.append(Delivery(topic, entry_id, *entry, count))
                        elif not is_counted:
                            is_counted = True
                            tried = run.attempts.get((topic, entry_id), 0)
                            run.attempts[topic, entry_id] = tried + 1
                stream.groups[f"{RUN_GROUP}{run.epoch}"] = _Group(last=at)
            self._broker.wake()
            return Attached(
                lease=Lease(holder, run.epoch),
                generation=self._broker.generation,
                cursor=start,
                sequences=dict(run.sequences),
                leftovers=leftovers,
                attempts=dict(run.attempts),
                server_ms=self._broker.now_ms(),
            )

    async def renew(self, lease: Lease, *, lease_seconds: float) -> int:
        """See `Transport`."""
        with self._broker.lock:
            run = self._check(lease)
            run.holder, run.expires_at = lease.holder, self._broker.clock() + lease_seconds
            return self._broker.now_ms()

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            if (run.holder, run.epoch) == lease:
                run.holder = None

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._check(lease)
            if settlement.number <= run.number:
                return
            run.number = settlement.number
            for topic, entry_ids in settlement.done.items():
                _acknowledge(run.streams[topic], lease.group, entry_ids)
                for entry_id in entry_ids:
                    run.attempts.pop((topic, entry_id), None)
            run.cursor.update(settlement.cursor)
            for producer, number in settlement.sequences.items():
                run.sequences.pop(producer, None)
                if number >= 0:
                    run.sequences[producer] = number
            self._add(run, Topic.OUTCOMES, settlement.outcomes)
            self._add(run, Topic.DEAD, settlement.dead)
        self._broker.wake()

    async def trim(self, topic: Topic, before: str) -> int:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            count = bisect_left(stream.keys, order(before))
            _forget(stream, count)
            return count

    async def page(self, topic: Topic, *, after: str, limit: int) -> list[Delivery]:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            return [
                Delivery(topic, _name(key), *entry)
                for key, entry in _after(stream, order(after), limit)
            ]

    async def discard(self, topic: Topic, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            count = sum(stream.entries.pop(order(name), None) is not None for name in entry_ids)
            stream.keys = list(stream.entries)
            return count

    async def length(self, topic: Topic) -> int:
        """See `Transport`."""
        with self._broker.lock:
            return len(self._run().streams[topic].entries)

    async def holder(self) -> str | None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            return run.holder if run.expires_at > self._broker.clock() else None

    async def living(self) -> list[str]:
        """See `Transport`."""
        now = self._broker.clock()
        with self._broker.lock:
            return sorted(
                name
                for name, run in self._broker.runs.items()
                if run.holder is not None and run.expires_at > now
            )

    async def close(self) -> None:
        """See `Transport`."""
        self._is_closed = True
        self._broker.wake()

    # --- parts: the caller holds the lock -------------------------------------------------------

    def _run(self) -> _Run:
        if self._is_closed:
            raise BusUnavailableError("this connection to the bus is closed; open another one")
        return self._broker.run(self._name)

    def _check(self, lease: Lease) -> _Run:
        run = self._run()
        if run.epoch != lease.epoch:
            raise FencedError(
                f"run {self._name!r} is driven by {run.holder or 'nobody'} now (epoch "
                f"{run.epoch}); this process held epoch {lease.epoch} and must not go on",
                run.epoch,
            )
        return run

    def _add(self, run: _Run, topic: Topic, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._broker.append(run.streams[topic], entry)
        _forget(run.streams[topic], len(run.streams[topic].keys) - POLICIES[topic].max_entries)

    async def _wait_for(
        self, take: Callable[[], list[Delivery]], wait_seconds: float | None
    ) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        until = None if wait_seconds is None else loop.time() + wait_seconds
        while True:
            with self._broker.lock:
                if found := take():
                    return found
                sleep = self._broker.sleep()
            left = None if until is None else until - loop.time()
            if left is not None and left <= 0:
                sleep.cancel()
                return []
            try:
                await asyncio.wait_for(sleep, left)
            except TimeoutError:
                return []


def _after(
    stream: _Stream, last: tuple[int, int], limit: int
) -> list[tuple[tuple[int, int], Entry]]:
    first = bisect_right(stream.keys, last)
    return [(key, stream.entries[key]) for key in stream.keys[first : first + limit]]


def _acknowledge(stream: _Stream, group: str, entry_ids: Sequence[str]) -> int:
    pending = stream.groups.setdefault(group, _Group()).pending
    return sum(pending.pop(order(name), None) is not None for name in entry_ids)


def _backlog(stream: _Stream) -> int:
    group = next((g for name, g in stream.groups.items() if name.startswith(RUN_GROUP)), None)
    if group is None:
        return len(stream.keys)
    return len(stream.keys) - bisect_right(stream.keys, group.last) + len(group.pending)


def _forget(stream: _Stream, count: int) -> None:
    """Drops the oldest entries."""
    for key in stream.keys[: max(0, count)]:
        del stream.entries[key]
    del stream.keys[: max(0, count)]


def _shorten(numbers: dict[str, int], limit: int) -> None:
    for name in list(islice(numbers, max(0, len(numbers) - limit))):
        del numbers[name]
