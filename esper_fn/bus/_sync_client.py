"""Clients that steer and watch a run from plain code."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from esper_fn.bus._client import WATCHED, AsyncClient, connect_async
from esper_fn.bus._connect import LoopThread
from esper_fn.bus._memory import Broker
from esper_fn.bus._messages import Command, DeadLetter, Message, Outcome, Topic
from esper_fn.bus._signing import Keyring
from esper_fn.bus._transport import BEGINNING


class Client:
    """An `AsyncClient` for plain code. Each call blocks, but none for ever. `connect` makes one.

    >>> with bus.connect("redis://127.0.0.1:6379", run="digits-0") as client:
    ...     outcome = client.send(bus.Cull(site="hidden", seed=3))  # doctest: +SKIP
    """

    def __init__(self, client: AsyncClient, thread: LoopThread) -> None:
        self.asynchronous = client
        self.run = client.run
        """Name of the run."""
        self._thread = thread

    def send(
        self, command: Command, *, wait_seconds: float | None = 30.0, must_listen: bool = True
    ) -> Outcome | None:
        """Sends a command; see `AsyncClient.send`."""
        work = self.asynchronous.send(command, wait_seconds=wait_seconds, must_listen=must_listen)
        return self._thread.call(work)

    def watch(
        self, topics: Sequence[Topic] = WATCHED, *, seconds: float, from_beginning: bool = False
    ) -> Iterator[Message]:
        """Yields the messages of the run for so many seconds; see `AsyncClient.watch`."""
        stream = self.asynchronous.watch(topics, from_beginning=from_beginning)
        until = time.monotonic() + seconds

        async def next_message() -> Message:
            return await anext(stream)

        while (left := until - time.monotonic()) > 0:
            try:
                yield self._thread.call(next_message(), left)
            except TimeoutError:
                return

    def dead_letters(
        self, *, after: str = BEGINNING, limit: int = 100
    ) -> list[tuple[str, DeadLetter]]:
        """Reads dead letters; see `AsyncClient.dead_letters`."""
        return self._thread.call(self.asynchronous.dead_letters(after=after, limit=limit))

    def replay(self, letter_id: str) -> list[str]:
        """Sends the commands of a dead letter again; see `AsyncClient.replay`."""
        return self._thread.call(self.asynchronous.replay(letter_id))

    def drop(self, letter_ids: Iterable[str]) -> int:
        """Removes dead letters; returns how many there were."""
        return self._thread.call(self.asynchronous.drop(letter_ids))

    def active_runs(self) -> list[str]:
        """Names of all active runs on this server."""
        return self._thread.call(self.asynchronous.active_runs())

    def check_active(self) -> None:
        """Checks that a process drives the run; see `AsyncClient.check_active`."""
        self._thread.call(self.asynchronous.check_active())

    def close(self) -> None:
        """Disconnects."""
        try:
            self._thread.call(self.asynchronous.close(), 10)
        finally:
            self._thread.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def connect(
    url: str, *, run: str, keys: Keyring | None = None, broker: Broker | None = None
) -> Client:
    """Connects a client for plain code; for the arguments see `connect_async`.

    Raises:
      BusAddressError: the address or the name is not valid.
      BusUnavailableError: there is no server.
      BusSecurityError: other machines can reach the server, and there is no key.
    """
    client = connect_async(url, run=run, keys=keys, broker=broker)
    thread = LoopThread("esper-bus-client")
    try:
        return Client(thread.call(client.open()), thread)
    except BaseException:
        thread.close()
        raise
