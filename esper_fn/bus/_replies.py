"""The server's answers as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import Attached, Delivery, Lease


def server_ms(seconds: bytes, micros: bytes) -> int:
    """An answer to TIME in milliseconds."""
    return int(seconds) * 1000 + int(micros) // 1000


def pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    """A flat list of names and values."""
    return list(zip(flat[::2], flat[1::2], strict=True))


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
    if fields and fields[0] == b"m":
        signature = fields[3] if len(fields) > 3 and fields[2] == b"s" else b""
        return Delivery(topic, entry_id.decode(), fields[1], signature)
    # Somebody else's entry, or one whose fields are gone: nothing of it can be read.
    return Delivery(topic, entry_id.decode(), b"")


def attached(
    holder: str, topics: Sequence[Topic], streams: Sequence[str], answer: list[Any]
) -> Attached:
    """An answer to the script `ATTACH`, for command streams in this order."""
    _, epoch, generation, at, sequences, leftovers, attempts, seconds, micros = answer
    topic_of = dict(zip(streams, topics, strict=True))
    tried = {}
    for name, count in pairs(attempts):
        stream, _, entry_id = name.decode().rpartition(" ")
        tried[topic_of[stream], entry_id] = int(count)
    return Attached(
        lease=Lease(holder, epoch),
        generation=generation.decode(),
        cursor={topic: last.decode() for topic, last in zip(topics, at, strict=True)},
        sequences={name.decode(): int(number) for name, number in pairs(sequences)},
        leftovers=[
            delivery(topics[index], entry_id, fields)._replace(deliveries=count)
            for index, entry_id, fields, count in leftovers
        ],
        attempts=tried,
        server_ms=server_ms(seconds, micros),
    )
