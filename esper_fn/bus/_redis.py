"""The bus on Redis Streams (Redis 7.0 or newer, or Valkey)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from secrets import token_hex
from typing import Any

from redis.exceptions import ResponseError

from esper_fn.bus._address import Address, check_reach
from esper_fn.bus._connection import Keyspace, Script
from esper_fn.bus._messages import COMMAND_TOPICS, LIMITS, Topic
from esper_fn.bus._reader import Reader
from esper_fn.bus._transport import (
    BEGINNING,
    RUN_GROUP,
    Attachment,
    Delivery,
    Entry,
    Lease,
    LeaseRequest,
    OtherRunError,
    Publication,
    Renewal,
    Settlement,
    busy_error,
    fenced_error,
    milliseconds,
)
from esper_fn.errors import BusSecurityError, LeaseHeldError

_PRODUCER_SECONDS = 86_400
"""How long the last number of a producer is kept; no publication is repeated after that."""
_NUMBER = re.compile(rb"-?[0-9]{1,16}")
_PUBLISH = Script("publish")
_ATTACH = Script("attach", "newest", "before")
_RENEW = Script("renew", "newest", "before", "groups")
_RELEASE = Script("release")
_SETTLE = Script("settle", "newest")
_MISSING = ("NOGROUP", "UNBLOCKED", "WRONGTYPE")
"""How a server says that a group or its stream does not exist (any more)."""


class RedisTransport:
    """A `Transport` on a Redis server.

    Every write is one script, so it happens completely or not at all, and may be repeated. Each
    reader has a connection of its own, and reads in portions while answers are too large.

    Args:
      address: address of the server.
      run: name of the run.
      has_key: whether messages are signed; if not, no other machine may reach the server.
    """

    def __init__(self, address: Address, run: str, *, has_key: bool) -> None:
        self._address = address
        self.run = run
        self._has_key = has_key
        self._keys = Keyspace(address, run)
        self._reader = Reader(self._keys)
        self._last_read: dict[tuple[Lease, Topic], str] = {}
        """The last entry that has arrived, by lease and topic."""

    def stream(self, topic: Topic) -> str:
        """See `Transport`."""
        return self._keys.key(topic)

    async def open(self) -> int:
        """See `Transport`."""
        check_reach(self._address, {}, has_key=self._has_key)
        seconds, micros = await self._keys.call("TIME")
        settings: dict[str, str] = {}
        try:
            names = ("bind", "protected-mode", "port", "requirepass")
            flat = [part.decode() for part in await self._keys.call("CONFIG", "GET", *names)]
            settings = dict(zip(flat[::2], flat[1::2], strict=True))
        except (ResponseError, BusSecurityError):
            settings = {}  # its access rules hide its settings
        check_reach(self._address, settings, has_key=self._has_key)
        return _server_ms(seconds, micros)

    async def publish(
        self, topic: Topic, producer: str, first: int, entries: Sequence[Entry], identity: str = ""
    ) -> Publication:
        """See `Transport`."""
        limits = LIMITS[topic]
        arguments: list[Any] = [first, limits.max_entries, int(limits.refuses), _PRODUCER_SECONDS]
        arguments += [RUN_GROUP, token_hex(8), identity]
        for entry in entries:
            arguments += entry
        names = (topic.value, f"last:{topic.value}:{producer}", "generation", "run")
        count, detail = await self._keys.script(_PUBLISH, names, arguments)
        if count == -2:
            raise OtherRunError(detail.decode(errors="replace"))
        if count < 0:
            raise busy_error(self.stream(topic), detail, topic)
        return Publication(count, detail.decode(errors="replace"))

    async def read(
        self, lease: Lease, topic: Topic, *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""

        def selection(topic: Topic) -> list[Any]:
            last = self._last_read.get((lease, topic), BEGINNING)
            return ["new", lease.group, lease.holder, last]

        command = ["XREADGROUP", "GROUP", lease.group, lease.holder]
        with self._fencing(lease):
            entries = await self._reader.read(command, {topic: ">"}, selection, limit, wait_seconds)
        if entries:
            self._last_read[lease, topic] = entries[-1].entry_id
        return entries

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""
        return await self._reader.read(
            ["XREAD"], after, lambda topic: ["after", after[topic]], limit, wait_seconds
        )

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        return {topic: await self._reader.last_id(topic) for topic in topics}

    async def claim(self, lease: Lease, topic: Topic) -> list[Delivery]:
        """See `Transport`."""
        with self._fencing(lease):
            return await self._reader.again(topic, lease)

    async def attach(self, request: LeaseRequest) -> Attachment:
        """See `Transport`."""
        holder, seconds, least_epoch, cursor, should_take_over, identity, counts_attempts = request
        names = ("lease", "run", "generation", "sequences", "attempts", *COMMAND_TOPICS)
        arguments = [holder, milliseconds(seconds), least_epoch, int(should_take_over)]
        arguments += [RUN_GROUP, token_hex(8), identity, int(counts_attempts)]
        for topic in COMMAND_TOPICS:
            arguments.append("" if cursor is None else cursor.get(topic, BEGINNING))
        is_new, *answer = await self._keys.script(_ATTACH, names, arguments)
        if not is_new:
            other, left, epoch = answer
            raise LeaseHeldError(other.decode(errors="replace"), left / 1000, int(epoch))
        epoch, generation, last, sequences, rows, attempts, *time, lost = answer
        streams = {self.stream(topic): topic for topic in COMMAND_TOPICS}
        tries = {}
        for name, count in _numbers(attempts).items():
            stream, _, entry_id = name.rpartition(" ")
            if stream in streams:
                tries[streams[stream], entry_id] = count
        leftovers = []
        for index, topic in enumerate(COMMAND_TOPICS):
            counts = {entry_id.decode(): count for which, entry_id, count in rows if which == index}
            leftovers += await self._reader.by_id(topic, counts)
        return Attachment(
            lease=Lease(holder, epoch, seconds),
            generation=generation.decode(errors="replace"),
            cursor={topic: last[index].decode() for index, topic in enumerate(COMMAND_TOPICS)},
            sequences=_numbers(sequences),
            leftovers=leftovers,
            attempts=tries,
            server_ms=_server_ms(*time),
            lost=frozenset(COMMAND_TOPICS[index] for index in lost),
        )

    async def renew(
        self, lease: Lease, *, identity: str = "", last_read: Mapping[Topic, str] | None = None
    ) -> Renewal:
        """See `Transport`."""
        last = [(last_read or {}).get(topic, "") for topic in COMMAND_TOPICS]
        arguments = [lease.holder, lease.epoch, milliseconds(lease.seconds)]
        arguments += [RUN_GROUP, identity, *last]
        names = ("lease", "run", *COMMAND_TOPICS)
        *time, exhausted = await self._leased(_RENEW, names, arguments, lease)
        return Renewal(_server_ms(*time), frozenset(COMMAND_TOPICS[i] for i in exhausted))

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        await self._keys.script(_RELEASE, ("lease",), [lease.holder, lease.epoch])

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """See `Transport`."""
        topics = (Topic.OUTCOMES, Topic.DEAD, *COMMAND_TOPICS)
        names = ("lease", "run", "sequences", "attempts", *topics)
        number, acks, cursor, sequences, outcomes, dead = settlement
        arguments: list[Any] = [lease.epoch, number, RUN_GROUP]
        arguments += [LIMITS[topic].max_entries for topic in (Topic.OUTCOMES, Topic.DEAD)]
        arguments += [len(outcomes), len(dead), len(sequences), lease.holder]
        for topic in COMMAND_TOPICS:
            arguments += (cursor.get(topic, ""), len(acks.get(topic, ())))
        for topic in COMMAND_TOPICS:
            arguments += acks.get(topic, ())
        for pair in (*outcomes, *dead, *sequences.items()):
            arguments += pair
        await self._leased(_SETTLE, names, arguments, lease)

    async def trim(self, topic: Topic, before: str) -> int:
        """See `Transport`."""
        return int(await self._keys.call("XTRIM", self.stream(topic), "MINID", before))

    async def discard(self, topic: Topic, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        return (
            int(await self._keys.call("XDEL", self.stream(topic), *entry_ids)) if entry_ids else 0
        )

    async def holder(self) -> str | None:
        """See `Transport`."""
        try:
            # Limited, as anybody may have written the value.
            value = await self._keys.call("GETRANGE", self._keys.key("lease"), 0, 999)
        except ResponseError as error:
            if not str(error).startswith(_MISSING):
                raise
            return None
        return value.decode(errors="replace").partition(" ")[2] if value else None

    async def active_runs(self) -> list[str]:
        """See `Transport`."""
        return await self._keys.active_runs()

    async def close(self) -> None:
        """See `Transport`."""
        await self._keys.close()

    async def _leased(
        self, script: Script, names: Sequence[str], arguments: list[Any], lease: Lease
    ) -> list[Any]:
        """Runs a script that only the newest lease may run; returns the rest of its answer."""
        is_newest, *answer = await self._keys.script(script, names, arguments)
        if not is_newest:
            raise fenced_error(self.run, lease, int(answer[0]), answer[1].decode(errors="replace"))
        return answer

    @contextlib.contextmanager
    def _fencing(self, lease: Lease) -> Iterator[None]:
        """A lease whose group does not exist (any more) is over."""
        try:
            yield
        except ResponseError as error:
            if not str(error).startswith(_MISSING):
                raise
            raise fenced_error(self.run, lease) from None


def _server_ms(seconds: bytes, micros: bytes) -> int:
    """Milliseconds of an answer to TIME."""
    return int(seconds) * 1000 + int(micros) // 1000


def _numbers(flat: list[bytes]) -> dict[str, int]:
    """A flat list of names and whole numbers, without anything else that it holds."""
    return {
        name.decode(errors="replace"): int(number)
        for name, number in zip(flat[::2], flat[1::2], strict=True)
        if _NUMBER.fullmatch(number)
    }
