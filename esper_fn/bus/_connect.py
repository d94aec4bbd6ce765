"""From an address to a transport, and an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from esper_fn.bus._address import parse_address
from esper_fn.bus._memory import Broker, MemoryTransport
from esper_fn.bus._redis import RedisTransport
from esper_fn.bus._signing import Keyring
from esper_fn.bus._transport import RUN_NAME, Transport
from esper_fn.errors import BusAddressError

T = TypeVar("T")


def make_transport(url: str, run: str, *, keys: Keyring, broker: Broker | None = None) -> Transport:
    """Makes the transport for an address.

    Args:
      url: `memory`, `redis://`, `rediss://` or `unix://`.
      run: name of the run.
      keys: without keys, only addresses that no other machine can reach are allowed.
      broker: the broker of `memory`; by default the one that all of the process share.

    Raises:
      BusAddressError: the address or the name is not valid.
    """
    if not RUN_NAME.fullmatch(run):
        raise BusAddressError(
            f"run={run!r} must be letters, digits, dots, - and _, at most 100, a letter or digit "
            "first"
        )
    address = parse_address(url)
    if address.is_memory:
        return MemoryTransport(run, broker)
    return RedisTransport(address, run, has_key=keys.is_required)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Makes an event loop, from uvloop if it is installed."""
    try:
        import uvloop  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class LoopThread:
    """An event loop in a daemon thread.

    Args:
      name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = new_event_loop()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._is_over.wait())

    def call(self, work: Coroutine[Any, Any, T], timeout_seconds: float | None = None) -> T:
        """Runs a coroutine in the thread and waits for its result."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_seconds)
        except BaseException:
            future.cancel()
            raise

    def soon(self, work: Callable[..., object], *arguments: Any) -> None:
        """Schedules a call in the thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(work, *arguments)

    def close(self) -> None:
        """Cancels all tasks and ends the thread."""
        self.soon(self._is_over.set)
        self._thread.join(5)
