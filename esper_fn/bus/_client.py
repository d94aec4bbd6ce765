"""Those who steer and watch, asynchronously."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType

import msgspec
from redis.exceptions import RedisError

from esper_fn.bus._broker import Broker
from esper_fn.bus._codec import SCHEMA, Schema, check_size
from esper_fn.bus._connect import make_transport
from esper_fn.bus._messages import Command, DeadLetter, Message, Outcome, new_id
from esper_fn.bus._publisher import Publisher, ServerTime
from esper_fn.bus._resilience import Retry
from esper_fn.bus._signing import Keyring, read_keys
from esper_fn.bus._topics import COMMAND_TOPICS, Topic
from esper_fn.bus._trace import current_trace
from esper_fn.bus._transport import BEGINNING, Delivery, Transport
from esper_fn.errors import (
    BusSecurityError,
    BusUnavailableError,
    BusyError,
    MessageError,
    NobodyListensError,
    NoOutcomeError,
)

_LOGGER = logging.getLogger(__name__)
_OUTAGE = (BusUnavailableError, BusSecurityError, RedisError)
WATCHED = (Topic.TELEMETRY, Topic.EVENTS, Topic.OUTCOMES)
"""What `watch` follows."""
_MAX_UNSETTLED = 10_000
_LISTENS_SECONDS = 1.0
"""A run that was seen to live is not asked for again so soon: a lease lasts longer."""


class AsyncClient:
    """Sends commands to a run and watches it.

    Args:
      transport: to the run's streams.
      keys: to sign commands with and to verify what the run says.
      schema: the messages there are.

    >>> async with bus.connect_async("redis://127.0.0.1:6379", run="digits-0") as client:
    ...     outcome = await client.send(bus.Cull(site="hidden", seed=3))  # doctest: +SKIP
    """

    def __init__(self, transport: Transport, *, keys: Keyring, schema: Schema = SCHEMA) -> None:
        self.transport = transport
        self._keys = keys
        self._schema = schema
        self._time = ServerTime()
        self._retry = Retry()
        self._publishers: dict[Topic, Publisher] = {}
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}
        self._unsettled: dict[str, tuple[Command, int]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._listens_until = -math.inf
        self.num_refused = 0
        """Entries read that were forged or could not be decoded."""

    async def open(self) -> AsyncClient:
        """Connects.

        Raises:
          BusUnavailableError: no server.
          BusSecurityError: others could reach it, and there is no key.
        """
        try:
            self._time.learn(await self.transport.open())
            after = await self.transport.last_ids([Topic.OUTCOMES])
        except BaseException:
            await self.transport.close()
            raise
        for topic in COMMAND_TOPICS:
            self._publishers[topic] = Publisher(
                self.transport, topic, keys=self._keys, server_time=self._time, schema=self._schema
            )
        self._tasks.append(asyncio.create_task(self._read_outcomes(after)))
        for topic in COMMAND_TOPICS:
            self._tasks.append(asyncio.create_task(self._remind(topic)))
        return self

    async def send(
        self, command: Command, *, wait_seconds: float | None = 30.0, must_listen: bool = True
    ) -> Outcome | None:
        """Sends a command and waits for what becomes of it.

        Args:
          command: one with the id of an earlier one is answered with that one's outcome.
          wait_seconds: for the outcome; None returns None once the server has accepted it.
          must_listen: refuse where no living run would take it.

        Raises:
          NobodyListensError: no such run lives.
          BusyError: too many commands wait; nothing was accepted.
          OversizedError: it is too large.
          NoOutcomeError: accepted, but no outcome came in time; it may still come.
          BusUnavailableError: the server does not answer; it goes out when it does, unless this
            client is closed.
        """
        loop = asyncio.get_running_loop()
        if must_listen and loop.time() >= self._listens_until:
            await self.check_listener()
            self._listens_until = loop.time() + _LISTENS_SECONDS
        future: asyncio.Future[Outcome] | None = None
        if wait_seconds is not None:
            future = self._waiting.setdefault(command.id, loop.create_future())
        if command.expires_after_seconds is None and len(self._unsettled) < _MAX_UNSETTLED:
            self._unsettled[command.id] = (command, -1)
        publisher = self._publishers[command.topic]
        try:
            number = await asyncio.wait_for(
                publisher.send(command, trace=current_trace()),
                wait_seconds if wait_seconds is not None else 30.0,
            )
        except TimeoutError:
            raise BusUnavailableError(
                f"the bus's server did not accept command {command.id} in time; it is not known "
                "whether it will; send it again with the same id"
                + (f" (last: {problem})" if (problem := publisher.problem) else "")
            ) from None
        except BaseException:
            self._unsettled.pop(command.id, None)
            self._waiting.pop(command.id, None)
            raise
        if command.id in self._unsettled:
            self._unsettled[command.id] = (command, number)
        if future is None:
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(future), wait_seconds)
        except TimeoutError:
            raise NoOutcomeError(
                f"command {command.id} was accepted, and run {self.transport.run!r} has not "
                f"answered within {wait_seconds} s; it may still (`esper watch` shows outcomes)"
            ) from None
        finally:
            self._waiting.pop(command.id, None)

    async def check_listener(self) -> None:
        """Refuses to go on when the run does not live.

        Raises:
          NobodyListensError: it does not; the message names the runs that do.
        """
        if await self.transport.holder() is not None:
            return
        others = ", ".join(await self.transport.living()) or "none"
        raise NobodyListensError(
            f"nobody listens to run {self.transport.run!r}; living runs: {others}; start one with "
            "`esper grow --bus ADDRESS --run NAME`"
        )

    async def watch(
        self, topics: Sequence[Topic] = WATCHED, *, from_beginning: bool = False
    ) -> AsyncIterator[Message]:
        """Everything the run tells from now on (or all that is still there), for ever."""
        after = dict.fromkeys(topics, BEGINNING)
        if not from_beginning:
            after = await self.transport.last_ids(topics)
        failures = 0
        while True:
            try:
                found = await self.transport.tail(after, limit=200, wait_seconds=None)
            except _OUTAGE as error:
                failures += 1
                await self._rest(failures, error)
                continue
            failures = 0
            for delivery in found:
                after[delivery.topic] = delivery.entry_id
                for message in self._open(delivery):
                    yield message

    async def dead_letters(
        self, *, after: str = BEGINNING, limit: int = 100
    ) -> list[tuple[str, DeadLetter]]:
        """What was set aside, oldest first, with the name of each letter; nothing at the end."""
        found: list[tuple[str, DeadLetter]] = []
        while len(found) < limit:
            page = await self.transport.page(Topic.DEAD, after=after, limit=limit - len(found))
            if not page:
                break
            after = page[-1].entry_id
            found += [
                (delivery.entry_id, message)
                for delivery in page
                for message in self._open(delivery)
                if isinstance(message, DeadLetter)
            ]
        return found

    async def replay(self, letter_id: str) -> list[str]:
        """Sends the commands of a dead letter again, as this client's own and under new ids.

        Returns:
          The new ids.

        Raises:
          MessageError: no such letter, or its bytes cannot be sent: unreadable, not kept, or not
            signed by a key held here.
        """
        letter = await self._letter(letter_id)
        try:
            self._keys.verify(
                self.transport.stream(letter.from_topic), letter.payload, letter.signature
            )
            messages = self._schema.decode(letter.payload).messages
        except MessageError as error:
            raise MessageError(f"dead letter {letter_id} cannot be replayed: {error}") from None
        fresh = [
            msgspec.structs.replace(message, id=new_id())
            for message in messages
            if isinstance(message, Command)
        ]
        for command in fresh:
            await self.send(command, wait_seconds=None, must_listen=False)
        await self.transport.discard(Topic.DEAD, [letter_id])
        return [command.id for command in fresh]

    async def drop(self, letter_ids: Iterable[str]) -> int:
        """Removes dead letters for good; returns how many there were."""
        return await self.transport.discard(Topic.DEAD, list(letter_ids))

    async def _letter(self, letter_id: str) -> DeadLetter:
        after = BEGINNING
        while page := await self.dead_letters(after=after, limit=20):
            for entry_id, letter in page:
                if entry_id == letter_id:
                    return letter
            after = page[-1][0]
        raise MessageError(f"no dead letter {letter_id!r}; `esper dlq list` shows them")

    async def close(self) -> None:
        """Disconnects."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for publisher in self._publishers.values():
            await publisher.close()
        await self.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _open(self, delivery: Delivery) -> tuple[Message, ...]:
        try:
            check_size(delivery.topic, delivery.size_bytes)
            stream = self.transport.stream(delivery.topic)
            self._keys.verify(stream, delivery.payload, delivery.signature)
            messages: tuple[Message, ...] = self._schema.decode(delivery.payload).messages
        except MessageError as error:
            self.num_refused += 1
            _LOGGER.warning("entry %s is refused: %s", delivery.entry_id, error)
            return ()
        return messages

    async def _read_outcomes(self, after: dict[Topic, str]) -> None:
        failures = 0
        while True:
            try:
                found = await self.transport.tail(after, limit=500, wait_seconds=None)
            except _OUTAGE as error:
                failures += 1
                await self._rest(failures, error)
                continue
            failures = 0
            for delivery in found:
                after[delivery.topic] = delivery.entry_id
                for message in self._open(delivery):
                    if isinstance(message, Outcome):
                        self._unsettled.pop(message.command_id, None)
                        future = self._waiting.get(message.command_id)
                        if future is not None and not future.done():
                            future.set_result(message)

    async def _remind(self, topic: Topic) -> None:
        """A server without memory is told again what has no outcome yet."""
        publisher = self._publishers[topic]
        while True:
            await publisher.forgotten.wait()
            publisher.forgotten.clear()
            again = [item for item in self._unsettled.values() if item[0].topic is topic]
            for command, number in sorted(again, key=lambda item: item[1]):
                if number >= 0:
                    with contextlib.suppress(BusyError):
                        await publisher.republish(command, number)

    async def _rest(self, failures: int, error: Exception) -> None:
        if failures == 1:
            _LOGGER.warning("run %r cannot be followed: %s", self.transport.run, error)
        await asyncio.sleep(self._retry.delay_seconds(failures))


def connect_async(
    url: str, *, run: str, keys: Keyring | None = None, broker: Broker | None = None
) -> AsyncClient:
    """A client to use as `async with`.

    Args:
      url: `memory`, `redis://...`, `rediss://...` or `unix://...`.
      run: name of the run.
      keys: to sign with; from the environment (`read_keys`) where left out.
      broker: for `memory`.
    """
    keys = read_keys() if keys is None else keys
    return AsyncClient(make_transport(url, run, keys=keys, broker=broker), keys=keys)
