"""Clients that steer and watch a run from coroutines."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterable, Sequence

import msgspec
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from esper_fn.bus._connect import make_transport
from esper_fn.bus._envelope import SCHEMA, Link
from esper_fn.bus._memory import Broker
from esper_fn.bus._messages import (
    COMMAND_TOPICS,
    Command,
    DeadLetter,
    Message,
    Outcome,
    Topic,
    new_id,
)
from esper_fn.bus._outbox import Publisher
from esper_fn.bus._signing import Keyring, read_keys
from esper_fn.bus._timing import retry_seconds
from esper_fn.bus._transport import BEGINNING, OUTAGES, Delivery, Transport
from esper_fn.errors import (
    BusUnavailableError,
    MessageError,
    NobodyListensError,
    NoOutcomeError,
)

_LOGGER = logging.getLogger(__name__)
WATCHED = (Topic.TELEMETRY, Topic.EVENTS, Topic.OUTCOMES)
"""The topics that `watch` follows."""
_ACCEPT_SECONDS = 30.0
_MAX_UNANSWERED = 10_000
_ACTIVE_SECONDS = 1.0
"""A run that was active is not checked again for so long; a lease lasts longer."""


class AsyncClient:
    """Sends commands to a run and watches it.

    Args:
      transport: the transport of the run.
      keys: keys to sign commands with and to verify messages of the run with.

    >>> async with bus.connect_async("redis://127.0.0.1:6379", run="digits-0") as client:
    ...     outcome = await client.send(bus.Cull(site="hidden", seed=3))  # doctest: +SKIP
    """

    def __init__(self, transport: Transport, *, keys: Keyring) -> None:
        self.transport = transport
        self.run = transport.run
        """Name of the run."""
        self.num_refused = 0
        """Entries that were forged or could not be decoded."""
        self._link = Link(transport, keys)
        self._publishers: dict[Topic, Publisher] = {}
        self._futures: dict[str, asyncio.Future[Outcome]] = {}
        self._unanswered: dict[str, tuple[Message, int]] = {}
        """Commands without an outcome, with their numbers, in case the server loses its data."""
        self._task: asyncio.Task[None] | None = None
        self._active_until = -math.inf

    async def open(self) -> AsyncClient:
        """Connects.

        Raises:
          BusUnavailableError: there is no server.
          BusSecurityError: other machines can reach the server, and there is no key.
        """
        try:
            await self._link.open()
            after = await self.transport.last_ids([Topic.OUTCOMES])
        except BaseException:
            await self.transport.close()
            raise
        self._task = asyncio.create_task(self._read_outcomes(after))
        for topic in COMMAND_TOPICS:
            self._publishers[topic] = Publisher(self._link, topic, unanswered=self._unanswered)
        return self

    async def send(
        self, command: Command, *, wait_seconds: float | None = 30.0, must_listen: bool = True
    ) -> Outcome | None:
        """Sends a command and waits for its outcome.

        Args:
          command: the command; a second one with the same id gets the outcome of the first.
          wait_seconds: how long to wait for the outcome; with None the call returns None once the
            server has accepted the command.
          must_listen: whether to refuse if the run is not active.

        Raises:
          NobodyListensError: the run is not active.
          BusyError: too many commands wait; this one was not accepted.
          OversizedError: the command is too large.
          NoOutcomeError: the command was accepted, but no outcome came in time; it may still come.
          BusUnavailableError: the server does not answer; the command is sent once it does, unless
            this client is closed.
        """
        loop = asyncio.get_running_loop()
        if must_listen and loop.time() >= self._active_until:
            await self.check_active()
            self._active_until = loop.time() + _ACTIVE_SECONDS
        future: asyncio.Future[Outcome] | None = None
        if wait_seconds is not None:
            future = self._futures.setdefault(command.id, loop.create_future())
        await self._accepted(command, _ACCEPT_SECONDS if wait_seconds is None else wait_seconds)
        if future is None:
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(future), wait_seconds)
        except TimeoutError:
            raise NoOutcomeError(
                f"command {command.id} was accepted, and run {self.run!r} has not answered within "
                f"{wait_seconds} s; it may still (`esper watch` shows outcomes)"
            ) from None
        finally:
            self._futures.pop(command.id, None)

    async def _accepted(self, command: Command, seconds: float) -> None:
        """Publishes a command and waits until the server has accepted it."""
        if command.expires_after_seconds is None and len(self._unanswered) < _MAX_UNANSWERED:
            self._unanswered[command.id] = (command, -1)
        publisher = self._publishers[command.topic]
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        try:
            # If the caller gives up, the command still goes out: it has a number.
            sending = asyncio.shield(publisher.post(command, trace=carrier.get("traceparent")))
            number = await asyncio.wait_for(sending, seconds)
        except TimeoutError:
            raise BusUnavailableError(
                f"the bus's server did not accept command {command.id} in time; it is not known "
                "whether it will; send it again with the same id"
                + (f" (last: {problem})" if (problem := publisher.problem) else "")
            ) from None
        except BaseException:
            self._unanswered.pop(command.id, None)
            self._futures.pop(command.id, None)
            raise
        if command.id in self._unanswered:
            self._unanswered[command.id] = (command, number)

    async def check_active(self) -> None:
        """Checks that a process drives the run.

        Raises:
          NobodyListensError: none does; the message names the active runs.
        """
        if await self.transport.holder() is not None:
            return
        others = ", ".join(await self.active_runs()) or "none"
        raise NobodyListensError(
            f"nobody listens to run {self.run!r}; active runs: {others}; start one with "
            "`esper grow --bus ADDRESS --run NAME`"
        )

    async def active_runs(self) -> list[str]:
        """Names of all active runs on this server."""
        return await self.transport.active_runs()

    async def watch(
        self, topics: Sequence[Topic] = WATCHED, *, from_beginning: bool = False
    ) -> AsyncIterator[Message]:
        """Yields the messages of a run for ever, from now on or from the oldest one."""
        after = dict.fromkeys(topics, BEGINNING)
        if not from_beginning:
            after = await self.transport.last_ids(topics)
        async for message in self._follow(after):
            yield message

    async def dead_letters(
        self, *, after: str = BEGINNING, limit: int = 100
    ) -> list[tuple[str, DeadLetter]]:
        """Reads dead letters with their ids, the oldest first; empty at the end.

        Args:
          after: id of the letter before the first one.
          limit: most letters to read.
        """
        letters: list[tuple[str, DeadLetter]] = []
        async for letter in self._letters(after):
            letters.append(letter)
            if len(letters) == limit:
                break
        return letters

    async def _letters(self, after: str) -> AsyncIterator[tuple[str, DeadLetter]]:
        while page := await self.transport.tail({Topic.DEAD: after}, limit=20, wait_seconds=0.0):
            after = page[-1].entry_id
            for delivery in page:
                for message in self._decode(delivery):
                    if isinstance(message, DeadLetter):
                        yield delivery.entry_id, message

    async def replay(self, letter_id: str) -> list[str]:
        """Sends the commands of a dead letter again, with new ids and this client's signature.

        Args:
          letter_id: id of the dead letter, which is removed.

        Returns:
          The new ids.

        Raises:
          MessageError: there is no such letter, or its bytes cannot be sent: they are unreadable,
            were too large to keep, or are not signed by a key of this client.
        """
        async for entry_id, each in self._letters(BEGINNING):
            if entry_id == letter_id:
                letter = each
                break
        else:
            raise MessageError(f"no dead letter {letter_id!r}; `esper dlq list` shows them")
        try:
            entry = Delivery(letter.from_topic, letter_id, letter.payload, letter.signature)
            messages = SCHEMA.decode(self._link.verified(entry)).messages
        except MessageError as error:
            raise MessageError(f"dead letter {letter_id} cannot be replayed: {error}") from None
        commands = [
            msgspec.structs.replace(message, id=new_id())
            for message in messages
            if isinstance(message, Command)
        ]
        for command in commands:
            await self.send(command, wait_seconds=None, must_listen=False)
        await self.drop([letter_id])
        return [command.id for command in commands]

    async def drop(self, letter_ids: Iterable[str]) -> int:
        """Removes dead letters; returns how many there were."""
        return await self.transport.discard(Topic.DEAD, list(letter_ids))

    async def close(self) -> None:
        """Disconnects."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for publisher in self._publishers.values():
            await publisher.close()
        await self.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return await self.open()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _decode(self, delivery: Delivery) -> tuple[Message, ...]:
        try:
            return SCHEMA.decode(self._link.verified(delivery)).messages
        except MessageError as error:
            self.num_refused += 1
            _LOGGER.warning("entry %s is refused: %s", delivery.entry_id, error)
            return ()

    async def _follow(self, after: dict[Topic, str]) -> AsyncIterator[Message]:
        """Yields messages after the given entries for ever; an outage delays them."""
        failures = 0
        while True:
            try:
                deliveries = await self.transport.tail(after, limit=200, wait_seconds=None)
            except OUTAGES as error:
                failures += 1
                if failures == 1:
                    _LOGGER.warning("run %r cannot be followed: %s", self.run, error)
                await asyncio.sleep(retry_seconds(failures))
                continue
            failures = 0
            for delivery in deliveries:
                after[delivery.topic] = delivery.entry_id
                for message in self._decode(delivery):
                    yield message

    async def _read_outcomes(self, after: dict[Topic, str]) -> None:
        async for message in self._follow(after):
            if isinstance(message, Outcome):
                self._unanswered.pop(message.command_id, None)
                future = self._futures.get(message.command_id)
                if future is not None and not future.done():
                    future.set_result(message)


def connect_async(
    url: str, *, run: str, keys: Keyring | None = None, broker: Broker | None = None
) -> AsyncClient:
    """Makes a client to use as `async with`.

    Args:
      url: `memory`, `redis://...`, `rediss://...` or `unix://...`.
      run: name of the run.
      keys: keys to sign with; by default those of the environment (`read_keys`).
      broker: the broker of `memory`.

    Raises:
      BusAddressError: the address or the name is not valid.
    """
    keys = read_keys() if keys is None else keys
    return AsyncClient(make_transport(url, run, keys=keys, broker=broker), keys=keys)
