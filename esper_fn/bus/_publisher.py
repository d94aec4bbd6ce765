"""Sending: coalesced, numbered, signed, repeated until the server has answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex

from esper_fn.bus._codec import FORMAT, MAX_MESSAGES, SCHEMA, Header, Schema, check_size
from esper_fn.bus._messages import Message
from esper_fn.bus._resilience import Clock, Retry
from esper_fn.bus._signing import NO_KEYS, Keyring
from esper_fn.bus._topics import COMMAND_TOPICS, Topic
from esper_fn.bus._transport import Entry, OtherRunError, Transport
from esper_fn.errors import BusUnavailableError, BusyError, EsperError, MessageError, OversizedError

_LOGGER = logging.getLogger(__name__)
_ENTRIES_AT_ONCE = 128
_UNKNOWN = "?"
"""Stands for the identity of a run that was not met yet; no run has it."""
_CHANGES_AT_ONCE = 2


class ServerTime:
    """The server's clock, as known by one's own monotonic clock and an answer of the server."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._offset_ms = 0.0

    def learn(self, server_ms: int) -> None:
        """Takes an answer in."""
        self._offset_ms = server_ms - self._clock() * 1000

    def now_ms(self) -> int:
        """Milliseconds since 1970 there."""
        return int(self._offset_ms + self._clock() * 1000)


@dataclass(slots=True)
class _Waiting:
    message: Message
    since: float
    trace: str | None
    accepted: asyncio.Future[int] | None
    sequence: int = -1


class Publisher:
    """Publishes to one topic of a run, from one event loop.

    While a publication is under way the next messages gather; so the more is sent, the more goes
    into one call, and a single message waits for nothing. Commands travel one a parcel, all else
    together.

    Args:
      transport: where to.
      topic: what.
      keys: for signatures.
      server_time: for the header.
      max_waiting: messages kept while the server is slow or away; more are dropped and counted
        (`offer`) or refused (`send`).
      retry: waits between attempts.
      clock: seconds, rising.
      schema: the messages there are.
    """

    def __init__(
        self,
        transport: Transport,
        topic: Topic,
        *,
        keys: Keyring = NO_KEYS,
        server_time: ServerTime | None = None,
        max_waiting: int = 10_000,
        retry: Retry | None = None,
        clock: Clock = time.monotonic,
        schema: Schema = SCHEMA,
    ) -> None:
        self._transport = transport
        self._topic = topic
        self._stream = transport.stream(topic)
        self._keys = keys
        self._time = server_time or ServerTime(clock)
        self._max_waiting = max_waiting
        self._retry = retry or Retry()
        self._clock = clock
        self._schema = schema
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._next = 0
        is_bound = topic in COMMAND_TOPICS and keys.is_required
        self._identity = _UNKNOWN if is_bound else None
        self._task: asyncio.Task[None] | None = None
        self.producer = token_hex(8)
        self.generation: str | None = None
        self.forgotten = asyncio.Event()
        """Set when the server turns out to have lost its memory."""
        self.num_published = 0
        self.num_dropped = 0
        self.num_failures = 0
        self.problem = ""
        """Why nothing was accepted, the last time; empty after a success."""

    def offer(self, message: Message) -> bool:
        """Queues a message without waiting; False when an older one was dropped for it."""
        is_room = len(self._waiting) < self._max_waiting
        if not is_room:
            self._waiting.popleft()
            self.num_dropped += 1
        self._put(_Waiting(message, self._clock(), None, None))
        return is_room

    def offer_all(self, messages: Sequence[Message]) -> None:
        """Queues messages without waiting; the oldest go where there is no room."""
        now = self._clock()
        self._waiting.extend(_Waiting(message, now, None, None) for message in messages)
        while len(self._waiting) > self._max_waiting:
            self._waiting.popleft()
            self.num_dropped += 1
        self._start()

    async def send(self, message: Message, *, trace: str | None = None) -> int:
        """Publishes a message; returns its number once the server has accepted it.

        Raises:
          BusyError: the server, or this queue, takes no more; nothing was accepted.
          OversizedError: the message is too large.
        """
        # If the caller gives up, the message still goes out: it has a number.
        return await asyncio.shield(self.post(message, trace=trace))

    def post(self, message: Message, *, trace: str | None = None) -> asyncio.Future[int]:
        """Queues a message that is not to be dropped; the future is as `send`.

        Raises:
          BusyError: this queue takes no more.
        """
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(
                f"{len(self._waiting):,} messages wait to be sent to {self._transport.run!r}; "
                "wait for their outcomes first"
            )
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._put(_Waiting(message, self._clock(), trace, accepted))
        return accepted

    async def republish(self, message: Message, sequence: int) -> None:
        """Publishes again what a server has lost, under the number it had; until it succeeds."""
        item, failures = _Waiting(message, self._clock(), None, None), 0
        while not await self._publish(sequence, [self._pack([item], sequence)], failures):
            failures += 1

    async def drain(self, timeout_seconds: float) -> bool:
        """Waits until everything is out; False when time is up before."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stops; what still waits is refused."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._waiting:
            _refuse(self._waiting.popleft(), BusUnavailableError("the connection was closed"))

    def _put(self, item: _Waiting) -> None:
        self._waiting.append(item)
        self._start()

    def _start(self) -> None:
        self._idle.clear()
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._pump())

    async def _pump(self) -> None:
        while True:
            while self._waiting:
                await self._publish_some()
            self._idle.set()
            self._wake.clear()
            await self._wake.wait()

    async def _publish_some(self) -> None:
        groups = self._take()
        failures = 0
        while groups:
            entries = []
            for at, group in enumerate(groups):
                try:
                    entries.append(self._pack(group, self._next + at))
                except (OversizedError, TypeError, ValueError, OverflowError) as error:
                    groups[at : at + 1] = self._split(group, error)
                    break
            else:
                is_over = await self._try(groups, entries, failures)
                if is_over:
                    return
                failures += 1

    async def _try(self, groups: list[list[_Waiting]], entries: list[Entry], failures: int) -> bool:
        try:
            if not await self._publish(self._next, entries, failures):
                return False
        except BusyError as error:
            for group in groups:
                for item in group:
                    _refuse(item, error)
            return True
        for at, group in enumerate(groups):
            for item in group:
                if item.accepted is not None and not item.accepted.done():
                    item.accepted.set_result(self._next + at)
            self.num_published += len(group)
        self._next += len(groups)
        return True

    async def _publish(self, first: int, entries: list[Entry], failures: int) -> bool:
        """Tries once; waits after a failure, whatever it was, and returns False."""
        try:
            published = await self._transport.publish(
                self._topic, self.producer, first, entries, identity=self._identity
            )
        except BusyError:
            raise
        except OtherRunError as error:
            # The entries must be signed anew, for the run that lives.
            self._identity = error.identity or _UNKNOWN
            self.problem = f"run {self._transport.run!r} takes no commands yet"
            if error.identity and failures < _CHANGES_AT_ONCE:
                return False
        except Exception as error:
            self.num_failures += 1
            self.problem = str(error) or type(error).__name__
            if failures == 0:
                _LOGGER.warning("publication to %s failed: %s", self._topic.value, error)
        else:
            if self.generation not in {None, published.generation}:
                self.forgotten.set()
            self.generation, self.problem = published.generation, ""
            return True
        await asyncio.sleep(self._retry.delay_seconds(failures + 1))
        return False

    def _take(self) -> list[list[_Waiting]]:
        if self._topic in COMMAND_TOPICS:
            count = min(len(self._waiting), _ENTRIES_AT_ONCE)
            return [[self._waiting.popleft()] for _ in range(count)]
        groups: list[list[_Waiting]] = []
        while self._waiting and len(groups) < 8:
            count = min(len(self._waiting), MAX_MESSAGES)
            groups.append([self._waiting.popleft() for _ in range(count)])
        return groups

    def _pack(self, group: list[_Waiting], sequence: int) -> Entry:
        first = group[0]
        header = Header(
            format=FORMAT,
            producer=self.producer,
            sequence=sequence,
            issued_at_ms=self._time.now_ms(),
            held_ms=int((self._clock() - first.since) * 1000),
            trace=first.trace,
            identity=self._identity or "",
        )
        payload = self._schema.encode(header, [item.message for item in group])
        check_size(self._topic, len(payload))
        return Entry(payload, self._keys.sign(self._stream, payload))

    def _split(self, group: list[_Waiting], error: Exception) -> list[list[_Waiting]]:
        if len(group) > 1:
            half = len(group) // 2
            return [group[:half], group[half:]]
        self.num_dropped += 1
        if group[0].accepted is None:
            _LOGGER.warning("a message to %s was dropped: %s", self._topic.value, error)
        _refuse(group[0], error)
        return []


def _refuse(item: _Waiting, error: Exception) -> None:
    if item.accepted is None or item.accepted.done():
        return
    item.accepted.set_exception(
        error if isinstance(error, EsperError) else MessageError(str(error))
    )
    item.accepted.exception()  # a caller that gave up does not read it
