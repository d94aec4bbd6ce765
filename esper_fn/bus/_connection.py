"""One connection to a Redis server, without hidden retries."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from pathlib import Path
from typing import Any

import hiredis
import redis.asyncio as redis_asyncio
from redis._parsers import _AsyncHiredisParser
from redis.asyncio.retry import Retry as RedisRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from esper_fn._text import plain
from esper_fn.bus._address import Address
from esper_fn.bus._timing import CircuitBreaker
from esper_fn.errors import BusAddressError, BusSecurityError, BusUnavailableError

_CONNECT_SECONDS = 2.0
_LUA = Path(__file__).parent / "lua"
MAX_REPLY_BYTES = 4 << 20
"""Largest answer; a connection that brings more is dropped, as anybody may write entries."""


class OverlongReplyError(BusUnavailableError):
    """An answer has more than `MAX_REPLY_BYTES`."""


class _TooLongError(Exception):
    pass


class _Parser(_AsyncHiredisParser):
    """Reads at most `MAX_REPLY_BYTES` of an answer."""

    _num_bytes = 0

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        self._num_bytes = 0
        return await super().read_response(*arguments, **options)

    async def read_from_socket(self) -> bool:
        stream, reader = self._stream, self._reader
        data = await stream.read(self._read_size) if stream else b""
        if not data or reader is None:
            raise RedisConnectionError("Connection closed by server.")
        self._num_bytes += len(data)
        if self._num_bytes > MAX_REPLY_BYTES:
            raise _TooLongError
        reader.feed(data)
        return True


class Script:
    """A Lua script of the folder `lua`, which the server runs as one transaction.

    Args:
      name: name of its file.
      shared: names of files with functions that it calls.
    """

    def __init__(self, name: str, *shared: str) -> None:
        self.text = "".join((_LUA / f"{part}.lua").read_text("utf-8") for part in (*shared, name))
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class Connection:
    """A connection that makes one call at a time.

    Any failure between a request and its answer, cancellation included, closes the connection, as
    the next caller must never read that answer.

    Args:
      address: address of the server.
      breaker: the circuit breaker that all connections to the server share.
    """

    def __init__(self, address: Address, breaker: CircuitBreaker) -> None:
        self._address = address
        self._breaker = breaker
        options = dict(address.options)
        connection: Any = redis_asyncio.UnixDomainSocketConnection
        if "path" not in options:
            is_tls = address.url.lower().startswith("rediss")
            connection = redis_asyncio.SSLConnection if is_tls else redis_asyncio.Connection
            options["socket_keepalive"] = True
            options["socket_keepalive_options"] = {
                getattr(socket, name): value
                for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
                if hasattr(socket, name)
            }
        pool = redis_asyncio.ConnectionPool(
            connection_class=connection,
            protocol=2,
            parser_class=_Parser,
            retry=RedisRetry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=_CONNECT_SECONDS,
            **options,
        )
        self._connection: Any = pool.make_connection()
        self._lock = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a call is running."""
        return self._lock.locked()

    async def call(self, *arguments: Any, timeout_seconds: float | None) -> Any:
        """Sends a command and returns the server's answer.

        Raises:
          BusUnavailableError: the server does not answer, or cannot answer now.
          OverlongReplyError: the answer is too large; the command was executed.
          ResponseError: the server refuses.
        """
        async with self._lock:
            return await self._call(arguments, timeout_seconds)

    async def _call(self, arguments: tuple[Any, ...], timeout_seconds: float | None) -> Any:
        if self._breaker.is_open:
            raise BusUnavailableError(
                f"the bus at {self._address.shown} does not answer; next attempt in "
                f"{self._breaker.seconds_left():.1f} s"
            )
        is_answered = False
        try:
            async with asyncio.timeout(timeout_seconds):
                if not self._connection.is_connected:
                    await self._connect()
                await self._connection.send_packed_command(hiredis.pack_command(arguments))
                answer = await self._connection.read_response(disconnect_on_error=False)
            is_answered = True
        except (BusyLoadingError, OutOfMemoryError, ReadOnlyError) as error:
            # Behind the address of a read-only server another one may answer by now.
            is_answered = not isinstance(error, ReadOnlyError)
            raise BusUnavailableError(
                f"the bus at {self._address.shown} cannot take this now: {self._message(error)}"
            ) from None
        except NoPermissionError as error:
            is_answered = True
            raise BusSecurityError(
                f"the bus at {self._address.shown} does not let this user do that: "
                f"{self._message(error)}"
            ) from None
        except ResponseError:
            is_answered = True
            raise
        except _TooLongError:
            raise OverlongReplyError(
                f"the bus at {self._address.shown} answers {plain(arguments[0])} with more "
                f"than {MAX_REPLY_BYTES:,} bytes"
            ) from None
        except (RedisConnectionError, RedisTimeoutError, RedisError, OSError) as error:
            # TimeoutError is an OSError. A connection wraps what its opening was refused with.
            if isinstance(error, AuthenticationError) or isinstance(
                error.__cause__, AuthenticationError
            ):
                raise BusSecurityError(
                    f"the bus at {self._address.shown} refuses the user or password: "
                    f"{self._message(error)}"
                ) from None
            self._breaker.fail()
            raise BusUnavailableError(
                f"the bus at {self._address.shown} does not answer: {self._message(error)}"
            ) from None
        finally:
            if not is_answered:
                await self._drop()
        self._breaker.succeed()
        return answer

    async def run(
        self, script: Script, keys: list[str], arguments: list[Any], *, timeout_seconds: float
    ) -> Any:
        """Runs a script, and loads it into the server first if it is not there."""
        rest = (len(keys), *keys, *arguments)
        async with self._lock:
            try:
                return await self._call(("EVALSHA", script.digest, *rest), timeout_seconds)
            except NoScriptError:
                return await self._call(("EVAL", script.text, *rest), timeout_seconds)

    async def _connect(self) -> None:
        """Connects, authenticates, and selects the database."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._connection.connect()
        except RedisError as error:
            text, cause = self._message(error), error.__cause__ or error
            if isinstance(cause, NoPermissionError | AuthenticationError):
                raise BusSecurityError(
                    f"the bus at {self._address.shown} refuses the user or password: {text}"
                ) from None
            if "DB index" in text:
                raise BusAddressError(
                    f"the bus at {self._address.shown} has no such database: {text}; name another "
                    "one after the host, as in redis://host:6379/0"
                ) from None
            raise

    def _message(self, error: BaseException) -> str:
        """The message of an error without the password, which some servers repeat."""
        return plain(self._address.hide(str(error)), limit=500) or type(error).__name__

    async def _drop(self) -> None:
        await self._connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Disconnects."""
        await self._connection.disconnect(nowait=True)
