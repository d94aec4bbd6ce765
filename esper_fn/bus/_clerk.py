"""The talking half of a station: coroutines of one thread, and all that waits for a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from secrets import token_hex

from redis.exceptions import RedisError

from esper_fn.bus._desk import Desk
from esper_fn.bus._intake import Intake
from esper_fn.bus._ledger import Ledger
from esper_fn.bus._messages import Alert, Announcement, Heartbeat, Message
from esper_fn.bus._position import RunPosition
from esper_fn.bus._publisher import Publisher, ServerTime
from esper_fn.bus._resilience import Clock, RateLimiter, Retry
from esper_fn.bus._signing import Keyring
from esper_fn.bus._topics import COMMAND_TOPICS, Topic
from esper_fn.bus._transport import (
    READ_BYTES,
    Attached,
    Delivery,
    Lease,
    LeaseHeldError,
    Settlement,
    Transport,
    exhausted_words,
    order,
)
from esper_fn.errors import (
    BusError,
    BusSecurityError,
    BusUnavailableError,
    EsperError,
    FencedError,
)

_LOGGER = logging.getLogger(__name__)
_OUTAGE = (BusUnavailableError, BusSecurityError, RedisError)
_MAX_COMPLAINTS = 100
_Work = Callable[[int], Awaitable[None]]
_READ_LIMIT = 256
_ACCEPTED_AT_ONCE = 32
_TRIM_EVERY = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """How a place is kept; see `Station`."""

    keys: Keyring
    lease_seconds: float
    should_take_over: bool
    gap_seconds: float
    gather_seconds: float
    limits: Mapping[Topic, int]
    clock: Clock


class Clerk:
    """Reads commands onto a desk, and makes known what lies there done.

    Args:
      desk: shared with the loop.
      transport: makes one.
      announcement: of the run.
      position: the desk's.
      is_given: it came from a checkpoint; otherwise the server's memory counts.
      terms: of the place.
      keeps_commands: see `Station`.
    """

    def __init__(
        self,
        desk: Desk,
        transport: Callable[[], Transport],
        announcement: Announcement,
        position: RunPosition,
        *,
        is_given: bool,
        terms: Terms,
        keeps_commands: bool,
    ) -> None:
        self._desk = desk
        self._make = transport
        self._announcement = announcement
        self._position = position
        self._is_given = is_given
        self._terms = terms
        self.keeps_commands = keeps_commands
        self._time = ServerTime(terms.clock)
        self._retry = Retry()
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{token_hex(4)}"
        self._publishers: dict[Topic, Publisher] = {}
        self._settled_since_trim = 0
        self._taken: dict[Topic, str] = {}
        """Last entry of each command stream that was taken in under this lease."""
        self._exhausted: frozenset[Topic] = frozenset()
        self._identity = ""
        self._is_told = False
        self._complaints: set[str] = set()
        """Told since all was well."""
        self._alerts = RateLimiter(per_second=0.1, burst=5, clock=terms.clock)
        self.num_settled = 0
        self.num_lost_servers = 0

    async def open(self, *, is_listening: bool) -> None:
        """Takes the place and begins to work."""
        self._listening = asyncio.Event()
        if is_listening:
            self.listen()
        self.settle_now = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._gaps = asyncio.Event()
        self._renewing = asyncio.Lock()
        self._transport = self._make()
        try:
            await self._take_place()
        except BaseException:
            await self._transport.close()
            raise
        for topic, limit in self._terms.limits.items():
            self._publishers[topic] = Publisher(
                self._transport,
                topic,
                keys=self._terms.keys,
                server_time=self._time,
                max_waiting=limit,
                clock=self._terms.clock,
            )
        self._tell(self._announcement)
        works: list[_Work] = [partial(self._read, topic) for topic in COMMAND_TOPICS]
        works += [self._settle, self._live, self._watch_gaps]
        self._tasks = [asyncio.create_task(self._repeat(work)) for work in works]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        self._drain()  # what was offered before

    def listen(self) -> None:
        """Commands are taken from now on, and told for which run they are to be signed."""
        self._identity = self._position.identity
        self._listening.set()

    async def close(self, drain_seconds: float) -> None:
        """Makes known what is still to be, for so long, and gives the place up."""
        until = asyncio.get_running_loop().time() + drain_seconds
        self._drain()
        self.settle_now.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while not self._desk.is_fenced and (
                    self._desk.has_done or not self._ledger.is_empty
                ):
                    await asyncio.sleep(0.005)
                for publisher in self._publishers.values():
                    await publisher.drain(drain_seconds)
        for publisher in self._publishers.values():
            await publisher.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A server that does not answer, or refuses, sees the lease expire.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._transport.release(self._lease)
        await self._transport.close()

    def drain_later(self) -> None:
        """Sends what lies in the outbox once it has gathered."""
        asyncio.get_running_loop().call_later(self._terms.gather_seconds, self._drain)

    async def trim(self, cursor: Mapping[Topic, str]) -> None:
        """Has the server forget the commands before a cursor."""
        for topic, entry_id in cursor.items():
            with contextlib.suppress(*_OUTAGE):
                await self._transport.trim(topic, entry_id)

    @property
    def num_dropped(self) -> int:
        """Telemetry and events that found no room on their way out."""
        return sum(publisher.num_dropped for publisher in self._publishers.values())

    # --- the place ------------------------------------------------------------------------------

    async def _take_place(self) -> None:
        self._time.learn(await self._transport.open())
        self._desk.open(
            Intake(
                self._position,
                self._transport.stream,
                keys=self._terms.keys,
                server_time=self._time,
                clock=self._terms.clock,
                gap_seconds=self._terms.gap_seconds,
            )
        )
        self._ledger = Ledger(
            self._holder, self._transport.stream, keys=self._terms.keys, server_time=self._time
        )
        await self._attach(first=True)

    async def _attach(self, *, first: bool) -> Attached:
        is_given = self._is_given or not first
        try:
            found = await self._transport.attach(
                self._holder,
                lease_seconds=self._terms.lease_seconds,
                least_epoch=self._position.epoch,
                cursor=self._position.cursor if is_given else None,
                should_take_over=self._terms.should_take_over and first,
                identity=self._identity,
                counts_attempts=first,
            )
        except LeaseHeldError as error:
            if first:
                raise
            words = f"run {self._transport.run!r} is driven by {error.holder} now"
            if error.epoch > self._lease.epoch:
                raise FencedError(f"{words}; this process must not go on", error.epoch) from None
            raise BusError(
                f"{words}, on a server that had forgotten this process, which takes no commands "
                "until the other one ends"
            ) from None
        self._time.learn(found.server_ms)
        self._lease: Lease = found.lease
        self._generation = found.generation
        self._taken = dict(found.cursor)
        self._ledger.restart()
        self._desk.arrive(found, is_given=is_given, is_again=not first)
        self.settle_now.set()
        return found

    async def _renew(self, *, lost: Lease | None = None) -> None:
        """Keeps the place, and takes it again where it was removed.

        Args:
          lost: a lease whose group is gone, if so.

        Raises:
          FencedError: another process drives the run now.
        """
        async with self._renewing:
            lease = self._lease
            if lost is not None and lost is not lease:
                return
            identity = self._identity
            try:
                found = await self._transport.renew(
                    lease,
                    lease_seconds=self._terms.lease_seconds,
                    identity=identity,
                    taken=self._taken,
                )
            except FencedError as error:
                if error.epoch > lease.epoch:
                    raise
                await self._retake()
            else:
                self._time.learn(found.server_ms)
                self._note_exhausted(found.exhausted)
                if lost is not None:
                    await self._retake()
            self._is_told = bool(identity)

    def _note_exhausted(self, topics: frozenset[Topic]) -> None:
        if new := topics - self._exhausted:
            words = exhausted_words(self._transport.stream(topic) for topic in sorted(new))
            self._alert("bus_stream_exhausted", f"commands do not reach the run any more: {words}")
        self._exhausted = topics

    async def _retake(self) -> None:
        generation = self._generation
        found = await self._attach(first=False)
        self._tell(self._announcement)
        if found.generation != generation:
            self.num_lost_servers += 1
            self._alert(
                "server_lost_its_memory",
                "the bus's server was restarted without its files or emptied; commands whose "
                "senders are gone are lost; switch append-only persistence on",
            )
        else:
            self._alert(
                "bus_place_lost",
                "streams, groups or other keys of the run were removed from the bus's server, as "
                "by a clean-up, an eviction or a failover, or a group was moved (XGROUP SETID); "
                "the run has made them anew and goes on from where it stood; commands removed "
                "before it had read them are lost; keep its keys (esper:{run}:*) out of clean-ups "
                "and scripts, and set maxmemory-policy to noeviction",
            )

    async def _repeat(self, work: _Work) -> None:
        """Works until another process takes over: a failure is told, and waits ever longer.

        Args:
          work: one round, after so many failures in a row.
        """
        failures = 0
        while not self._desk.is_fenced:
            lease = self._lease
            try:
                await work(failures)
                failures = 0
                continue
            except FencedError as error:
                failures += 1
                await self._lost(lease, error, failures)
            except Exception as error:
                # Whatever it is: training does not depend on the bus.
                failures += 1
                self._complain(error, failures)
            await asyncio.sleep(self._retry.delay_seconds(failures))

    async def _lost(self, lease: Lease, error: FencedError, failures: int) -> None:
        """The lease does not hold: another process, or a server that has lost it?"""
        try:
            if error.epoch > self._lease.epoch:
                raise error
            await self._renew(lost=lease)
        except FencedError as real:
            if real.epoch > self._lease.epoch:
                self._desk.lose(real)
        except Exception as other:
            self._complain(other, failures)

    def _complain(self, error: Exception, failures: int) -> None:
        if isinstance(error, BusUnavailableError):
            if failures == 1:
                _LOGGER.warning("the bus is away; the run goes on: %s", error)
            return
        if str(error) in self._complaints or len(self._complaints) >= _MAX_COMPLAINTS:
            return
        self._complaints.add(str(error))
        is_foreseen = isinstance(error, RedisError | EsperError)
        self._alert(
            "bus_refuses",
            f"the bus refuses the run, which goes on and tries again: {error}; check its user, "
            "password and access rules, and the keys of the run",
            cause=None if is_foreseen else error,
        )

    def _alert(self, name: str, words: str, *, cause: Exception | None = None) -> None:
        if not self._alerts.allows():
            return
        _LOGGER.error("%s: %s", name, words, exc_info=cause)
        self._tell(Alert(name=name, level="critical", words=words[:2_000], step=self._desk.step))

    # --- life -----------------------------------------------------------------------------------

    async def _live(self, failures: int) -> None:
        if not failures:
            await asyncio.sleep(self._terms.lease_seconds / 3)
        await self._renew()
        self._complaints.clear()
        run, desk = self._transport.run, self._desk
        self._tell(Heartbeat(run=run, step=desk.step, is_paused=desk.is_paused))

    @staticmethod
    def _task_ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOGGER.critical("a part of the bus has ended: %s", error, exc_info=error)

    # --- commands in ----------------------------------------------------------------------------

    async def _read(self, topic: Topic, failures: int) -> None:
        await self._listening.wait()
        if topic is not COMMAND_TOPICS[0]:
            await self._room.wait()
        if failures or not self._is_told:
            await self._renew()
        lease = self._lease
        if failures:
            # An answer that got lost has handed entries out that never came.
            found = await self._transport.claim(
                topic, lease.group, self._holder, idle_seconds=0.0, limit=20_000
            )
            await self._accept(topic, found, is_all=False)
        found = await self._transport.read(
            [topic], lease.group, self._holder, limit=_READ_LIMIT, wait_seconds=None
        )
        size_bytes = sum(delivery.size_bytes for delivery in found)
        is_all = len(found) < _READ_LIMIT and size_bytes < READ_BYTES
        await self._accept(topic, found, is_all=is_all)

    async def _accept(self, topic: Topic, found: list[Delivery], *, is_all: bool) -> None:
        for at in range(0, max(1, len(found)), _ACCEPTED_AT_ONCE):
            end = at + _ACCEPTED_AT_ONCE
            # First: what is settled from now on is not past it.
            if found:
                last = found[min(end, len(found)) - 1].entry_id
                self._taken[topic] = max(self._taken.get(topic, last), last, key=order)
            if not self._desk.accept(topic, found[at:end], is_all=is_all and end >= len(found)):
                self._room.clear()
            # What is set aside at once must be made known at once.
            if self._desk.has_done:
                self.settle_now.set()
            # The loop that trains gets its turn at the lock and at the interpreter.
            await asyncio.sleep(0)
        self._gaps.set()

    async def _watch_gaps(self, failures: int) -> None:
        left = self._desk.expire_gaps()
        if left is None:
            self._gaps.clear()
            await self._gaps.wait()
            self._gaps.clear()
        else:
            self.settle_now.set()
            await asyncio.sleep(left)

    # --- words out ------------------------------------------------------------------------------

    async def _settle(self, failures: int) -> None:
        if not failures:
            await self.settle_now.wait()
        self.settle_now.clear()
        while (settlement := self._next_settlement()) is not None:
            await self._transport.settle(self._lease, settlement)
            await self._settled(settlement)

    def _next_settlement(self) -> Settlement | None:
        if self._ledger.current is None:
            done, cursor, sequences, has_room = self._desk.collect()
            if has_room:
                self._room.set()
            self._ledger.enter(done, cursor, sequences)
        return self._ledger.current

    async def _settled(self, settlement: Settlement) -> None:
        count = self._ledger.settled()
        self.num_settled += count
        self._settled_since_trim += count
        if not self.keeps_commands and self._settled_since_trim >= _TRIM_EVERY:
            self._settled_since_trim = 0
            await self.trim(settlement.cursor)

    def _tell(self, message: Message) -> None:
        self._publishers[message.topic].offer(message)

    def _drain(self) -> None:
        for topic, messages in self._desk.empty_outbox().items():
            self._publishers[topic].offer_all(messages)
