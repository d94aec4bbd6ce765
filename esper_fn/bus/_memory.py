"""A transport inside one process: the same contract, without a server."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from esper_fn.bus._broker import (
    MAX_PRODUCERS,
    SHARED,
    Broker,
    Group,
    Pending,
    Run,
    Stream,
    acknowledge,
    backlog,
    drop_oldest,
    entries_after,
    entry_id_of,
    shorten,
)
from esper_fn.bus._messages import COMMAND_TOPICS, LIMITS, Topic
from esper_fn.bus._transport import (
    BEGINNING,
    RUN_GROUP,
    Attachment,
    Delivery,
    Entry,
    Lease,
    OtherRunError,
    Publication,
    Renewal,
    Settlement,
    entry_key,
)
from esper_fn.errors import BusUnavailableError, BusyError, FencedError, LeaseHeldError


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
        return self._broker.now_ms()

    async def publish(
        self,
        topic: Topic,
        producer: str,
        first: int,
        entries: Sequence[Entry],
        *,
        identity: str | None = None,
    ) -> Publication:
        """See `Transport`."""
        limits = LIMITS[topic]
        with self._broker.lock:
            run = self._run()
            stream = run.streams[topic]
            skip = max(0, stream.sequences.get(producer, -1) - first + 1)
            fresh = entries[skip:]
            if fresh and identity and identity != run.identity:
                raise OtherRunError(run.identity)
            if fresh and limits.refuses:
                waiting = backlog(stream)
                total = len(stream.keys) + len(fresh)
                if waiting + len(fresh) > limits.max_entries or total > 10 * limits.max_entries:
                    raise BusyError(
                        f"{waiting:,} entries wait on {self.stream(topic)}, at most "
                        f"{limits.max_entries:,}; send more slowly, or wait for outcomes"
                    )
            for entry in fresh:
                self._broker.append(stream, entry)
            if fresh:
                stream.sequences.pop(producer, None)
                stream.sequences[producer] = first + len(entries) - 1
                shorten(stream.sequences, MAX_PRODUCERS)
            if not limits.refuses:
                drop_oldest(stream, len(stream.keys) - limits.max_entries)
            publication = Publication(len(fresh), self._broker.generation)
        self._broker.wake()
        return publication

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

        def read_new() -> list[Delivery]:
            out = []
            for topic in topics:
                stream = self._run().streams[topic]
                state = self._group(stream, group)
                now = time.monotonic()
                for key, entry in entries_after(stream, state.last, limit):
                    state.last = key
                    state.pending[key] = Pending(consumer, now, 1)
                    out.append(Delivery(topic, entry_id_of(key), *entry))
            return out

        return await self._wait_for(read_new, wait_seconds)

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""

        def read_new() -> list[Delivery]:
            return [
                Delivery(topic, entry_id_of(key), *entry)
                for topic, last in after.items()
                for key, entry in entries_after(self._run().streams[topic], entry_key(last), limit)
            ]

        return await self._wait_for(read_new, wait_seconds)

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        with self._broker.lock:
            return {topic: entry_id_of(self._run().streams[topic].last) for topic in topics}

    async def acknowledge(self, topic: Topic, group: str, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        with self._broker.lock:
            return acknowledge(self._run().streams[topic], group, entry_ids)

    async def claim(
        self, topic: Topic, group: str, consumer: str, *, idle_seconds: float, limit: int
    ) -> list[Delivery]:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            pending = self._group(stream, group).pending
            now = time.monotonic()
            out: list[Delivery] = []
            for key, item in sorted(pending.items()):
                if len(out) == limit:
                    break
                if now - item.delivered_at < idle_seconds:
                    continue
                if key not in stream.entries:
                    del pending[key]
                    continue
                count = item.deliveries + 1
                pending[key] = Pending(consumer, now, count)
                out.append(Delivery(topic, entry_id_of(key), *stream.entries[key], count))
            return out

    async def attach(
        self,
        holder: str,
        *,
        lease_seconds: float,
        least_epoch: int = 0,
        cursor: Mapping[Topic, str] | None = None,
        should_take_over: bool = False,
        identity: str = "",
        counts_attempts: bool = True,
    ) -> Attachment:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            left = run.expires_at - time.monotonic()
            if run.holder not in {None, holder} and left > 0 and not should_take_over:
                raise LeaseHeldError(str(run.holder), left, run.epoch)
            run.epoch = max(run.epoch, least_epoch) + 1
            run.holder = run.owner = holder
            run.number, run.identity = 0, identity
            run.expires_at = time.monotonic() + lease_seconds
            start, leftovers, lost = {}, [], set()
            for topic in COMMAND_TOPICS:
                stream = run.streams[topic]
                start[topic] = (run.cursor if cursor is None else cursor).get(topic, BEGINNING)
                if entry_key(start[topic]) > stream.last:
                    # This is not the stream that the cursor is of.
                    lost.add(topic)
                    start[topic] = BEGINNING
                cursor_key, is_counted = entry_key(start[topic]), not counts_attempts
                for name in [name for name in stream.groups if name.startswith(RUN_GROUP)]:
                    for key, pending in sorted(stream.groups.pop(name).pending.items()):
                        entry_id, entry = entry_id_of(key), stream.entries.get(key)
                        if entry is None:
                            run.attempts.pop((topic, entry_id), None)
                        elif key <= cursor_key:
                            count = pending.deliveries + 1
                            leftovers.append(Delivery(topic, entry_id, *entry, count))
                        elif not is_counted:
                            is_counted = True
                            tried = run.attempts.get((topic, entry_id), 0)
                            run.attempts[topic, entry_id] = tried + 1
                stream.groups[f"{RUN_GROUP}{run.epoch}"] = Group(last=cursor_key)
            self._broker.wake()
            return Attachment(
                lease=Lease(holder, run.epoch),
                generation=self._broker.generation,
                cursor=start,
                sequences=dict(run.sequences),
                leftovers=leftovers,
                attempts=dict(run.attempts),
                server_ms=self._broker.now_ms(),
                lost=frozenset(lost),
            )

    async def renew(
        self,
        lease: Lease,
        *,
        lease_seconds: float,
        identity: str = "",
        last_read: Mapping[Topic, str] | None = None,
    ) -> Renewal:
        """See `Transport`."""
        del last_read  # nothing moves a group in memory
        with self._broker.lock:
            run = self._check(lease)
            run.holder, run.expires_at = lease.holder, time.monotonic() + lease_seconds
            run.identity = identity
            for topic in COMMAND_TOPICS:
                self._group(run.streams[topic], lease.group)
            return Renewal(self._broker.now_ms())

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
            for topic, entry_ids in settlement.acks.items():
                acknowledge(run.streams[topic], lease.group, entry_ids)
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
            count = bisect_left(stream.keys, entry_key(before))
            drop_oldest(stream, count)
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
            return sorted(
                name
                for name, run in self._broker.runs.items()
                if run.holder is not None and run.expires_at > now
            )

    async def close(self) -> None:
        """See `Transport`."""
        self._is_closed = True
        self._broker.wake()

    def _run(self) -> Run:
        if self._is_closed:
            raise BusUnavailableError("this connection to the bus is closed; open another one")
        return self._broker.run(self.run)

    def _check(self, lease: Lease) -> Run:
        run = self._run()
        if (run.owner, run.epoch) == lease:
            return run
        if run.epoch <= lease.epoch or run.owner == lease.holder:
            raise FencedError(f"the lease of run {self.run!r} (epoch {lease.epoch}) was removed")
        raise FencedError(
            f"run {self.run!r} is driven by {run.owner} now (epoch {run.epoch}); this process "
            f"held epoch {lease.epoch} and must not go on",
            run.epoch,
        )

    def _group(self, stream: Stream, group: str) -> Group:
        if group.startswith(RUN_GROUP) and group not in stream.groups:
            raise FencedError(f"the lease on run {self.run!r} of group {group} is over")
        return stream.groups.setdefault(group, Group())

    def _add(self, run: Run, topic: Topic, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._broker.append(run.streams[topic], entry)
        drop_oldest(run.streams[topic], len(run.streams[topic].keys) - LIMITS[topic].max_entries)

    async def _wait_for(
        self, read: Callable[[], list[Delivery]], wait_seconds: float | None
    ) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        until = None if wait_seconds is None else loop.time() + wait_seconds
        while True:
            with self._broker.lock:
                if deliveries := read():
                    return deliveries
                sleep = self._broker.sleep()
            left = None if until is None else until - loop.time()
            if left is not None and left <= 0:
                sleep.cancel()
                return []
            try:
                await asyncio.wait_for(sleep, left)
            except TimeoutError:
                return []
