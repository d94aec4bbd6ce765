"""The keys of one run on a Redis server, and the connections to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from esper_fn.bus._address import Address
from esper_fn.bus._connection import Connection, OverlongReplyError, Script
from esper_fn.bus._messages import Topic
from esper_fn.bus._timing import CircuitBreaker
from esper_fn.bus._transport import RUN_GROUP, RUN_NAME, exhausted_text
from esper_fn.errors import BusError, BusUnavailableError

_LOGGER = logging.getLogger(__name__)
_REPAIR = Script("repair")
_EXHAUSTED = Script("exhausted", "groups")
_RUNS = Script("runs")
_LEASES = "esper:{*}:lease"
"""Pattern of the leases of all runs."""


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
        except ResponseError as error:
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
