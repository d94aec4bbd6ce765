"""The server's answers as values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from esper_fn.bus._topics import POLICIES, Topic
from esper_fn.bus._transport import Attached, Delivery, Lease

_NUMBER = re.compile(rb"-?[0-9]{1,16}")
_ROOM_BYTES = 2_048
"""In an entry beside the payload: names of fields, the signature."""


def server_ms(seconds: bytes, micros: bytes) -> int:
    """An answer to TIME in milliseconds."""
    return int(seconds) * 1000 + int(micros) // 1000


def counts(flat: list[bytes]) -> dict[str, int]:
    """A flat list of names and whole numbers; what is neither is left out."""
    found = {}
    for name, number in zip(flat[::2], flat[1::2], strict=True):
        if _NUMBER.fullmatch(number):
            found[name.decode(errors="replace")] = int(number)
    return found


def deliveries(topics: Sequence[Topic], streams: Sequence[str], answer: Any) -> list[Delivery]:
    """An answer to XREAD or XREADGROUP, in the order of the topics."""
    if not answer:
        return []
    found = {name.decode(): rows for name, rows in answer}
    return [
        delivery(topic, entry_id, fields)
        for topic, stream in zip(topics, streams, strict=True)
        for entry_id, fields in found.get(stream, ())
    ]


def delivery(topic: Topic, entry_id: bytes, fields: list[bytes]) -> Delivery:
    """One entry of a stream."""
    size_bytes = sum(map(len, fields or ()))
    if fields and fields[0] == b"m" and size_bytes <= largest_bytes(topic):
        signature = fields[3] if len(fields) > 3 and fields[2] == b"s" else b""
        return Delivery(topic, entry_id.decode(), fields[1], signature)
    # Somebody else's entry, or one whose fields are gone: nothing of it can be read.
    return Delivery(topic, entry_id.decode(), b"", withheld_bytes=size_bytes)


def largest_bytes(topic: Topic) -> int:
    """Of an entry with all its fields that is handed out at all."""
    return POLICIES[topic].max_entry_bytes + _ROOM_BYTES


def attached(
    holder: str, topics: Sequence[Topic], streams: Sequence[str], answer: list[Any]
) -> tuple[Attached, dict[Topic, dict[str, int]]]:
    """An answer to the script `ATTACH`, for command streams in this order.

    Returns:
      What it says, without leftovers; and these, as names and deliveries of each stream's.
    """
    _, epoch, generation, at, sequences, leftovers, attempts, seconds, micros, emptied = answer
    topic_of = dict(zip(streams, topics, strict=True))
    tried = {}
    for name, count in counts(attempts).items():
        stream, _, entry_id = name.rpartition(" ")
        if stream in topic_of:
            tried[topic_of[stream], entry_id] = count
    names: dict[Topic, dict[str, int]] = {topic: {} for topic in topics}
    for index, entry_id, count in leftovers:
        names[topics[index]][entry_id.decode()] = count
    found = Attached(
        lease=Lease(holder, epoch),
        generation=generation.decode(errors="replace"),
        cursor={topic: last.decode() for topic, last in zip(topics, at, strict=True)},
        sequences=counts(sequences),
        leftovers=[],
        attempts=tried,
        server_ms=server_ms(seconds, micros),
        emptied=frozenset(topics[index] for index in emptied),
    )
    return found, names
