"""The bus inside one process: the same contract, without a server."""

from __future__ import annotations

import asyncio
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
    entries_after,
    entry_name,
    forget,
    shorten,
)
from esper_fn.bus._topics import COMMAND_TOPICS, POLICIES, Topic, WhenFull
from esper_fn.bus._transport import (
    BEGINNING,
    RUN_GROUP,
    Attached,
    Delivery,
    Entry,
    Lease,
    LeaseHeldError,
    OtherRunError,
    Published,
    Renewed,
    Settlement,
    order,
)
from esper_fn.errors import BusUnavailableError, BusyError, FencedError


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
        self,
        topic: Topic,
        producer: str,
        first: int,
        entries: Sequence[Entry],
        *,
        identity: str | None = None,
    ) -> Published:
        """See `Transport`."""
        policy = POLICIES[topic]
        with self._broker.lock:
            run = self._run()
            stream = run.streams[topic]
            skip = max(0, stream.sequences.get(producer, -1) - first + 1)
            fresh = entries[skip:]
            if fresh and identity and identity != run.identity:
                raise OtherRunError(run.identity)
            if fresh and policy.when_full is WhenFull.REFUSE:
                waiting = backlog(stream)
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
                shorten(stream.sequences, MAX_PRODUCERS)
            if policy.when_full is WhenFull.FORGET:
                forget(stream, len(stream.keys) - policy.max_entries)
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
                of = self._group(stream, group)
                now = self._broker.clock()
                for key, entry in entries_after(stream, of.last, limit):
                    of.last = key
                    of.pending[key] = Pending(consumer, now, 1)
                    out.append(Delivery(topic, entry_name(key), *entry))
            return out

        return await self._wait_for(take, wait_seconds)

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""

        def take() -> list[Delivery]:
            return [
                Delivery(topic, entry_name(key), *entry)
                for topic, last in after.items()
                for key, entry in entries_after(self._run().streams[topic], order(last), limit)
            ]

        return await self._wait_for(take, wait_seconds)

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        with self._broker.lock:
            return {topic: entry_name(self._run().streams[topic].last) for topic in topics}

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
            of = self._group(stream, group)
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
                of.pending[key] = Pending(consumer, now, pending.deliveries + 1)
                out.append(
                    Delivery(topic, entry_name(key), *stream.entries[key], pending.deliveries + 1)
                )
            return out

    async def bury(self, topic: Topic, group: str, entry_ids: Sequence[str], dead: Entry) -> None:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            if acknowledge(run.streams[topic], group, entry_ids):
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
        identity: str = "",
        counts_attempts: bool = True,
    ) -> Attached:
        """See `Transport`."""
        with self._broker.lock:
            run = self._run()
            left = run.expires_at - self._broker.clock()
            if run.holder not in {None, holder} and left > 0 and not should_take_over:
                raise LeaseHeldError(str(run.holder), left, run.epoch)
            run.epoch = max(run.epoch, least_epoch) + 1
            run.holder = run.owner = holder
            run.number, run.identity = 0, identity
            run.expires_at = self._broker.clock() + lease_seconds
            start, leftovers, emptied = {}, [], set()
            for topic in COMMAND_TOPICS:
                stream = run.streams[topic]
                start[topic] = (run.cursor if cursor is None else cursor).get(topic, BEGINNING)
                if order(start[topic]) > stream.last:
                    # This is not the stream that the cursor is of.
                    emptied.add(topic)
                    start[topic] = BEGINNING
                at, is_counted = order(start[topic]), not counts_attempts
                for name in [name for name in stream.groups if name.startswith(RUN_GROUP)]:
                    for key, pending in sorted(stream.groups.pop(name).pending.items()):
                        entry_id, entry = entry_name(key), stream.entries.get(key)
                        if entry is None:
                            run.attempts.pop((topic, entry_id), None)
                        elif key <= at:
                            count = pending.deliveries + 1
                            leftovers.append(Delivery(topic, entry_id, *entry, count))
                        elif not is_counted:
                            is_counted = True
                            tried = run.attempts.get((topic, entry_id), 0)
                            run.attempts[topic, entry_id] = tried + 1
                stream.groups[f"{RUN_GROUP}{run.epoch}"] = Group(last=at)
            self._broker.wake()
            return Attached(
                lease=Lease(holder, run.epoch),
                generation=self._broker.generation,
                cursor=start,
                sequences=dict(run.sequences),
                leftovers=leftovers,
                attempts=dict(run.attempts),
                server_ms=self._broker.now_ms(),
                emptied=frozenset(emptied),
            )

    async def renew(
        self,
        lease: Lease,
        *,
        lease_seconds: float,
        identity: str = "",
        taken: Mapping[Topic, str] | None = None,
    ) -> Renewed:
        """See `Transport`."""
        del taken  # nobody can move a group here
        with self._broker.lock:
            run = self._check(lease)
            run.holder, run.expires_at = lease.holder, self._broker.clock() + lease_seconds
            run.identity = identity
            for topic in COMMAND_TOPICS:
                self._group(run.streams[topic], lease.group)
            return Renewed(self._broker.now_ms())

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
            count = bisect_left(stream.keys, order(before))
            forget(stream, count)
            return count

    async def page(self, topic: Topic, *, after: str, limit: int) -> list[Delivery]:
        """See `Transport`."""
        with self._broker.lock:
            stream = self._run().streams[topic]
            return [
                Delivery(topic, entry_name(key), *entry)
                for key, entry in entries_after(stream, order(after), limit)
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

    def _run(self) -> Run:
        if self._is_closed:
            raise BusUnavailableError("this connection to the bus is closed; open another one")
        return self._broker.run(self._name)

    def _check(self, lease: Lease) -> Run:
        run = self._run()
        if (run.owner, run.epoch) == lease:
            return run
        if run.epoch <= lease.epoch or run.owner == lease.holder:
            raise FencedError(f"the place of run {self._name!r} (epoch {lease.epoch}) was removed")
        raise FencedError(
            f"run {self._name!r} is driven by {run.owner} now (epoch {run.epoch}); this process "
            f"held epoch {lease.epoch} and must not go on",
            run.epoch,
        )

    def _group(self, stream: Stream, group: str) -> Group:
        if group.startswith(RUN_GROUP) and group not in stream.groups:
            raise FencedError(f"the lease on run {self._name!r} of group {group} is over")
        return stream.groups.setdefault(group, Group())

    def _add(self, run: Run, topic: Topic, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._broker.append(run.streams[topic], entry)
        forget(run.streams[topic], len(run.streams[topic].keys) - POLICIES[topic].max_entries)

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
