"""A worker: receives commands for a training loop and publishes what the loop reports."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from secrets import token_hex

from esper_fn.bus._connect import LoopThread
from esper_fn.bus._consumer import Consumer, InFlight
from esper_fn.bus._messages import COMMAND_TOPICS, Announcement, Message, Outcome, Topic
from esper_fn.bus._position import RunPosition
from esper_fn.bus._session import Progress, Session, Work, WorkerOptions
from esper_fn.bus._transport import Attachment, Settlement, Transport
from esper_fn.errors import BusUnavailableError

_MAX_INBOX = 2_048
_ACCEPTED_AT_ONCE = 32
_TRIM_EVERY = 512
_GATHER_SECONDS = 0.2
"""Telemetry and events gather for so long before they are published together, as each publication
takes processor time from training."""
Report = Callable[[], Iterable[Message]]
"""Makes messages when they are published, in the I/O thread."""


class Worker:
    """Receives commands for a run and publishes its outcomes, telemetry and events.

    The training loop calls `take`, `put_back`, `finish`, `flush` and `offer`, which touch memory
    only and never wait for a server. An I/O thread talks to the server. One lock guards what both
    share: the consumer with its position, and the outbox.

    Args:
      transport: makes the transport, in the I/O thread.
      announcement: what the run serves.
      position: position of the run in a checkpoint; by default nothing is applied.
      options: settings.
    """

    def __init__(
        self,
        transport: Callable[[], Transport],
        announcement: Announcement,
        *,
        position: RunPosition | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        self._make_transport = transport
        self._announcement = announcement
        self._options = options or WorkerOptions()
        self._is_restored = position is not None
        self._position = RunPosition() if position is None else position.copy()
        self._position.identity = self._position.identity or token_hex(16)
        self._changed = threading.Condition()
        self._outbox: dict[Topic, deque[Message | Report]] = {
            topic: deque(maxlen=limit) for topic, limit in self._options.outbox_limits.items()
        }
        self._is_drain_due = False
        self._finished: deque[tuple[InFlight, Outcome]] = deque()
        """Finished by the loop, which takes no lock for it, and not known to the consumer yet."""
        self._num_dropped = 0
        self._thread: LoopThread | None = None
        self._num_untrimmed = 0
        self.keeps_commands = False
        """Applied commands stay on the server until `trim`, for a run that may be restored."""
        self.progress = Progress()
        self.num_settled = 0
        """Entries that the server knows to be acknowledged."""
        self._prepare()

    def _prepare(self) -> None:
        """Makes what talks to the server anew, as a failed start has closed it."""
        self._settle_due, self._has_room = asyncio.Event(), asyncio.Event()
        self._gaps_due, self._listening = asyncio.Event(), asyncio.Event()
        self._has_room.set()
        self._session = Session(
            self._make_transport(),
            self._announcement,
            self._position,
            self._options,
            self.progress,
            on_attach=self._on_attach,
            on_fenced=self._on_fenced,
        )
        self._consumer = Consumer(self._position, self._session.link)

    def start(self, *, is_listening: bool = True) -> None:
        """Connects and takes the lease of the run.

        Args:
          is_listening: accept commands; otherwise `listen` begins to, for a run that may be
            restored to another position first.

        Raises:
          BusUnavailableError: there is no server.
          BusSecurityError: other machines can reach the server, and there is no key.
          LeaseHeldError: another process drives the run.
        """
        self._prepare()
        if is_listening:
            self._listen()
        self._thread = LoopThread("esper-bus")
        try:
            self._thread.call(self._open())
        except BaseException:
            self._thread.close()
            self._thread = None
            raise

    def listen(self) -> None:
        """Begins to accept commands, unless `start` did."""
        if self._thread is not None and not self._listening.is_set():
            self._thread.soon(self._listen)

    def close(self, drain_seconds: float = 2.0) -> None:
        """Publishes what is left, at most for so long, and ends the lease."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            thread.call(self._close(drain_seconds), drain_seconds + 10)
        finally:
            thread.close()

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def trim(self, cursor: Mapping[Topic, str]) -> None:
        """Lets the server remove commands before a cursor: no earlier position is restored."""
        if self._thread is not None:
            work = self._session.trim(dict(cursor))
            asyncio.run_coroutine_threadsafe(work, self._thread.loop)

    def position(self) -> RunPosition:
        """A copy of the position; between two steps it belongs to the state of training."""
        with self._changed:
            self._updated_consumer()
            return self._position.copy()

    @property
    def is_fenced(self) -> bool:
        """Whether another process has taken over."""
        return self._session.fenced is not None

    @property
    def num_waiting(self) -> int:
        """Commands that wait to be taken."""
        return self._consumer.num_waiting

    @property
    def counts(self) -> dict[str, int]:
        """Refused and repeated messages by reason."""
        return dict(self._consumer.counts)

    @property
    def num_dropped(self) -> int:
        """Telemetry and events that were dropped."""
        return self._num_dropped + self._session.num_dropped

    def take(self, step: int, limit: int) -> list[InFlight]:
        """Returns at most `limit` commands to apply.

        Raises:
          FencedError: another process has taken over.
        """
        with self._changed:
            if self._session.fenced is not None:
                raise self._session.fenced
            self.progress.step = step
            items = self._updated_consumer().take(limit) if self.has_news else []
        self.flush()  # some may have been refused
        return items

    @property
    def has_news(self) -> bool:
        """Whether `take` would return commands, or raise; takes no lock."""
        return self.is_fenced or self._consumer.has_ready

    def put_back(self, items: Iterable[InFlight]) -> None:
        """Returns commands to the front of the inbox."""
        with self._changed:
            self._updated_consumer().put_back(items)

    def finish(self, item: InFlight, outcome: Outcome) -> None:
        """Records the outcome of a command; takes no lock."""
        self._finished.append((item, outcome))

    def flush(self, wait_seconds: float = 0.0) -> None:
        """Wakes the I/O thread to publish outcomes, if there are any.

        Args:
          wait_seconds: sleep at most so long until it has collected them. The sleep yields the
            interpreter, which the thread may otherwise get milliseconds later.
        """
        if self._thread is None or not self._has_acks:
            return
        self._thread.soon(self._settle_due.set)
        if wait_seconds:
            with self._changed:
                self._changed.wait_for(lambda: not self._has_acks or self.is_fenced, wait_seconds)

    def offer(self, messages: Iterable[Message | Report]) -> None:
        """Queues telemetry and events; the oldest are dropped if too many wait.

        A report is telemetry that is made in the I/O thread.
        """
        with self._changed:
            for item in messages:
                topic = item.topic if isinstance(item, Message) else Topic.TELEMETRY
                box = self._outbox[topic]
                self._num_dropped += len(box) == box.maxlen
                box.append(item)
            was_due, self._is_drain_due = self._is_drain_due, True
        if self._thread is not None and not was_due:
            self._thread.soon(self._thread.loop.call_later, _GATHER_SECONDS, self._drain)

    def wait(self, seconds: float | None) -> None:
        """Sleeps until there are commands, for a loop that is paused."""
        with self._changed:
            self._changed.wait_for(lambda: self.has_news, seconds)

    @property
    def _has_acks(self) -> bool:
        return bool(self._finished or self._consumer.acks)

    def _updated_consumer(self) -> Consumer:
        """The consumer after all that the loop has finished; the caller has the lock."""
        if not self._session.lease.epoch:
            raise BusUnavailableError("the worker was not started; use it as a context")
        while self._finished:
            self._consumer.finish(*self._finished.popleft())
        return self._consumer

    async def _open(self) -> None:
        await self._session.open(uses_position=self._is_restored)
        reads: list[Work] = [partial(self._read, topic) for topic in COMMAND_TOPICS]
        self._session.start([*reads, self._settle, self._expire_gaps])
        self._drain()  # what was offered before

    def _listen(self) -> None:
        self._session.identity = self._position.identity
        self._listening.set()

    def _on_attach(self, attachment: Attachment, is_first: bool) -> None:
        with self._changed:
            consumer, position = self._updated_consumer(), self._position
            position.epoch = attachment.lease.epoch
            consumer.reset_streams(attachment.lost)
            if not is_first:
                # The server may have lost what it knew.
                position.changes = {**position.sequences, **position.changes}
            else:
                consumer.restart(attachment, is_restored=self._is_restored)
            consumer.accept(attachment.leftovers)
        self._settle_due.set()

    def _on_fenced(self) -> None:
        with self._changed:
            self._changed.notify_all()

    async def _read(self, topic: Topic, failures: int) -> None:
        await self._listening.wait()
        if topic is not Topic.URGENT:
            await self._has_room.wait()
        deliveries, is_all = await self._session.receive(topic, failures)
        for first in range(0, max(1, len(deliveries)), _ACCEPTED_AT_ONCE):
            with self._changed:
                consumer = self._updated_consumer()
                consumer.accept(deliveries[first : first + _ACCEPTED_AT_ONCE])
                if is_all and first + _ACCEPTED_AT_ONCE >= len(deliveries):
                    consumer.note_empty(topic)
                if consumer.num_waiting >= _MAX_INBOX:
                    self._has_room.clear()
                self._changed.notify_all()
            if self._has_acks:  # refused messages are published at once
                self._settle_due.set()
            # The training loop gets its turn at the lock and at the interpreter.
            await asyncio.sleep(0)
        self._gaps_due.set()

    async def _expire_gaps(self, failures: int) -> None:
        del failures
        with self._changed:
            seconds = self._updated_consumer().expire_gaps()
            self._changed.notify_all()
        if seconds is None:
            self._gaps_due.clear()
            await self._gaps_due.wait()
            self._gaps_due.clear()
        else:
            self._settle_due.set()
            await asyncio.sleep(seconds)

    async def _settle(self, failures: int) -> None:
        if not failures:
            await self._settle_due.wait()
        self._settle_due.clear()
        while (settlement := self._next_settlement()) is not None:
            count = await self._session.settle(settlement)
            self.num_settled += count
            self._num_untrimmed += count
            if not self.keeps_commands and self._num_untrimmed >= _TRIM_EVERY:
                self._num_untrimmed = 0
                await self._session.trim(settlement.cursor)

    def _next_settlement(self) -> Settlement | None:
        settlements = self._session.settlements
        if settlements.current is None:
            with self._changed:
                consumer, position = self._updated_consumer(), self._position
                acks, cursor = consumer.collect_acks(), dict(position.cursor)
                changes, position.changes = position.changes, {}
                if consumer.num_waiting < _MAX_INBOX // 2:
                    self._has_room.set()
                self._changed.notify_all()
            settlements.add(acks, cursor, changes)
        return settlements.current

    def _drain(self) -> None:
        with self._changed:
            self._is_drain_due = False
            items = [box.popleft() for box in self._outbox.values() for _ in range(len(box))]
        for item in items:
            for message in (item,) if isinstance(item, Message) else item():
                self._session.publish(message)

    async def _close(self, drain_seconds: float) -> None:
        session = self._session
        self._drain()
        self._settle_due.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while not self.is_fenced and (self._has_acks or not session.settlements.is_empty):
                    await asyncio.sleep(0.005)
                await session.drain(drain_seconds)
        await session.close()
