"""A worker's session with the server: its lease, and everything that the worker publishes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from secrets import token_hex

from redis.exceptions import RedisError

from esper_fn.bus._envelope import Link
from esper_fn.bus._messages import Alert, Announcement, Heartbeat, Message, Topic
from esper_fn.bus._outbox import Publisher, Settlements
from esper_fn.bus._position import RunPosition
from esper_fn.bus._signing import NO_KEYS, Keyring
from esper_fn.bus._timing import RateLimiter, retry_seconds
from esper_fn.bus._transport import (
    BEGINNING,
    OUTAGES,
    READ_BYTES,
    Attachment,
    Delivery,
    Lease,
    LeaseRequest,
    Settlement,
    Transport,
    entry_key,
    exhausted_text,
)
from esper_fn.errors import BusError, BusUnavailableError, EsperError, FencedError, LeaseHeldError

_LOGGER = logging.getLogger(__name__)
_MAX_COMPLAINTS = 100
_READ_LIMIT = 256
Work = Callable[[int], Awaitable[None]]
"""One round of a task, after so many failures in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerOptions:
    """The settings of a worker.

    Attributes:
      keys: keys to verify commands with and to sign with.
      lease_seconds: another process may take over after so long without a sign of this one.
      should_take_over: take the lease from an active process too.
      outbox_limits: most messages of a topic that wait for a slow server; the oldest are dropped.
    """

    keys: Keyring = NO_KEYS
    lease_seconds: float = 6.0
    should_take_over: bool = False
    outbox_limits: Mapping[Topic, int] = field(
        default_factory=lambda: {Topic.TELEMETRY: 10_000, Topic.EVENTS: 20_000}
    )


@dataclass(slots=True)
class Progress:
    """What heartbeats and alerts say of the training loop."""

    step: int = -1
    is_paused: bool = False


class Session:
    """Keeps the lease of a run and publishes what the run reports. All calls are of one thread.

    Args:
      transport: the transport of the run.
      announcement: what the run serves.
      position: position of the run.
      options: settings of the worker.
      progress: state of the training loop, for heartbeats.
      on_attach: called with each new lease, and whether it is the first one.
      on_fenced: called once another process has taken over; see `fenced`.
    """

    def __init__(
        self,
        transport: Transport,
        announcement: Announcement,
        position: RunPosition,
        options: WorkerOptions,
        progress: Progress,
        *,
        on_attach: Callable[[Attachment, bool], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self.transport = transport
        self.link = Link(transport, options.keys)
        self._announcement = announcement
        self._position = position
        self._options = options
        self._progress = progress
        self._on_attach = on_attach
        self._on_fenced = on_fenced
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{token_hex(4)}"
        self.lease = Lease("", 0, 0.0)
        self.last_read: dict[Topic, str] = {}
        """The last entry of each command stream that was read with this lease."""
        self.identity = ""
        """Identity of the run once it accepts commands."""
        self.is_identity_published = False
        self.fenced: FencedError | None = None
        """Why this worker must not go on."""
        self.num_data_losses = 0
        self._generation = ""
        self._exhausted: frozenset[Topic] = frozenset()
        self._renewing = asyncio.Lock()
        self._complaints: set[str] = set()
        """Complaints since the last renewal."""
        self._alerts = RateLimiter(per_second=0.1, burst=5)
        self.settlements = Settlements(self.link, self.holder)
        self._tasks: list[asyncio.Task[None]] = []
        self._publishers = {
            topic: Publisher(self.link, topic, max_queued=limit)
            for topic, limit in options.outbox_limits.items()
        }

    def publish(self, message: Message) -> None:
        """Queues telemetry or an event; never waits."""
        self._publishers[message.topic].offer([message])

    async def drain(self, seconds: float) -> None:
        """Waits until all is published, at most so long for each topic."""
        for publisher in self._publishers.values():
            await publisher.drain(seconds)

    @property
    def num_dropped(self) -> int:
        """Messages that were dropped because too many waited."""
        return sum(publisher.num_dropped for publisher in self._publishers.values())

    async def close(self) -> None:
        """Stops all tasks, ends the lease and disconnects."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for publisher in self._publishers.values():
            await publisher.close()
        try:
            async with asyncio.timeout(1.0):
                await self.transport.release(self.lease)
        except Exception as error:
            _LOGGER.debug("the lease is left to expire: %s", error)
        await self.transport.close()

    async def open(self, *, uses_position: bool) -> None:
        """Connects and takes the lease of the run.

        Args:
          uses_position: start at the cursor of the position, instead of the server's.

        Raises:
          BusUnavailableError: there is no server.
          BusSecurityError: other machines can reach the server, and there is no key.
          LeaseHeldError: another process has the lease.
        """
        try:
            await self.link.open()
            await self._attach(self._position.cursor if uses_position else None)
        except BaseException:
            await self.transport.close()
            raise

    async def _attach(self, cursor: Mapping[Topic, str] | None) -> None:
        """Takes the lease of the run.

        Raises:
          LeaseHeldError: another process has the lease, at the first time.
          FencedError: another process has a newer lease.
          BusError: another process has a lease that is not newer.
        """
        is_first = not self.lease.epoch
        try:
            attachment = await self.transport.attach(
                LeaseRequest(
                    self.holder,
                    self._options.lease_seconds,
                    least_epoch=self._position.epoch,
                    cursor=cursor,
                    should_take_over=self._options.should_take_over and is_first,
                    identity=self.identity,
                    counts_attempts=is_first,
                )
            )
        except LeaseHeldError as error:
            if is_first:
                raise
            text = f"run {self.transport.run!r} is driven by {error.holder} now"
            if error.epoch > self.lease.epoch:
                raise FencedError(f"{text}; this process must not go on", error.epoch) from None
            raise BusError(
                f"{text}, on a server that had lost the data of this process, which takes no "
                "commands until the other one ends"
            ) from None
        self.link.time.update(attachment.server_ms)
        self.lease = attachment.lease
        self._generation = attachment.generation
        self.last_read = dict(attachment.cursor)
        self.settlements.restart()
        self._on_attach(attachment, is_first)
        self.publish(self._announcement)

    async def renew(self, lost: Lease | None = None) -> None:
        """Renews the lease, or takes a new one if the server has lost it.

        Args:
          lost: a lease whose consumer group is gone.

        Raises:
          FencedError: another process drives the run now.
        """
        async with self._renewing:
            lease, identity = self.lease, self.identity
            if lost is not None and lost is not lease:
                return
            try:
                renewal = await self.transport.renew(
                    lease, identity=identity, last_read=self.last_read
                )
            except FencedError as error:
                if error.epoch > lease.epoch:
                    raise
                await self._attach_again()
            else:
                self.link.time.update(renewal.server_ms)
                self._report_exhausted(renewal.exhausted)
                if lost is not None:
                    await self._attach_again()
            self.is_identity_published = bool(identity)

    async def receive(self, topic: Topic, failures: int) -> tuple[list[Delivery], bool]:
        """Reads commands of a topic; returns them, and whether the stream has no more."""
        if failures or not self.is_identity_published:
            await self.renew()
        lease, transport = self.lease, self.transport
        # A lost answer may have delivered entries that never arrived.
        deliveries = await transport.claim(lease, topic) if failures else []
        is_all = False
        if not deliveries:
            deliveries = await transport.read(lease, topic, limit=_READ_LIMIT, wait_seconds=None)
            size_bytes = sum(delivery.size_bytes for delivery in deliveries)
            is_all = len(deliveries) < _READ_LIMIT and size_bytes < READ_BYTES
        if deliveries:
            # Before the consumer gets them: no later entry is settled from now on.
            ids = (self.last_read.get(topic, BEGINNING), deliveries[-1].entry_id)
            self.last_read[topic] = max(ids, key=entry_key)
        return deliveries, is_all

    async def settle(self, settlement: Settlement) -> int:
        """Makes a settlement; returns how many entries it acknowledged."""
        await self.transport.settle(self.lease, settlement)
        return self.settlements.complete()

    async def trim(self, cursor: Mapping[Topic, str]) -> None:
        """Removes the commands before a cursor, if the server can."""
        for topic, entry_id in cursor.items():
            with contextlib.suppress(*OUTAGES):
                await self.transport.trim(topic, entry_id)

    async def _heartbeat(self, failures: int) -> None:
        """Renews the lease after a third of its time, and says so."""
        if not failures:
            await asyncio.sleep(self._options.lease_seconds / 3)
        await self.renew()
        self._complaints.clear()
        self.publish(Heartbeat(run=self.transport.run, **asdict(self._progress)))

    async def _attach_again(self) -> None:
        generation = self._generation
        await self._attach(self._position.cursor)
        if self._generation != generation:
            self.num_data_losses += 1
            self._alert(
                "bus_data_lost",
                "the bus's server was restarted without its files or emptied; commands whose "
                "senders are gone are lost; switch append-only persistence on",
            )
        else:
            self._alert(
                "bus_lease_lost",
                "streams, groups or other keys of the run were removed from the bus's server, as "
                "by a clean-up, an eviction or a failover, or a group was moved (XGROUP SETID); "
                "the run has made them again and goes on from its position; commands removed "
                "before it had read them are lost; keep its keys (esper:{run}:*) out of clean-ups "
                "and scripts, and set maxmemory-policy to noeviction",
            )

    def _report_exhausted(self, topics: frozenset[Topic]) -> None:
        if new := topics - self._exhausted:
            text = exhausted_text(self.transport.stream(topic) for topic in sorted(new))
            self._alert("bus_stream_exhausted", f"commands do not reach the run any more: {text}")
        self._exhausted = topics

    def start(self, works: Iterable[Work]) -> None:
        """Starts tasks, each of which repeats its work, and the heartbeat."""
        for work in (*works, self._heartbeat):
            task = asyncio.create_task(self._repeat(work))
            task.add_done_callback(_report_end)
            self._tasks.append(task)

    async def _repeat(self, work: Work) -> None:
        """Repeats a task until another process takes over; failures are reported and wait longer.

        Whatever fails, training does not depend on the bus.
        """
        failures = 0
        while self.fenced is None:
            lease = self.lease
            try:
                await work(failures)
            except FencedError as error:
                failures += 1
                await self._verify_lease(lease, error, failures)
            except Exception as error:
                failures += 1
                self._complain(error, failures)
            else:
                failures = 0
                continue
            await asyncio.sleep(retry_seconds(failures))

    async def _verify_lease(self, lease: Lease, error: FencedError, failures: int) -> None:
        """Finds out who refused a lease: another process, or a server that has lost it."""
        try:
            if error.epoch > self.lease.epoch:
                raise error
            await self.renew(lease)
        except FencedError as newer:
            if newer.epoch > self.lease.epoch:
                self.fenced = newer
                self._on_fenced()
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
        is_expected = isinstance(error, RedisError | EsperError)
        self._alert(
            "bus_refuses",
            f"the bus refuses the run, which goes on and tries again: {error}; check its user, "
            "password and access rules, and the keys of the run",
            cause=None if is_expected else error,
        )

    def _alert(self, name: str, text: str, *, cause: Exception | None = None) -> None:
        if not self._alerts.allows():
            return
        _LOGGER.error("%s: %s", name, text, exc_info=cause)
        step = self._progress.step
        self.publish(Alert(name=name, level="critical", text=text[:2_000], step=step))


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOGGER.critical("a part of the bus has ended: %s", error, exc_info=error)
