"""Those who steer and watch, from plain code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from esper_fn.bus._broker import Broker
from esper_fn.bus._client import WATCHED, AsyncClient
from esper_fn.bus._connect import LoopThread, make_transport
from esper_fn.bus._messages import Command, DeadLetter, Message, Outcome
from esper_fn.bus._signing import Keyring, read_keys
from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import BEGINNING


class Client:
    """`AsyncClient` for plain code: every call waits, and none for ever.

    >>> with bus.connect("redis://127.0.0.1:6379", run="digits-0") as client:
    ...     outcome = client.send(bus.Cull(site="hidden", seed=3))  # doctest: +SKIP
    """

    def __init__(self, client: AsyncClient, thread: LoopThread) -> None:
        self.asynchronous = client
        self._thread = thread

    def send(
        self, command: Command, *, wait_seconds: float | None = 30.0, must_listen: bool = True
    ) -> Outcome | None:
        """See `AsyncClient.send`."""
        work = self.asynchronous.send(command, wait_seconds=wait_seconds, must_listen=must_listen)
        return self._thread.call(work)

    def watch(
        self, topics: Sequence[Topic] = WATCHED, *, seconds: float, from_beginning: bool = False
    ) -> Iterator[Message]:
        """What the run tells within so many seconds."""
        stream = self.asynchronous.watch(topics, from_beginning=from_beginning)
        until = time.monotonic() + seconds

        async def following() -> Message:
            return await anext(stream)

        pending = None
        try:
            while (left := until - time.monotonic()) > 0:
                pending = asyncio.run_coroutine_threadsafe(following(), self._thread.loop)
                try:
                    yield pending.result(left)
                except TimeoutError:
                    return
        finally:
            if pending is not None:
                pending.cancel()

    def dead_letters(
        self, *, after: str = BEGINNING, limit: int = 100
    ) -> list[tuple[str, DeadLetter]]:
        """See `AsyncClient.dead_letters`."""
        return self._thread.call(self.asynchronous.dead_letters(after=after, limit=limit))

    def replay(self, letter_id: str) -> list[str]:
        """See `AsyncClient.replay`."""
        return self._thread.call(self.asynchronous.replay(letter_id))

    def drop(self, letter_ids: Iterable[str]) -> int:
        """See `AsyncClient.drop`."""
        return self._thread.call(self.asynchronous.drop(letter_ids))

    def living(self) -> list[str]:
        """Names of the runs that live."""
        return self._thread.call(self.asynchronous.transport.living())

    def check_listener(self) -> None:
        """See `AsyncClient.check_listener`."""
        self._thread.call(self.asynchronous.check_listener())

    def close(self) -> None:
        """Disconnects."""
        try:
            self._thread.call(self.asynchronous.close(), 10)
        finally:
            self._thread.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(
    url: str, *, run: str, keys: Keyring | None = None, broker: Broker | None = None
) -> Client:
    """A client for plain code; arguments as for `connect_async`.

    Raises:
      BusUnavailableError: no server.
      BusSecurityError: others could reach it, and there is no key.
    """
    keys = read_keys() if keys is None else keys
    transport = make_transport(url, run, keys=keys, broker=broker)
    thread = LoopThread("esper-bus-client")

    async def make() -> AsyncClient:
        return await AsyncClient(transport, keys=keys).open()

    try:
        return Client(thread.call(make()), thread)
    except BaseException:
        thread.close()
        raise
