"""The bus on Redis Streams (Redis 7.0 or newer, or Valkey)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from secrets import token_hex
from typing import Any

from redis.exceptions import ResponseError

from esper_fn.bus import _scripts
from esper_fn.bus._address import Address, check_reach
from esper_fn.bus._link import Link, OverlongReplyError, Script
from esper_fn.bus._portions import Portion, Portions
from esper_fn.bus._replies import attached, deliveries, server_ms
from esper_fn.bus._requests import settlement_arguments
from esper_fn.bus._resilience import CircuitBreaker
from esper_fn.bus._topics import COMMAND_TOPICS, POLICIES, Topic, WhenFull
from esper_fn.bus._transport import (
    BEGINNING,
    RUN_GROUP,
    RUN_NAME,
    Attached,
    Delivery,
    Entry,
    Lease,
    LeaseHeldError,
    OtherRunError,
    Published,
    Renewed,
    Settlement,
    exhausted_words,
    milliseconds,
)
from esper_fn.errors import (
    BusError,
    BusSecurityError,
    BusUnavailableError,
    BusyError,
    FencedError,
)

_LOGGER = logging.getLogger(__name__)
_PRODUCER_SECONDS = 86_400
"""How long a producer's last number is kept; an attempt is never repeated after that."""
_LONGEST_BLOCK_SECONDS = 20.0
"""A blocking read is renewed after that, to notice a connection that died without a word."""
_BLOCK_GRACE_SECONDS = 3.0

_PUBLISH = Script(_scripts.PUBLISH)
_ATTACH = Script(_scripts.ATTACH)
_RENEW = Script(_scripts.RENEW)
_RELEASE = Script(_scripts.RELEASE)
_SETTLE = Script(_scripts.SETTLE)
_BURY = Script(_scripts.BURY)
_REPAIR = Script(_scripts.REPAIR)
_EXHAUSTED = Script(_scripts.EXHAUSTED)
_PORTION = Script(_scripts.PORTION)
_RUNS = Script(_scripts.RUNS)
_GONE = ("NOGROUP", "UNBLOCKED", "WRONGTYPE")
"""How a server says that a group, or the stream it belongs to, is not there (any more)."""
_HASHES = {"run", "sequences", "attempts"}


class RedisTransport:
    """A `Transport` on a Redis server.

    Every write is one script, so it happens wholly or not at all and may be repeated. Readers have
    connections of their own, without a socket timeout. One whose answer is too large goes on in
    portions until it has read all that is there.

    Args:
      address: of the server.
      run: whose streams.
      has_key: messages are signed; a server other machines can reach is refused without.
      timeout_seconds: for an answer to anything but a blocking read.
      clock: seconds, rising.
    """

    def __init__(
        self,
        address: Address,
        run: str,
        *,
        has_key: bool,
        timeout_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._name = run
        self._has_key = has_key
        self._timeout = timeout_seconds
        self._breaker = CircuitBreaker(clock=clock)
        self._links: dict[str, Link] = {}
        self._portions = Portions(self._portion, self.stream)
        self._handed: dict[tuple[str, Topic], str] = {}
        """The last entry that surely came, for each role of a group's readers."""
        self._is_closed = False

    @property
    def run(self) -> str:
        """See `Transport`."""
        return self._name

    @property
    def is_down(self) -> bool:
        """Whether the server is known not to answer."""
        return self._breaker.is_open

    def stream(self, topic: Topic) -> str:
        """See `Transport`."""
        return self._key(topic)

    async def open(self) -> int:
        """See `Transport`."""
        check_reach(self._address, {}, has_key=self._has_key)
        seconds, micros = await self._call("TIME")
        settings: dict[str, str] = {}
        try:
            for name in ("bind", "protected-mode", "port", "requirepass"):
                pair = [part.decode() for part in await self._call("CONFIG", "GET", name)]
                settings.update(zip(pair[::2], pair[1::2], strict=True))
        except (ResponseError, BusSecurityError):
            settings = {}  # a server whose access rules keep its settings to itself
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
    ) -> Published:
        """See `Transport`."""
        policy = POLICIES[topic]
        arguments: list[Any] = [
            first,
            policy.max_entries,
            int(policy.when_full is WhenFull.REFUSE),
            _PRODUCER_SECONDS,
            RUN_GROUP,
            token_hex(8),
            identity or "",
        ]
        for payload, signature in entries:
            arguments += (payload, signature)
        keys = [
            self.stream(topic),
            self._key(f"last:{topic.value}:{producer}"),
            self._key("generation"),
            self._key("run"),
        ]
        count, told = await self._script(_PUBLISH, keys, arguments)
        if count == -2:
            raise OtherRunError(told.decode(errors="replace"))
        if count < 0:
            raise BusyError(
                f"{told:,} entries wait on {self.stream(topic)}, at most {policy.max_entries:,}; "
                "send more slowly, or wait for outcomes"
            )
        return Published(count, told.decode(errors="replace"))

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
        role = f"read {group} {consumer} {'+'.join(topics)}"
        head = ["XREADGROUP", "GROUP", group, consumer, "COUNT", limit]
        tail = ["STREAMS", *streams, *(">" for _ in topics)]

        async def portion(topic: Topic) -> Portion:
            last = self._handed.get((role, topic), BEGINNING)
            return await self._portions.new(topic, group, consumer, last, limit)

        async def whole(block: list[Any], timeout: float) -> list[Delivery]:
            answer = await self._link(role).call(*head, *block, *tail, timeout_seconds=timeout)
            return deliveries(topics, streams, answer)

        async def once(block: list[Any], timeout: float) -> list[Delivery]:
            try:
                found = await self._portions.read(
                    role, topics, partial(whole, block, timeout), portion
                )
            except ResponseError as error:
                if not str(error).startswith(_GONE):
                    raise
                await self._make_groups(streams, group)
                found = await self._portions.read(
                    role, topics, partial(whole, block, timeout), portion
                )
            for one in found:
                self._handed[role, one.topic] = one.entry_id
            return found

        return await self._wait_for(once, wait_seconds)

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """See `Transport`."""
        topics = list(after)
        streams = [self.stream(topic) for topic in topics]
        last = list(after.values())

        async def portion(topic: Topic) -> Portion:
            return await self._portions.after(topic, after[topic], limit)

        async def whole(block: list[Any], timeout: float) -> list[Delivery]:
            # Several may follow the same topics: none waits behind another's blocking read.
            roles = (f"tail {'+'.join(topics)} {number}" for number in itertools.count())
            link = next(link for link in map(self._link, roles) if not link.is_busy)
            answer = await link.call(
                "XREAD", "COUNT", limit, *block, "STREAMS", *streams, *last, timeout_seconds=timeout
            )
            return deliveries(topics, streams, answer)

        async def once(block: list[Any], timeout: float) -> list[Delivery]:
            role = f"tail {'+'.join(topics)}"
            return await self._portions.read(role, topics, partial(whole, block, timeout), portion)

        return await self._wait_for(once, wait_seconds)

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """See `Transport`."""
        out = {}
        for topic in topics:
            try:
                rows = await self._call("XREVRANGE", self.stream(topic), "+", "-", "COUNT", 1)
            except OverlongReplyError:
                out[topic] = await self._portions.last_id(topic)
            else:
                out[topic] = rows[0][0].decode() if rows else BEGINNING
        return out

    async def acknowledge(self, topic: Topic, group: str, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        if not entry_ids:
            return 0
        return int(await self._call("XACK", self.stream(topic), group, *entry_ids))

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
            if not str(error).startswith(_GONE):
                raise
            await self._make_groups([stream], group)
            return []

    async def bury(self, topic: Topic, group: str, entry_ids: Sequence[str], dead: Entry) -> None:
        """See `Transport`."""
        keys = [self.stream(topic), self.stream(Topic.DEAD)]
        limit = POLICIES[Topic.DEAD].max_entries
        await self._script(_BURY, keys, [group, limit, *dead, *entry_ids])

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
    ) -> Attached:
        """See `Transport`."""
        keys = [
            self._lease_key(self._name),
            *map(self._key, ("run", "generation", "sequences", "attempts")),
            *map(self.stream, COMMAND_TOPICS),
        ]
        cursors = [
            "" if cursor is None else cursor.get(topic, BEGINNING) for topic in COMMAND_TOPICS
        ]
        answer = await self._script(
            _ATTACH,
            keys,
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
        streams = list(map(self.stream, COMMAND_TOPICS))
        found, leftovers = attached(holder, COMMAND_TOPICS, streams, answer)
        for topic, counts in leftovers.items():
            found.leftovers.extend(await self._portions.named(topic, counts))
        return found

    async def renew(
        self,
        lease: Lease,
        *,
        lease_seconds: float,
        identity: str = "",
        taken: Mapping[Topic, str] | None = None,
    ) -> Renewed:
        """See `Transport`."""
        keys = [
            self._lease_key(self._name),
            self._key("run"),
            *map(self.stream, COMMAND_TOPICS),
        ]
        answer = await self._script(
            _RENEW,
            keys,
            [
                lease.holder,
                lease.epoch,
                milliseconds(lease_seconds),
                RUN_GROUP,
                identity,
                *((taken or {}).get(topic, "") for topic in COMMAND_TOPICS),
            ],
        )
        self._check(answer, lease)
        _, seconds, micros, exhausted = answer
        return Renewed(
            server_ms(seconds, micros), frozenset(COMMAND_TOPICS[index] for index in exhausted)
        )

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        await self._script(_RELEASE, [self._lease_key(self._name)], [lease.holder, lease.epoch])

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """See `Transport`."""
        keys = [
            self._lease_key(self._name),
            *map(self._key, ("run", "sequences", "attempts")),
            *map(self.stream, (Topic.OUTCOMES, Topic.DEAD, *COMMAND_TOPICS)),
        ]
        arguments = settlement_arguments(lease, settlement)
        self._check(await self._script(_SETTLE, keys, arguments), lease)

    async def trim(self, topic: Topic, before: str) -> int:
        """See `Transport`."""
        return int(await self._call("XTRIM", self.stream(topic), "MINID", before))

    async def page(self, topic: Topic, *, after: str, limit: int) -> list[Delivery]:
        """See `Transport`."""
        return await self._portions.page(topic, after, limit)

    async def discard(self, topic: Topic, entry_ids: Sequence[str]) -> int:
        """See `Transport`."""
        return int(await self._call("XDEL", self.stream(topic), *entry_ids)) if entry_ids else 0

    async def length(self, topic: Topic) -> int:
        """See `Transport`."""
        return int(await self._call("XLEN", self.stream(topic)))

    async def holder(self) -> str | None:
        """See `Transport`."""
        try:
            # Whoever wrote it, and however much.
            held = await self._call("GETRANGE", self._lease_key(self._name), 0, 999)
        except ResponseError as error:
            if not str(error).startswith(_GONE):
                raise
            return None
        return held.decode(errors="replace").partition(" ")[2] if held else None

    async def living(self) -> list[str]:
        """See `Transport`."""
        names: set[str] = set()
        cursor, (head, foot) = b"0", self._lease_key("*").split("*")
        while True:
            pattern = self._lease_key("*")
            try:
                cursor, keys = await self._call("SCAN", cursor, "MATCH", pattern, "COUNT", 500)
            except OverlongReplyError:
                cursor, keys = await self._script(_RUNS, [], [cursor, pattern, 200])
            for key in keys:
                # Anybody may write keys; what no run can be called is none.
                name = key.decode("utf-8", "replace").removeprefix(head).removesuffix(foot)
                if RUN_NAME.fullmatch(name):
                    names.add(name)
            if cursor == b"0":
                return sorted(names)

    async def close(self) -> None:
        """See `Transport`."""
        self._is_closed = True
        for link in self._links.values():
            await link.close()

    # --- parts ---------------------------------------------------------------------------------

    async def _portion(self, keys: list[str], arguments: list[Any]) -> Any:
        # On a connection of its own: no settlement waits while the server looks at large entries.
        link = self._link("portions")
        return await link.run(_PORTION, keys, arguments, timeout_seconds=self._timeout)

    def _key(self, name: str) -> str:
        return f"esper:{{{self._name}}}:{name}"

    @staticmethod
    def _lease_key(run: str) -> str:
        return f"esper:{{{run}}}:lease"

    def _link(self, role: str) -> Link:
        if self._is_closed:
            raise BusUnavailableError("this connection to the bus is closed; open another one")
        if role not in self._links:
            self._links[role] = Link(self._address, self._breaker)
        return self._links[role]

    async def _call(self, *arguments: Any) -> Any:
        return await self._link("write").call(*arguments, timeout_seconds=self._timeout)

    async def _script(self, script: Script, keys: list[str], arguments: list[Any]) -> Any:
        link = self._link("write")
        try:
            return await link.run(script, keys, arguments, timeout_seconds=self._timeout)
        except ResponseError as error:
            if "stream has exhausted" in str(error):
                found = await link.run(_EXHAUSTED, keys, [RUN_GROUP], timeout_seconds=self._timeout)
                raise BusError(exhausted_words(key.decode() for key in found)) from None
            if not str(error).startswith("WRONGTYPE"):
                raise
        removed = await link.run(
            _REPAIR, keys, list(map(self._type, keys)), timeout_seconds=self._timeout
        )
        _LOGGER.error(
            "keys of run %r on the bus were of a wrong type and are removed: %s",
            self._name,
            ", ".join(repr(key.decode(errors="replace")) for key in removed) or "gone by now",
        )
        return await link.run(script, keys, arguments, timeout_seconds=self._timeout)

    def _type(self, key: str) -> str:
        name = key.removeprefix(self._key(""))
        if name in set(Topic):
            return "stream"
        return "hash" if name in _HASHES else "string"

    async def _make_groups(self, streams: Sequence[str], group: str) -> None:
        if group.startswith(RUN_GROUP):
            raise FencedError(f"the lease on run {self._name!r} of group {group} is over")
        for stream in streams:
            try:
                await self._call("XGROUP", "CREATE", stream, group, BEGINNING, "MKSTREAM")
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    @staticmethod
    async def _wait_for(once: Any, wait_seconds: float | None) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        until = None if wait_seconds is None else loop.time() + wait_seconds
        while True:
            left = _LONGEST_BLOCK_SECONDS
            if until is not None:
                left = min(left, until - loop.time())
            block = ["BLOCK", milliseconds(left)] if left > 0 else []
            found: list[Delivery] = await once(block, max(0.0, left) + _BLOCK_GRACE_SECONDS)
            if found or (until is not None and loop.time() >= until):
                return found

    def _check(self, answer: list[Any], lease: Lease) -> None:
        if answer[0]:
            return
        epoch, holder = int(answer[1]), answer[2].decode(errors="replace")
        if epoch <= lease.epoch or holder == lease.holder:
            raise FencedError(f"the place of run {self._name!r} (epoch {lease.epoch}) was removed")
        raise FencedError(
            f"run {self._name!r} is driven by {holder} now (epoch {epoch}); this process held "
            f"epoch {lease.epoch} and must not go on",
            epoch,
        )
