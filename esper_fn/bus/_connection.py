"""Connections to a Redis server, without hidden retries, and the keys of one run there."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hiredis
import redis.asyncio as redis_asyncio
import redis.exceptions as redis_errors
from redis._parsers import _AsyncHiredisParser
from redis.asyncio.retry import Retry as RedisRetry
from redis.backoff import NoBackoff

from esper_fn._text import plain
from esper_fn.bus._address import Address
from esper_fn.bus._messages import Topic
from esper_fn.bus._timing import CircuitBreaker
from esper_fn.bus._transport import RUN_GROUP, RUN_NAME, exhausted_text
from esper_fn.errors import BusAddressError, BusError, BusSecurityError, BusUnavailableError

_LOGGER = logging.getLogger(__name__)
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 5.0
"""How long to wait for an answer, unless a read waits for entries."""
_LUA = Path(__file__).parent / "lua"
MAX_REPLY_BYTES = 4 << 20
"""Largest answer; a connection that brings more is dropped, as anybody may write entries."""
_LEASES = "esper:{*}:lease"
"""Pattern of the leases of all runs."""


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
            raise redis_errors.ConnectionError("Connection closed by server.")
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


_REPAIR = Script("repair")
_EXHAUSTED = Script("exhausted", "groups")
_RUNS = Script("runs")


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
            is_tls = address.shown.startswith("rediss")
            connection = redis_asyncio.SSLConnection if is_tls else redis_asyncio.Connection
            options["socket_keepalive"] = True
            options["socket_keepalive_options"] = {
                getattr(socket, name): value
                for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
                if hasattr(socket, name)
            }
        self._connection = connection(
            protocol=2,
            parser_class=_Parser,
            retry=RedisRetry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=_CONNECT_SECONDS,
            **options,
        )
        self._lock = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a call is running."""
        return self._lock.locked()

    async def call(self, *arguments: Any, timeout_seconds: float = _ANSWER_SECONDS) -> Any:
        """Sends a command and returns the server's answer.

        Raises:
          BusUnavailableError: the server does not answer, or cannot answer now.
          OverlongReplyError: the answer is too large; the command was executed.
          ResponseError: the server refuses.
        """
        async with self._lock:
            return await self._call(arguments, timeout_seconds)

    async def run(self, script: Script, keys: list[str], arguments: list[Any]) -> Any:
        """Runs a script, and loads it into the server first if it is not there."""
        rest = (len(keys), *keys, *arguments)
        async with self._lock:
            try:
                return await self._call(("EVALSHA", script.digest, *rest), _ANSWER_SECONDS)
            except redis_errors.NoScriptError:
                return await self._call(("EVAL", script.text, *rest), _ANSWER_SECONDS)

    async def _call(self, arguments: tuple[Any, ...], timeout_seconds: float) -> Any:
        name = f"the bus at {self._address.shown}"
        if left := self._breaker.seconds_left():
            raise BusUnavailableError(f"{name} does not answer; next attempt in {left:.1f} s")
        is_answered = False
        try:
            async with asyncio.timeout(timeout_seconds):
                if not self._connection.is_connected:
                    await self._connect(name)
                await self._connection.send_packed_command(hiredis.pack_command(arguments))
                answer = await self._connection.read_response(disconnect_on_error=False)
            is_answered = True
        except (
            redis_errors.BusyLoadingError,
            redis_errors.OutOfMemoryError,
            redis_errors.ReadOnlyError,
        ) as error:
            # Behind the address of a read-only server another one may answer by now.
            is_answered = not isinstance(error, redis_errors.ReadOnlyError)
            text = f"{name} cannot take this now: {self._message(error)}"
            raise BusUnavailableError(text) from None
        except redis_errors.NoPermissionError as error:
            is_answered = True
            text = f"{name} does not let this user do that: {self._message(error)}"
            raise BusSecurityError(text) from None
        except redis_errors.ResponseError:
            is_answered = True
            raise
        except _TooLongError:
            command = plain(arguments[0])
            text = f"{name} answers {command} with more than {MAX_REPLY_BYTES:,} bytes"
            raise OverlongReplyError(text) from None
        except redis_errors.AuthenticationError as error:
            text = f"{name} refuses the user or password: {self._message(error)}"
            raise BusSecurityError(text) from None
        except (redis_errors.RedisError, OSError) as error:  # TimeoutError is an OSError
            self._breaker.fail()
            text = f"{name} does not answer: {self._message(error)}"
            raise BusUnavailableError(text) from None
        finally:
            if not is_answered:
                await self.close()
        self._breaker.succeed()
        return answer

    async def _connect(self, name: str) -> None:
        """Connects, authenticates, and selects the database."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._connection.connect()
        except redis_errors.RedisError as error:
            # A connection wraps what its opening was refused with.
            text = self._message(error)
            if isinstance(
                error.__cause__ or error,
                redis_errors.NoPermissionError | redis_errors.AuthenticationError,
            ):
                raise redis_errors.AuthenticationError(text) from None
            if "DB index" in text:
                raise BusAddressError(
                    f"{name} has no such database: {text}; name another one after the host, as in "
                    "redis://host:6379/0"
                ) from None
            raise

    def _message(self, error: BaseException) -> str:
        """The message of an error without the password, which some servers repeat."""
        return plain(self._address.hide(str(error)), limit=500) or type(error).__name__

    async def close(self) -> None:
        """Disconnects."""
        await self._connection.disconnect(nowait=True)


class Keyspace:
    """Calls commands and scripts on the keys of a run.

    Args:
      address: address of the server.
      run: name of the run.
    """

    def __init__(self, address: Address, run: str) -> None:
        self._address = address
        self._name = run
        self.breaker = CircuitBreaker()
        self._connections: dict[object, Connection] = {}
        self._is_closed = False

    def key(self, name: str) -> str:
        """The key of a name. The braces keep all keys of a run on one node of a cluster."""
        return f"esper:{{{self._name}}}:{name}"

    def connection(self, role: object) -> Connection:
        """The connection for a role, which is made when it is first used.

        Raises:
          BusUnavailableError: `close` was called.
        """
        if self._is_closed:
            raise BusUnavailableError("this connection to the bus is closed; open another one")
        if role not in self._connections:
            self._connections[role] = Connection(self._address, self.breaker)
        return self._connections[role]

    async def call(self, *arguments: Any) -> Any:
        """Calls a command; see `Connection.call`."""
        return await self.connection("write").call(*arguments)

    async def script(self, script: Script, names: Sequence[str], arguments: list[Any]) -> Any:
        """Runs a script on keys, and again after removing those of a wrong type.

        Args:
          script: the script.
          names: names of its keys.
          arguments: its arguments.

        Raises:
          BusError: a stream cannot take more entries.
        """
        keys, run = list(map(self.key, names)), self.connection("write").run
        try:
            return await run(script, keys, arguments)
        except redis_errors.ResponseError as error:
            if "stream has exhausted" in str(error):
                streams = await run(_EXHAUSTED, keys, [RUN_GROUP])
                raise BusError(exhausted_text(key.decode() for key in streams)) from None
            if not str(error).startswith("WRONGTYPE"):
                raise
        removed = await run(_REPAIR, keys, list(map(_type, names)))
        _LOGGER.error(
            "keys of run %r on the bus were of a wrong type and are removed: %s",
            self._name,
            ", ".join(repr(key.decode(errors="replace")) for key in removed) or "gone by now",
        )
        return await run(script, keys, arguments)

    async def active_runs(self) -> list[str]:
        """Names of all runs on the server that have a lease."""
        names: set[str] = set()
        cursor, (head, foot) = b"0", _LEASES.split("*")
        while True:
            try:
                cursor, keys = await self.call("SCAN", cursor, "MATCH", _LEASES, "COUNT", 500)
            except OverlongReplyError:
                cursor, keys = await self.script(_RUNS, (), [cursor, _LEASES, 200])
            names |= {
                key.decode("utf-8", "replace").removeprefix(head).removesuffix(foot) for key in keys
            }
            if cursor == b"0":
                # Anybody may write keys; only allowed names are names of runs.
                return sorted(filter(RUN_NAME.fullmatch, names))

    async def close(self) -> None:
        """Disconnects."""
        self._is_closed = True
        for connection in self._connections.values():
            await connection.close()


def _type(name: str) -> str:
    if name in set(Topic):
        return "stream"
    return "hash" if name in {"run", "sequences", "attempts"} else "string"
