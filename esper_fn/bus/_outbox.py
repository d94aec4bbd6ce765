"""What goes out: messages of any topic, and what a worker has done with its commands."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex

from esper_fn.bus._consumer import Ack
from esper_fn.bus._envelope import MAX_MESSAGES, Link, check_size
from esper_fn.bus._messages import COMMAND_TOPICS, Message, Outcome, Topic
from esper_fn.bus._timing import retry_seconds
from esper_fn.bus._transport import Entry, OtherRunError, Settlement
from esper_fn.errors import BusUnavailableError, BusyError, EsperError, MessageError, OversizedError

_LOGGER = logging.getLogger(__name__)
_ENTRIES_AT_ONCE = 128
_OUTCOMES_IN_ENVELOPE = 64
_OUTCOME_BYTES = 60 * 1024
"""Bytes of outcomes in one envelope, which `LIMITS` allows with its header."""
_UNKNOWN = "?"
"""Stands for the identity of a run before it is known; no run has it."""
_CHANGES_AT_ONCE = 2


def grouped(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """The outcomes as they share envelopes, in order."""
    groups: list[list[Outcome]] = []
    size = 0
    for outcome in outcomes:
        most = 512 + 4 * len(outcome.text) + 128 * len(outcome.seeds)
        size += most
        if not groups or size > _OUTCOME_BYTES or len(groups[-1]) == _OUTCOMES_IN_ENVELOPE:
            groups.append([])
            size = most
        groups[-1].append(outcome)
    return groups


@dataclass(slots=True)
class _Queued:
    message: Message
    since: float
    trace: str | None = None
    accepted: asyncio.Future[int] | None = None


class Publisher:
    """Publishes to one topic of a run, from one event loop.

    While a publication runs the next messages gather, so one call takes more of them the more are
    sent, and a single message waits for nothing. An envelope holds one command, or many messages of
    other kinds. A publication is repeated until the server has answered it.

    Args:
      link: what to publish on.
      topic: the topic of all messages.
      max_queued: most messages that wait while the server is slow or away; the oldest are dropped
        and counted.
      unanswered: messages with their numbers, to publish again once the server has lost its data.
    """

    def __init__(
        self,
        link: Link,
        topic: Topic,
        *,
        max_queued: int = 10_000,
        unanswered: Mapping[str, tuple[Message, int]] | None = None,
    ) -> None:
        self.producer = token_hex(8)
        self._link = link
        self._topic = topic
        self._max_queued = max_queued
        self._queue: deque[_Queued] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._next = 0
        is_bound = topic in COMMAND_TOPICS and link.keys.is_required
        self._identity = _UNKNOWN if is_bound else ""
        self._task: asyncio.Task[None] | None = None
        self._generation: str | None = None
        self._unanswered = {} if unanswered is None else unanswered
        self._is_data_lost = False
        self.num_dropped = 0
        self.num_failures = 0
        self.problem = ""
        """Why the last attempt failed; empty after a success."""

    def offer(self, messages: Iterable[Message]) -> None:
        """Queues messages without waiting; the oldest are dropped if there are too many."""
        now = time.monotonic()
        self._queue.extend(_Queued(message, now) for message in messages)
        while len(self._queue) > self._max_queued:
            self._queue.popleft()
            self.num_dropped += 1
        self._start()

    def post(self, message: Message, *, trace: str | None = None) -> asyncio.Future[int]:
        """Queues a message that is not dropped; the future resolves to its number once accepted.

        Raises:
          BusyError: this queue is full, or, by the future, the server.
          OversizedError: by the future: the message is too large.
        """
        if len(self._queue) >= self._max_queued:
            raise BusyError(
                f"{len(self._queue):,} messages wait to be sent to {self._link.transport.run!r}; "
                "wait for their outcomes first"
            )
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._queue.append(_Queued(message, time.monotonic(), trace, accepted))
        self._start()
        return accepted

    async def drain(self, timeout_seconds: float) -> None:
        """Waits until the queue is empty, at most so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)

    async def close(self) -> None:
        """Stops; messages that still wait are refused."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._queue:
            _refuse(self._queue.popleft(), BusUnavailableError("the connection was closed"))

    def _start(self) -> None:
        self._idle.clear()
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            while self._queue:
                await self._publish_some()
                while self._is_data_lost:
                    await self._republish()
            self._idle.set()
            self._wake.clear()
            await self._wake.wait()

    async def _publish_some(self) -> None:
        groups, failures = self._next_groups(), 0
        while groups:
            if (entries := self._pack_all(groups)) is None:
                continue
            try:
                if not await self._publish(self._next, entries, failures):
                    failures += 1
                    continue
            except BusyError as error:
                for item in itertools.chain(*groups):
                    _refuse(item, error)
                return
            for number, group in enumerate(groups, self._next):
                for item in group:
                    if item.accepted is not None and not item.accepted.done():
                        item.accepted.set_result(number)
            self._next += len(groups)
            return

    async def _republish(self) -> None:
        """Publishes what the server has lost, with the old numbers."""
        self._is_data_lost = False
        # The server may know later numbers of this producer again, and would skip these.
        producer = f"{self.producer}:{self._generation}"
        for message, number in sorted(self._unanswered.values(), key=lambda item: item[1]):
            if number < 0 or message.topic is not self._topic:
                continue
            item, failures = _Queued(message, time.monotonic()), 0
            with contextlib.suppress(BusyError):
                entry = [self._pack([item], number)]
                while not await self._publish(number, entry, failures, producer):
                    failures += 1

    def _pack_all(self, groups: list[list[_Queued]]) -> list[Entry] | None:
        """The entries of groups; None if one cannot be packed, and was split."""
        entries = []
        for index, group in enumerate(groups):
            try:
                entries.append(self._pack(group, self._next + index))
            except (OversizedError, TypeError, ValueError, OverflowError) as error:
                half = len(group) // 2
                groups[index : index + 1] = [group[:half], group[half:]] if half else []
                if not half:
                    self.num_dropped += 1
                    if group[0].accepted is None:
                        _LOGGER.warning("a message to %s was dropped: %s", self._topic, error)
                    _refuse(group[0], error)
                return None
        return entries

    async def _publish(
        self, first: int, entries: list[Entry], failures: int, producer: str | None = None
    ) -> bool:
        """Tries once; after any failure but `BusyError` it waits and returns False."""
        try:
            publication = await self._link.transport.publish(
                self._topic, producer or self.producer, first, entries, self._identity
            )
        except BusyError:
            raise
        except OtherRunError as error:
            # The entries must be signed again, for the active run.
            self._identity = error.identity or _UNKNOWN
            self.problem = f"run {self._link.transport.run!r} takes no commands yet"
            if error.identity and failures < _CHANGES_AT_ONCE:
                return False
        except Exception as error:
            self.num_failures += 1
            self.problem = str(error) or type(error).__name__
            if failures == 0:
                _LOGGER.warning("publication to %s failed: %s", self._topic.value, error)
        else:
            if self._generation not in {None, publication.generation}:
                self._is_data_lost = True
            self._generation, self.problem = publication.generation, ""
            return True
        await asyncio.sleep(retry_seconds(failures + 1))
        return False

    def _next_groups(self) -> list[list[_Queued]]:
        """The messages of the next envelopes."""
        is_command = self._topic in COMMAND_TOPICS
        size, most = (1, _ENTRIES_AT_ONCE) if is_command else (MAX_MESSAGES, 8)
        count = min(len(self._queue), size * most)
        items = [self._queue.popleft() for _ in range(count)]
        return [items[first : first + size] for first in range(0, count, size)]

    def _pack(self, group: list[_Queued], sequence: int) -> Entry:
        first = group[0]
        entry = self._link.seal(
            self._topic,
            self.producer,
            sequence,
            [item.message for item in group],
            queued_ms=int((time.monotonic() - first.since) * 1000),
            trace=first.trace,
            identity=self._identity,
        )
        check_size(self._topic, len(entry.payload))
        return entry


def _refuse(item: _Queued, error: Exception) -> None:
    if item.accepted is not None and not item.accepted.done():
        is_known = isinstance(error, EsperError)
        item.accepted.set_exception(error if is_known else MessageError(str(error)))
        item.accepted.exception()  # a caller that gave up does not read it


class Settlements:
    """Collects acknowledgements into settlements, and keeps each until the server has it.

    Args:
      link: what to publish on.
      producer: name of the worker's process.
    """

    def __init__(self, link: Link, producer: str) -> None:
        self._link = link
        self._producer = producer
        self._acks: tuple[Ack, ...] = ()
        self._sequences: dict[str, int] = {}
        self._number = 0
        self.current: Settlement | None = None
        """The settlement to make, or to repeat."""

    @property
    def is_empty(self) -> bool:
        """Whether the server has every acknowledgement."""
        return not self._acks

    def restart(self) -> None:
        """Begins with a new lease, whose first settlement holds what is not settled."""
        self._number, self.current = 0, None

    def add(self, acks: Sequence[Ack], cursor: dict[Topic, str], sequences: dict[str, int]) -> None:
        """Makes the next settlement, if there is anything to settle.

        Args:
          acks: new acknowledgements of the consumer.
          cursor: cursor of the run's position.
          sequences: changed sequences of the run's position.
        """
        self._acks = (*self._acks, *acks)
        self._sequences = {**self._sequences, **sequences}
        if not self._acks and not self._sequences:
            return
        self._number += 1
        entries = {
            topic: [ack.entry_id for ack in self._acks if ack.topic is topic and ack.entry_id]
            for topic in COMMAND_TOPICS
        }
        outcomes = [ack.outcome for ack in self._acks if ack.outcome is not None]
        dead = [ack.dead for ack in self._acks if ack.dead is not None]
        self.current = Settlement(
            number=self._number,
            acks=entries,
            cursor=cursor,
            sequences=self._sequences,
            outcomes=[self._seal(Topic.OUTCOMES, group) for group in grouped(outcomes)],
            dead=[self._seal(Topic.DEAD, [letter]) for letter in dead],
        )

    def complete(self) -> int:
        """Ends the current settlement; returns how many entries it acknowledged."""
        current = self.current
        self._acks, self._sequences, self.current = (), {}, None
        return 0 if current is None else sum(map(len, current.acks.values()))

    def _seal(self, topic: Topic, messages: Sequence[Message]) -> Entry:
        return self._link.seal(topic, self._producer, self._number, messages)
