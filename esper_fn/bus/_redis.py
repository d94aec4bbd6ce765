"""The bus on Redis Streams (Redis 7.0 or newer, or Valkey)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from secrets import token_hex
from typing import Any

from redis.exceptions import ResponseError

from esper_fn.bus._address import Address, check_reach
from esper_fn.bus._connection import OverlongReplyError, Script
from esper_fn.bus._keyspace import Keyspace
from esper_fn.bus._messages import COMMAND_TOPICS, LIMITS, Topic
from esper_fn.bus._protocol import (
    Portion,
    Portions,
    attachment,
    deliveries,
    server_ms,
    settlement_arguments,
)
from esper_fn.bus._transport import (
    BEGINNING,
    RUN_GROUP,
    Attachment,
    Delivery,
    Entry,
    Lease,
    OtherRunError,
    Publication,
    Renewal,
    Settlement,
    milliseconds,
)
from esper_fn.errors import (
    BusSecurityError,
    BusyError,
    FencedError,
    LeaseHeldError,
)

_PRODUCER_SECONDS = 86_400
"""How long the last number of a producer is kept; no publication is repeated after that."""
_LONGEST_BLOCK_SECONDS = 20.0
"""A blocking read is repeated after that, to notice a connection that is silently dead."""
_BLOCK_GRACE_SECONDS = 3.0

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
        self._portions = Portions(self._keys.portion, self.stream)
        self._last_read: dict[tuple[str, Topic], str] = {}
        """The last entry that has arrived, by reader of a group and topic."""

    @property
    def is_down(self) -> bool:
        """Whether the server does not answer at present."""
        return self._keys.is_down

    def stream(self, topic: Topic) -> str:
        """See `Transport`."""
        return self._keys.key(topic)

    async def open(self) -> int:
        """See `Transport`."""
        check_reach(self._address, {}, has_key=self._has_key)
        seconds, micros = await self._keys.call("TIME")
        settings: dict[str, str] = {}
        try:
            for name in ("bind", "protected-mode", "port", "requirepass"):
                pair = [part.decode() for part in await self._keys.call("CONFIG", "GET", name)]
                settings.update(zip(pair[::2], pair[1::2], strict=True))
        except (ResponseError, BusSecurityError):
            settings = {}  # its access rules hide its settings
        check_reach(self._address, settings, has_key=self._has_key)
        return server_ms(seconds, micros)

    async def publish(
        self,
        topic: Topic,
        producer: str,
        first: int,
        entries: Sequence[Entry],
        *,
        identity: str | None = None,
    ) -> Publication:
        """See `Transport`."""
        limits = LIMITS[topic]
        arguments: list[Any] = [
            first,
            limits.max_entries,
            int(limits.refuses),
            _PRODUCER_SECONDS,
            RUN_GROUP,
            token_hex(8),
            identity or "",
        ]
        for payload, signature in entries:
            arguments += (payload, signature)
        names = (topic.value, f"last:{topic.value}:{producer}", "generation", "run")
        count, detail = await self._keys.script(_PUBLISH, names, arguments)
        if count == -2:
            raise OtherRunError(detail.decode(errors="replace"))
        if count < 0:
            raise BusyError(
                f"{detail:,} entries wait on {self.stream(topic)}, at most {limits.max_entries:,}; "
                "send more slowly, or wait for outcomes"
            )
        return Publication(count, detail.decode(errors="replace"))

    async def read(
        self,
        topics: Sequence[Topic],
        group: str,
        consumer: str,
        *,
        limit: int,
        wait_seconds: float | None,
    ) -> list[Delivery]:
        """See `Transport`."""
        streams = [self.stream(topic) for topic in topics]
        reader = f"read {group} {consumer} {'+'.join(topics)}"

        async def portion(topic: Topic) -> Portion:
            last = self._last_read.get((reader, topic), BEGINNING)
            return await self._portions.new(topic, group, consumer, last, limit)

        async def attempt(block: list[Any], timeout: float) -> list[Delivery]:
            command = ["XREADGROUP", "GROUP", group, consumer, "COUNT", limit, *block]
            command += ["STREAMS", *streams, *(">" for _ in topics)]
            try:
                return await self._entries(reader, topics, command, timeout, portion)
            except ResponseError as error:
                if not str(error).startswith(_MISSING):
                    raise
                await self._make_groups(streams, group)
                return await self._entries(reader, topics, command, timeout, portion)

        entries = await _wait_for(attempt, wait_seconds)
        for entry in entries:
            self._last_read[reader, entry.topic] = entry.entry_id
        return entries

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""
        topics, last = list(after), list(after.values())
        streams = [self.stream(topic) for topic in topics]
        reader = f"tail {'+'.join(topics)}"

        async def portion(topic: Topic) -> Portion:
            return await self._portions.after(topic, after[topic], limit)

        async def attempt(block: list[Any], timeout: float) -> list[Delivery]:
            command = ["XREAD", "COUNT", limit, *block, "STREAMS", *streams, *last]
            return await self._entries(reader, topics, command, timeout, portion)

        return await _wait_for(attempt, wait_seconds)

    async def _entries(
        self,
        reader: str,
        topics: Sequence[Topic],
        command: list[Any],
        timeout: float,
        portion: Callable[[Topic], Awaitable[Portion]],
    ) -> list[Delivery]:
        """The answer to a reading command, or portions where it is too large."""

        async def whole() -> list[Delivery]:
            # Several may follow the same topics: none waits behind another's blocking read.
            names = (f"{reader} {number}" for number in itertools.count())
            idle = next(c for c in map(self._keys.connection, names) if not c.is_busy)
            answer = await idle.call(*command, timeout_seconds=timeout)
            return deliveries(topics, [self.stream(topic) for topic in topics], answer)

        return await self._portions.read(reader, topics, whole, portion)

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        out = {}
        for topic in topics:
            try:
                rows = await self._keys.call("XREVRANGE", self.stream(topic), "+", "-", "COUNT", 1)
            except OverlongReplyError:
                out[topic] = await self._portions.last_id(topic)
            else:
                out[topic] = rows[0][0].decode() if rows else BEGINNING
        return out

    async def acknowledge(self, topic: Topic, group: str, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        if not entry_ids:
            return 0
        return int(await self._keys.call("XACK", self.stream(topic), group, *entry_ids))

    async def claim(
        self, topic: Topic, group: str, consumer: str, *, idle_seconds: float, limit: int
    ) -> list[Delivery]:
        """See `Transport`."""
        stream = self.stream(topic)
        try:
            return await self._portions.idle(
                topic, group, consumer, seconds=idle_seconds, limit=limit
            )
        except ResponseError as error:
            if not str(error).startswith(_MISSING):
                raise
            await self._make_groups([stream], group)
            return []

    async def attach(
        self,
        holder: str,
        *,
        lease_seconds: float,
        least_epoch: int = 0,
        cursor: Mapping[Topic, str] | None = None,
        should_take_over: bool = False,
        identity: str = "",
        counts_attempts: bool = True,
    ) -> Attachment:
        """See `Transport`."""
        names = ("lease", "run", "generation", "sequences", "attempts", *COMMAND_TOPICS)
        cursors = [
            "" if cursor is None else cursor.get(topic, BEGINNING) for topic in COMMAND_TOPICS
        ]
        answer = await self._keys.script(
            _ATTACH,
            names,
            [
                holder,
                milliseconds(lease_seconds),
                least_epoch,
                int(should_take_over),
                RUN_GROUP,
                token_hex(8),
                identity,
                int(counts_attempts),
                *cursors,
            ],
        )
        if not answer[0]:
            raise LeaseHeldError(
                answer[1].decode(errors="replace"), answer[2] / 1000, int(answer[3])
            )
        streams = {self.stream(topic): topic for topic in COMMAND_TOPICS}
        result, leftovers = attachment(holder, streams, answer)
        for topic, counts in leftovers.items():
            result.leftovers.extend(await self._portions.by_id(topic, counts))
        return result

    async def renew(
        self,
        lease: Lease,
        *,
        lease_seconds: float,
        identity: str = "",
        last_read: Mapping[Topic, str] | None = None,
    ) -> Renewal:
        """See `Transport`."""
        answer = await self._keys.script(
            _RENEW,
            ("lease", "run", *COMMAND_TOPICS),
            [
                lease.holder,
                lease.epoch,
                milliseconds(lease_seconds),
                RUN_GROUP,
                identity,
                *((last_read or {}).get(topic, "") for topic in COMMAND_TOPICS),
            ],
        )
        self._check(answer, lease)
        _, seconds, micros, exhausted = answer
        return Renewal(
            server_ms(seconds, micros), frozenset(COMMAND_TOPICS[index] for index in exhausted)
        )

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        await self._keys.script(_RELEASE, ("lease",), [lease.holder, lease.epoch])

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """See `Transport`."""
        topics = (Topic.OUTCOMES, Topic.DEAD, *COMMAND_TOPICS)
        names = ("lease", "run", "sequences", "attempts", *topics)
        arguments = settlement_arguments(lease, settlement)
        self._check(await self._keys.script(_SETTLE, names, arguments), lease)

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

    async def _make_groups(self, streams: Sequence[str], group: str) -> None:
        if group.startswith(RUN_GROUP):
            raise FencedError(f"the lease on run {self.run!r} of group {group} is over")
        for stream in streams:
            try:
                await self._keys.call("XGROUP", "CREATE", stream, group, BEGINNING, "MKSTREAM")
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    def _check(self, answer: list[Any], lease: Lease) -> None:
        if answer[0]:
            return
        epoch, holder = int(answer[1]), answer[2].decode(errors="replace")
        if epoch <= lease.epoch or holder == lease.holder:
            raise FencedError(f"the lease of run {self.run!r} (epoch {lease.epoch}) was removed")
        raise FencedError(
            f"run {self.run!r} is driven by {holder} now (epoch {epoch}); this process held "
            f"epoch {lease.epoch} and must not go on",
            epoch,
        )


async def _wait_for(
    attempt: Callable[[list[Any], float], Awaitable[list[Delivery]]], wait_seconds: float | None
) -> list[Delivery]:
    """Repeats a read, which gets its BLOCK option and a timeout, until it has entries."""
    loop = asyncio.get_running_loop()
    until = None if wait_seconds is None else loop.time() + wait_seconds
    while True:
        left = _LONGEST_BLOCK_SECONDS
        if until is not None:
            left = min(left, until - loop.time())
        block = ["BLOCK", milliseconds(left)] if left > 0 else []
        entries = await attempt(block, max(0.0, left) + _BLOCK_GRACE_SECONDS)
        if entries or (until is not None and loop.time() >= until):
            return entries
