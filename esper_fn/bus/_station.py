"""A run's place on the bus, without JAX: a thread that talks, and calls that never wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from secrets import token_hex
from types import TracebackType

from redis.exceptions import RedisError

from esper_fn.bus._connect import LoopThread
from esper_fn.bus._intake import Intake, Taken
from esper_fn.bus._ledger import Ledger
from esper_fn.bus._messages import Alert, Announcement, Heartbeat, Message, Outcome
from esper_fn.bus._position import RunPosition
from esper_fn.bus._publisher import Publisher, ServerTime
from esper_fn.bus._resilience import Clock, Retry
from esper_fn.bus._signing import NO_KEYS, Keyring
from esper_fn.bus._topics import COMMAND_TOPICS, Topic
from esper_fn.bus._transport import Attached, Delivery, Lease, LeaseHeldError, Settlement, Transport
from esper_fn.errors import BusUnavailableError, FencedError

_LOG = logging.getLogger(__name__)
_OUTAGE = (BusUnavailableError, RedisError)
_MAX_INBOX = 2_048
_READ_LIMIT = 256
_ACCEPTED_AT_ONCE = 32
_TRIM_EVERY = 512


class Station:
    """Takes commands for a run and sends what it has to tell.

    `take`, `finish`, `flush` and `offer` belong to the training loop: they touch memory only, and
    never wait for a server. A thread of its own does all the talking.

    Args:
      transport: makes the transport, inside that thread.
      announcement: what the run serves.
      position: what is in force already, from a checkpoint; nothing where left out.
      keys: to verify commands with and to sign.
      lease_seconds: without a sign of life for so long, another process may take over.
      should_take_over: even from a living one.
      keeps_commands: commands in force stay on the server until `kept_from` allows to forget them.
      max_telemetry: messages kept while the server is slow or away; older ones are dropped.
      max_events: the same for events.
      gap_seconds: how long a missing number of a producer is waited for.
      gather_seconds: how long telemetry and events gather before they go out together: each
        publication takes time from the processor that trains.
      clock: seconds, rising.
    """

    def __init__(
        self,
        transport: Callable[[], Transport],
        announcement: Announcement,
        *,
        position: RunPosition | None = None,
        keys: Keyring = NO_KEYS,
        lease_seconds: float = 6.0,
        should_take_over: bool = False,
        keeps_commands: bool = False,
        max_telemetry: int = 10_000,
        max_events: int = 20_000,
        gap_seconds: float = 1.0,
        gather_seconds: float = 0.1,
        clock: Clock = time.monotonic,
    ) -> None:
        self._make = transport
        self._announcement = announcement
        self._keys = keys
        self._lease_seconds = lease_seconds
        self._should_take_over = should_take_over
        self._keeps = keeps_commands
        self._clock = clock
        self._time = ServerTime(clock)
        self._retry = Retry()
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{token_hex(4)}"
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._was_given = position is not None
        self._position = RunPosition() if position is None else position.copy()
        self._intake: Intake | None = None
        self._gap_seconds = gap_seconds
        self._gather_seconds = gather_seconds
        self._limits = {Topic.TELEMETRY: max_telemetry, Topic.EVENTS: max_events}
        self._outbox: dict[Topic, deque[Message]] = {
            topic: deque(maxlen=limit) for topic, limit in self._limits.items()
        }
        self._publishers: dict[Topic, Publisher] = {}
        self._is_draining = False
        self._num_dropped = 0
        self._thread: LoopThread | None = None
        self._fenced: FencedError | None = None
        self._step = -1
        self._is_paused = False
        self._settled_since_trim = 0
        self.num_settled = 0
        self.num_lost_servers = 0

    # --- from outside ---------------------------------------------------------------------------

    def start(self) -> None:
        """Takes the run's place.

        Raises:
          BusUnavailableError: no server.
          BusSecurityError: a server others can reach, without a key.
          LeaseHeldError: another process drives the run.
        """
        self._thread = LoopThread("esper-bus")
        try:
            self._thread.call(self._open())
        except BaseException:
            self._thread.close()
            raise

    def take(self, step: int, limit: int) -> list[Taken]:
        """Commands whose turn it is, at most `limit`.

        Raises:
          FencedError: another process has taken over.
        """
        with self._lock:
            if self._fenced is not None:
                raise self._fenced
            self._step = step
            intake = self._intake
            if intake is None or not intake.has_ready:
                return []
            taken = intake.take(limit)
        self.flush()
        return taken

    def put_back(self, taken: Iterable[Taken]) -> None:
        """Returns commands that did not fit."""
        with self._lock:
            self._held().put_back(taken)

    def finish(self, taken: Taken, outcome: Outcome) -> None:
        """Notes what became of a command."""
        with self._lock:
            self._held().finish(taken, outcome)

    def flush(self) -> None:
        """Has the thread make known what was finished; without that, it is left to sleep."""
        if self._thread is not None and self._intake is not None and self._intake.has_done:
            self._thread.soon(self._settle_now.set)

    def offer(self, messages: Iterable[Message]) -> None:
        """Sends telemetry and events when the server can take them; the oldest go before that."""
        with self._lock:
            for message in messages:
                box = self._outbox[message.topic]
                self._num_dropped += len(box) == box.maxlen
                box.append(message)
            if self._is_draining or self._thread is None:
                return
            self._is_draining = True
        self._thread.soon(self._drain_later)

    def wait(self, seconds: float | None) -> None:
        """Sleeps until a command is there, for a paused loop."""
        with self._changed:
            if self._fenced is None and not (self._intake and self._intake.has_ready):
                self._changed.wait(seconds)

    def set_paused(self, is_paused: bool) -> None:
        """For heartbeats."""
        self._is_paused = is_paused

    def position(self) -> RunPosition:
        """What is in force now; between steps it belongs to the state of training."""
        with self._lock:
            return self._position.copy()

    def kept_from(self, position: RunPosition) -> None:
        """The oldest checkpoint kept stands there: commands before it may be forgotten."""
        cursor = dict(position.cursor)
        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._trim(cursor), self._thread.loop)

    @property
    def num_dropped(self) -> int:
        """Telemetry and events dropped so far."""
        return self._num_dropped + sum(p.num_dropped for p in self._publishers.values())

    @property
    def num_waiting(self) -> int:
        """Commands that wait for their turn."""
        return 0 if self._intake is None else self._intake.num_waiting

    @property
    def counts(self) -> dict[str, int]:
        """Messages set aside and duplicates, by reason."""
        return {} if self._intake is None else dict(self._intake.counts)

    @property
    def is_fenced(self) -> bool:
        """Whether another process has taken over."""
        return self._fenced is not None

    def close(self, drain_seconds: float = 2.0) -> None:
        """Makes known what is still to be, for so long, and gives the place up."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            thread.call(self._finish(drain_seconds), drain_seconds + 10)
        finally:
            thread.close()

    def __enter__(self) -> Station:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- in the thread --------------------------------------------------------------------------

    async def _open(self) -> None:
        self._settle_now = asyncio.Event()
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
        for topic in self._outbox:
            self._publishers[topic] = Publisher(
                self._transport,
                topic,
                keys=self._keys,
                server_time=self._time,
                max_waiting=self._limits[topic],
                clock=self._clock,
            )
        self._tell(self._announcement)
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                *(self._read(topic) for topic in COMMAND_TOPICS),
                self._settle(),
                self._live(),
                self._watch_gaps(),
            )
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    async def _take_place(self) -> None:
        self._time.learn(await self._transport.open())
        self._intake = Intake(
            self._position,
            self._transport.stream,
            keys=self._keys,
            server_time=self._time,
            clock=self._clock,
            gap_seconds=self._gap_seconds,
        )
        self._ledger = Ledger(
            self._holder, self._transport.stream, keys=self._keys, server_time=self._time
        )
        await self._attach(first=True)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("the run's place on the bus is lost: %s", error, exc_info=error)
            fenced = error if isinstance(error, FencedError) else FencedError(str(error))
            self._lose(fenced)

    async def _attach(self, *, first: bool) -> None:
        given = self._was_given or not first
        try:
            found = await self._transport.attach(
                self._holder,
                lease_seconds=self._lease_seconds,
                least_epoch=self._position.epoch,
                cursor=self._position.cursor if given else None,
                should_take_over=self._should_take_over and first,
            )
        except LeaseHeldError as error:
            if first:
                raise
            raise FencedError(
                f"run {self._transport.run!r} is driven by {error.holder} now; this process must "
                "not go on"
            ) from None
        self._time.learn(found.server_ms)
        self._lease: Lease = found.lease
        self._ledger.restart()
        with self._lock:
            self._arrive(found, given=given)
        self._settle_now.set()

    def _arrive(self, found: Attached, *, given: bool) -> None:
        intake = self._held()
        self._position.epoch = found.lease.epoch
        if not given:
            self._position.cursor.update(found.cursor)
        known, undone = ({}, found.sequences) if given else (found.sequences, {})
        intake.restart(found.attempts, known, undone)
        intake.accept(found.leftovers)

    async def _read(self, topic: Topic) -> None:
        failures = 0
        while self._fenced is None:
            if topic is not COMMAND_TOPICS[0]:
                await self._room.wait()
            lease = self._lease
            try:
                if failures:
                    # An answer that got lost has handed entries out that never came.
                    await self._renew()
                    lease = self._lease
                    found = await self._transport.claim(
                        topic, lease.group, self._holder, idle_seconds=0.0, limit=20_000
                    )
                    await self._accept(topic, found, is_all=False)
                    failures = 0
                found = await self._transport.read(
                    [topic], lease.group, self._holder, limit=_READ_LIMIT, wait_seconds=None
                )
            except FencedError as error:
                if lease is self._lease:
                    await self._lost(error)
                continue
            except _OUTAGE as error:
                failures += 1
                if failures == 1:
                    _LOG.warning("commands cannot be read: %s", error)
                await asyncio.sleep(self._retry.delay_seconds(failures))
                continue
            await self._accept(topic, found, is_all=len(found) < _READ_LIMIT)

    async def _accept(self, topic: Topic, found: list[Delivery], *, is_all: bool) -> None:
        for at in range(0, max(1, len(found)), _ACCEPTED_AT_ONCE):
            with self._changed:
                intake = self._held()
                intake.accept(found[at : at + _ACCEPTED_AT_ONCE])
                if is_all and at + _ACCEPTED_AT_ONCE >= len(found):
                    intake.drained(topic)
                if intake.num_waiting >= _MAX_INBOX:
                    self._room.clear()
                self._changed.notify_all()
                is_done = intake.has_done
            # What is set aside at once must be made known at once.
            if is_done:
                self._settle_now.set()
            # The loop that trains gets its turn at the lock and at the interpreter.
            await asyncio.sleep(0)
        self._gaps.set()

    async def _lost(self, error: FencedError) -> None:
        """The lease does not hold: another process, or a server without memory?"""
        try:
            await self._renew()
        except FencedError as real:
            self._lose(real)
        except _OUTAGE:
            await asyncio.sleep(self._retry.delay_seconds(1))
        else:
            _LOG.debug("the lease was renewed after: %s", error)

    def _lose(self, error: FencedError) -> None:
        with self._changed:
            self._fenced = error
            self._changed.notify_all()

    async def _renew(self) -> None:
        async with self._renewing:
            await self._renew_alone()

    async def _renew_alone(self) -> None:
        lease = self._lease
        try:
            server_ms = await self._transport.renew(lease, lease_seconds=self._lease_seconds)
        except FencedError as error:
            if error.epoch >= lease.epoch:
                raise
            _LOG.error("the bus's server has lost its memory; taking the place anew")
            with self._lock:
                self._held().forget_entries()
            await self._attach(first=False)
            self.num_lost_servers += 1
            self._tell(self._announcement)
            self._tell(
                Alert(
                    name="server_lost_its_memory",
                    level="critical",
                    words="the bus's server was restarted without its files or emptied; commands "
                    "whose senders are gone are lost; switch append-only persistence on",
                    step=self._step,
                )
            )
        else:
            self._time.learn(server_ms)

    async def _live(self) -> None:
        failures = 0
        while self._fenced is None:
            wait = self._lease_seconds / 3 if not failures else self._retry.delay_seconds(failures)
            await asyncio.sleep(wait)
            try:
                await self._renew()
            except FencedError as error:
                self._lose(error)
                return
            except _OUTAGE:
                failures += 1
                continue
            failures = 0
            self._tell(
                Heartbeat(run=self._transport.run, step=self._step, is_paused=self._is_paused)
            )

    async def _watch_gaps(self) -> None:
        while self._fenced is None:
            with self._changed:
                left = self._held().expire_gaps()
                self._changed.notify_all()
            if left is None:
                self._gaps.clear()
                await self._gaps.wait()
                self._gaps.clear()
            else:
                self._settle_now.set()
                await asyncio.sleep(left)

    async def _settle(self) -> None:
        failures = 0
        while True:
            await self._settle_now.wait()
            self._settle_now.clear()
            while (settlement := self._next_settlement()) is not None:
                lease = self._lease
                try:
                    await self._transport.settle(lease, settlement)
                except FencedError as error:
                    if lease is self._lease:
                        await self._lost(error)
                    if self._fenced is not None:
                        return
                except _OUTAGE:
                    failures += 1
                    await asyncio.sleep(self._retry.delay_seconds(failures))
                else:
                    failures = 0
                    await self._settled(settlement)

    def _next_settlement(self) -> Settlement | None:
        if self._ledger.current is None:
            with self._lock:
                intake = self._held()
                done = intake.collect()
                if intake.num_waiting < _MAX_INBOX // 2:
                    self._room.set()
                sequences, cursor = dict(self._position.changed), dict(self._position.cursor)
                self._position.changed.clear()
            self._ledger.enter(done, cursor, sequences)
        return self._ledger.current

    async def _settled(self, settlement: Settlement) -> None:
        count = self._ledger.settled()
        self.num_settled += count
        self._settled_since_trim += count
        if not self._keeps and self._settled_since_trim >= _TRIM_EVERY:
            self._settled_since_trim = 0
            await self._trim(dict(settlement.cursor))

    async def _trim(self, cursor: dict[Topic, str]) -> None:
        for topic, entry_id in cursor.items():
            with contextlib.suppress(*_OUTAGE):
                await self._transport.trim(topic, entry_id)

    def _tell(self, message: Message) -> None:
        self._publishers[message.topic].offer(message)

    def _drain_later(self) -> None:
        asyncio.get_running_loop().call_later(self._gather_seconds, self._drain)

    def _drain(self) -> None:
        with self._lock:
            self._is_draining = False
            boxes = {topic: list(box) for topic, box in self._outbox.items() if box}
            for topic in boxes:
                self._outbox[topic].clear()
        for topic, messages in boxes.items():
            self._publishers[topic].offer_all(messages)

    async def _finish(self, drain_seconds: float) -> None:
        until = asyncio.get_running_loop().time() + drain_seconds
        self._drain()
        self._settle_now.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while self._fenced is None and not self._is_settled():
                    await asyncio.sleep(0.005)
                for publisher in self._publishers.values():
                    await publisher.drain(drain_seconds)
        for publisher in self._publishers.values():
            await publisher.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(*_OUTAGE):
            async with asyncio.timeout(1.0):
                await self._transport.release(self._lease)
        await self._transport.close()

    def _is_settled(self) -> bool:
        with self._lock:
            return not self._held().has_done and self._ledger.is_empty

    def _held(self) -> Intake:
        if self._intake is None:
            raise BusUnavailableError("the station was not started; use it as a context")
        return self._intake
