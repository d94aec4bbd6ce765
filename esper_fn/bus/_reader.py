"""Reads streams on a Redis server, in portions while answers are too large."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from esper_fn.bus._connection import Keyspace, OverlongReplyError, Script
from esper_fn.bus._messages import LIMITS, Topic
from esper_fn.bus._transport import BEGINNING, READ_BYTES, Delivery, Lease, milliseconds

_LOGGER = logging.getLogger(__name__)
_PORTION = Script("portion")
_ENTRY_OVERHEAD_BYTES = 2_048
"""The names of fields and the signature of an entry."""
_MAX_ENTRIES = 500
_LONGEST_BLOCK_SECONDS = 20.0
"""A blocking read is repeated after that, to notice a connection that is silently dead."""
_BLOCK_GRACE_SECONDS = 3.0


class _Portion(NamedTuple):
    deliveries: list[Delivery]
    is_all: bool
    following: str
    """Where the next portion begins."""


class Reader:
    """Reads the streams of a run.

    An ordinary command may answer with more than `MAX_REPLY_BYTES`, as anybody can write entries of
    any size. The script `portion` limits every answer to about `READ_BYTES` and withholds entries
    that are too large. It costs the server more and cannot wait, so it is used only while ordinary
    answers are too large.

    Args:
      keys: the keys of the run.
    """

    def __init__(self, keys: Keyspace) -> None:
        self._keys = keys
        self._overloaded: set[object] = set()
        """Readers whose last ordinary answer was too large."""

    async def read(
        self,
        command: list[Any],
        after: Mapping[Topic, str],
        selection: Callable[[Topic], list[Any]],
        limit: int,
        wait_seconds: float | None,
    ) -> list[Delivery]:
        """Repeats a reading command until it brings entries or time is up.

        Args:
          command: the command up to its options; each has a connection of its own.
          after: what each stream is read after, in the words of the command.
          selection: the same for a topic in the words of the script.
          limit: most entries of each stream.
          wait_seconds: how long to wait; for ever with None.
        """
        loop = asyncio.get_running_loop()
        reader = (*command, *after)
        until = math.inf if wait_seconds is None else loop.time() + wait_seconds
        topics = {self._keys.key(topic): topic for topic in after}
        while True:
            left = min(_LONGEST_BLOCK_SECONDS, until - loop.time())
            block = ["BLOCK", milliseconds(left)] if left > 0 else []
            options = ["COUNT", limit, *block, "STREAMS", *topics, *after.values()]
            entries: list[Delivery] = []
            if reader not in self._overloaded:
                # Several may follow the same topics: none waits behind another's blocking read.
                names = ((reader, number) for number in itertools.count())
                idle = next(c for c in map(self._keys.connection, names) if not c.is_busy)
                timeout = max(0.0, left) + _BLOCK_GRACE_SECONDS
                try:
                    answer = await idle.call(*command, *options, timeout_seconds=timeout)
                    entries = _deliveries(topics, answer)
                except OverlongReplyError as error:
                    _LOGGER.info("%s; it is read in portions", error)
                    self._overloaded.add(reader)
            if reader in self._overloaded:
                parts = [await self._portion(topic, limit, *selection(topic)) for topic in after]
                if all(part.is_all for part in parts):
                    self._overloaded.discard(reader)
                entries = [delivery for part in parts for delivery in part.deliveries]
            if entries or loop.time() >= until:
                return entries

    async def last_id(self, topic: Topic) -> str:
        """Id of the last entry."""
        stream = self._keys.key(topic)
        try:
            rows = await self._keys.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
        except OverlongReplyError:
            rows = [[d.entry_id.encode()] for d in (await self._portion(topic, 1, "last"))[0]]
        return rows[0][0].decode() if rows else BEGINNING

    async def again(self, topic: Topic, lease: Lease) -> list[Delivery]:
        """Entries that were delivered with a lease and not acknowledged."""
        entries: list[Delivery] = []
        part = _Portion([], is_all=False, following=BEGINNING)
        while not part.is_all:
            selection = ("again", lease.group, lease.holder, part.following)
            part = await self._portion(topic, _MAX_ENTRIES, *selection)
            entries += part.deliveries
        return entries

    async def by_id(self, topic: Topic, counts: Mapping[str, int]) -> list[Delivery]:
        """Entries with these ids that still exist, with their numbers of deliveries."""
        entries: list[Delivery] = []
        ids = list(counts)
        while ids:
            part = await self._portion(topic, len(ids), "named", *ids[:_MAX_ENTRIES])
            entries += [d._replace(deliveries=counts[d.entry_id]) for d in part.deliveries]
            ids = ids[int(part.following) :]
        return entries

    async def _portion(self, topic: Topic, limit: int, *selection: Any) -> _Portion:
        # On a connection of its own, as it may take long.
        rows, is_all, following = await self._keys.connection("portions").run(
            _PORTION,
            [self._keys.key(topic)],
            [min(limit, _MAX_ENTRIES), READ_BYTES, _max_stored_bytes(topic), *selection],
        )
        entries = [
            Delivery(topic, entry_id.decode(), payload, signature, count, withheld)
            for entry_id, withheld, payload, signature, count in rows
        ]
        return _Portion(entries, bool(is_all), following.decode())


def _max_stored_bytes(topic: Topic) -> int:
    """Largest size of an entry, with all its fields, that is read at all."""
    return LIMITS[topic].max_entry_bytes + _ENTRY_OVERHEAD_BYTES


def _deliveries(topics: Mapping[str, Topic], answer: Any) -> list[Delivery]:
    """The entries of an answer to XREAD or XREADGROUP, in the order of the topics."""
    by_stream = {name.decode(): rows for name, rows in answer or ()}
    return [
        _delivery(topic, entry_id.decode(), fields)
        for stream, topic in topics.items()
        for entry_id, fields in by_stream.get(stream, ())
    ]


def _delivery(topic: Topic, entry_id: str, fields: list[bytes]) -> Delivery:
    size_bytes = sum(map(len, fields or ()))
    if fields and fields[0] == b"m" and size_bytes <= _max_stored_bytes(topic):
        signature = fields[3] if len(fields) > 3 and fields[2] == b"s" else b""
        return Delivery(topic, entry_id, fields[1], signature)
    # A foreign entry, or one that has no fields any more: nothing in it can be read.
    return Delivery(topic, entry_id, b"", withheld_bytes=size_bytes)
