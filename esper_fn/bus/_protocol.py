"""Values to and from a Redis server: arguments of scripts, answers, large streams in portions."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from esper_fn.bus._connection import OverlongReplyError
from esper_fn.bus._messages import COMMAND_TOPICS, LIMITS, Topic
from esper_fn.bus._transport import (
    BEGINNING,
    READ_BYTES,
    RUN_GROUP,
    Attachment,
    Delivery,
    Lease,
    Settlement,
    milliseconds,
)

_LOGGER = logging.getLogger(__name__)
_NUMBER = re.compile(rb"-?[0-9]{1,16}")
_ENTRY_OVERHEAD_BYTES = 2_048
"""The names of fields and the signature of an entry."""
_MAX_ENTRIES = 500


def settlement_arguments(lease: Lease, settlement: Settlement) -> list[Any]:
    """The arguments of the script `settle`, in its order."""
    acks = {topic: settlement.acks.get(topic, ()) for topic in COMMAND_TOPICS}
    arguments: list[Any] = [
        lease.epoch,
        settlement.number,
        RUN_GROUP,
        LIMITS[Topic.OUTCOMES].max_entries,
        LIMITS[Topic.DEAD].max_entries,
        len(settlement.outcomes),
        len(settlement.dead),
        len(settlement.sequences),
        lease.holder,
    ]
    for topic in COMMAND_TOPICS:
        arguments += (settlement.cursor.get(topic, ""), len(acks[topic]))
    for topic in COMMAND_TOPICS:
        arguments += acks[topic]
    for payload, signature in (*settlement.outcomes, *settlement.dead):
        arguments += (payload, signature)
    for name, number in settlement.sequences.items():
        arguments += (name, number)
    return arguments


def server_ms(seconds: bytes, micros: bytes) -> int:
    """Milliseconds of an answer to TIME."""
    return int(seconds) * 1000 + int(micros) // 1000


def _numbers(flat: list[bytes]) -> dict[str, int]:
    """A flat list of names and whole numbers, without anything else that it holds."""
    return {
        name.decode(errors="replace"): int(number)
        for name, number in zip(flat[::2], flat[1::2], strict=True)
        if _NUMBER.fullmatch(number)
    }


def deliveries(topics: Sequence[Topic], streams: Sequence[str], answer: Any) -> list[Delivery]:
    """The entries of an answer to XREAD or XREADGROUP, in the order of the topics."""
    if not answer:
        return []
    by_stream = {name.decode(): rows for name, rows in answer}
    return [
        _delivery(topic, entry_id.decode(), fields)
        for topic, stream in zip(topics, streams, strict=True)
        for entry_id, fields in by_stream.get(stream, ())
    ]


def _delivery(topic: Topic, entry_id: str, fields: list[bytes]) -> Delivery:
    size_bytes = sum(map(len, fields or ()))
    if fields and fields[0] == b"m" and size_bytes <= _max_stored_bytes(topic):
        signature = fields[3] if len(fields) > 3 and fields[2] == b"s" else b""
        return Delivery(topic, entry_id, fields[1], signature)
    # A foreign entry, or one that has no fields any more: nothing in it can be read.
    return Delivery(topic, entry_id, b"", withheld_bytes=size_bytes)


def _max_stored_bytes(topic: Topic) -> int:
    """Largest size of an entry, with all its fields, that is read at all."""
    return LIMITS[topic].max_entry_bytes + _ENTRY_OVERHEAD_BYTES


def attachment(
    holder: str, streams: Mapping[str, Topic], answer: list[Any]
) -> tuple[Attachment, dict[Topic, dict[str, int]]]:
    """An answer to the script `attach`.

    Args:
      holder: holder of the lease.
      streams: topics of the command streams by name, in the order of the call.
      answer: the answer.

    Returns:
      The attachment without its leftovers, and the ids and deliveries of these by topic.
    """
    _, epoch, generation, last, sequences, leftovers, attempts, seconds, micros, lost = answer
    topics = list(streams.values())
    tries = {}
    for name, count in _numbers(attempts).items():
        stream, _, entry_id = name.rpartition(" ")
        if stream in streams:
            tries[streams[stream], entry_id] = count
    ids: dict[Topic, dict[str, int]] = {topic: {} for topic in topics}
    for index, entry_id, count in leftovers:
        ids[topics[index]][entry_id.decode()] = count
    result = Attachment(
        lease=Lease(holder, epoch),
        generation=generation.decode(errors="replace"),
        cursor={topic: cursor.decode() for topic, cursor in zip(topics, last, strict=True)},
        sequences=_numbers(sequences),
        leftovers=[],
        attempts=tries,
        server_ms=server_ms(seconds, micros),
        lost=frozenset(topics[index] for index in lost),
    )
    return result, ids


class Portion(NamedTuple):
    """Some entries of a stream, and how to go on."""

    deliveries: list[Delivery]
    is_all: bool
    following: str
    """Where the next portion begins."""


class Portions:
    """Reads streams by the script `portion`, which limits every answer to about `READ_BYTES`.

    An ordinary command may answer with more than `MAX_REPLY_BYTES`, as anybody can write entries of
    any size. The script withholds those that are too large. It costs the server more and cannot
    wait, so readers use it only while ordinary answers are too large.

    Args:
      run: runs the script with keys and arguments.
      stream: maps a topic to the name of its stream.
    """

    def __init__(
        self,
        run: Callable[[list[str], list[Any]], Awaitable[Any]],
        stream: Callable[[Topic], str],
    ) -> None:
        self._run = run
        self._stream = stream
        self._overloaded: set[str] = set()
        """Readers whose last ordinary answer was too large."""

    async def read(
        self,
        reader: str,
        topics: Sequence[Topic],
        whole: Callable[[], Awaitable[list[Delivery]]],
        portion: Callable[[Topic], Awaitable[Portion]],
    ) -> list[Delivery]:
        """Reads topics by an ordinary command, or in portions until there is nothing more.

        Args:
          reader: name of the reader.
          topics: topics to read.
          whole: the ordinary command, which may wait.
          portion: reads a portion of one topic.
        """
        if reader not in self._overloaded:
            try:
                return await whole()
            except OverlongReplyError as error:
                _LOGGER.info("%s; it is read in portions", error)
                self._overloaded.add(reader)
        parts = [await portion(topic) for topic in topics]
        if all(part.is_all for part in parts):
            self._overloaded.discard(reader)
        return [delivery for part in parts for delivery in part.deliveries]

    async def _portion(self, topic: Topic, limit: int, *selection: Any) -> Portion:
        rows, is_all, following = await self._run(
            [self._stream(topic)],
            [min(limit, _MAX_ENTRIES), READ_BYTES, _max_stored_bytes(topic), *selection],
        )
        entries = [
            Delivery(topic, entry_id.decode(), payload, signature, count, withheld)
            for entry_id, withheld, payload, signature, count in rows
        ]
        return Portion(entries, bool(is_all), following.decode())

    async def after(self, topic: Topic, last: str, limit: int) -> Portion:
        """Entries after one."""
        return await self._portion(topic, limit, "after", last)

    async def last_id(self, topic: Topic) -> str:
        """Id of the last entry."""
        entries = (await self._portion(topic, 1, "last")).deliveries
        return entries[0].entry_id if entries else BEGINNING

    async def new(self, topic: Topic, group: str, consumer: str, last: str, limit: int) -> Portion:
        """New entries of a group, after those that a consumer got since `last`."""
        return await self._portion(topic, limit, "new", group, consumer, last)

    async def idle(
        self, topic: Topic, group: str, consumer: str, *, seconds: float, limit: int
    ) -> list[Delivery]:
        """Entries that were delivered so long ago, claimed for a consumer."""
        entries: list[Delivery] = []
        first, idle_ms = BEGINNING, milliseconds(seconds) if seconds else 0
        while len(entries) < limit:
            selection = ("idle", group, consumer, idle_ms, first)
            part = await self._portion(topic, limit - len(entries), *selection)
            entries += part.deliveries
            first = part.following
            if part.is_all:
                break
        return entries

    async def by_id(self, topic: Topic, counts: Mapping[str, int]) -> list[Delivery]:
        """Entries with these ids that still exist, with the given numbers of deliveries."""
        entries: list[Delivery] = []
        ids = list(counts)
        while ids:
            part = await self._portion(topic, len(ids), "named", *ids[:_MAX_ENTRIES])
            entries += [d._replace(deliveries=counts[d.entry_id]) for d in part.deliveries]
            ids = ids[int(part.following) :]
        return entries
