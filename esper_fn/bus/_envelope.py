"""Messages to bytes and back: envelopes, versions, limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec
from msgspec import Meta
from msgspec.msgpack import Decoder

from esper_fn._text import plain
from esper_fn.bus._messages import LIMITS, AnyMessage, Id, Message, Topic
from esper_fn.bus._signing import NO_KEYS, Keyring
from esper_fn.bus._timing import ServerTime
from esper_fn.bus._transport import Delivery, Entry, Transport
from esper_fn.errors import OversizedError, UndecodableError, UnsupportedVersionError

FORMAT = 1
"""Version of the envelope itself."""
MAX_MESSAGES = 256
"""Most messages in an envelope: one may take a byte on the wire, and much more in memory."""
_DECODING_ERRORS = (msgspec.MsgspecError, RecursionError, ValueError)


class Header(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """What an envelope says of its messages.

    Attributes:
      format: `FORMAT`.
      producer: id of the publishing connection; no other connection ever has it.
      sequence: 0, 1, 2, ... for each producer and topic; a repeated envelope keeps its number.
      issued_at_ms: time of the publication on the server's clock, as the producer knew it.
      queued_ms: time that the messages waited at the producer before this publication.
      trace: W3C `traceparent`, if the sender is traced.
      identity: identity of the run that a signed command is for.
    """

    format: int
    producer: Id
    sequence: int
    issued_at_ms: int
    queued_ms: int = 0
    trace: str | None = None
    identity: Annotated[str, Meta(max_length=80)] = ""


Messages = TypeVar("Messages")


class Envelope(msgspec.Struct, Generic[Messages], frozen=True, array_like=True):
    """The payload of one stream entry."""

    header: Header
    messages: Messages


class _Kind(msgspec.Struct, frozen=True):
    kind: str = ""


Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""Maps the fields of one version to those of the next one, the new `kind` included."""


class Schema:
    """The messages that one side knows.

    Args:
      types: a union of `Message` classes.
      migrations: by the tag of an older version, the function that makes it the next version.

    Raises:
      ValueError: a migration is for a tag that is still in use.
    """

    def __init__(
        self, types: Any = AnyMessage, migrations: Mapping[str, Migration] | None = None
    ) -> None:
        self._migrations = dict(migrations or {})
        self._types = types
        self.kinds: dict[str, type[Message]] = {
            str(kind.__struct_config__.tag): kind for kind in get_args(types)
        }
        """Message classes by tag."""
        if both := sorted(self.kinds.keys() & self._migrations.keys()):
            raise ValueError(
                f"migrations={both} are for current tags; migrate from older ones only"
            )
        most = Meta(max_length=MAX_MESSAGES)
        self._typed: Any = Decoder(Envelope[Annotated[tuple[types, ...], most]])
        self._raw = Decoder(Envelope[Annotated[tuple[msgspec.Raw, ...], most]])
        self._header = Decoder(Envelope[msgspec.Raw])
        self._message: Any = Decoder(types)
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, header: Header, messages: Sequence[Message]) -> bytes:
        """Packs messages into the bytes of an envelope."""
        return self._encoder.encode((header, messages))

    def decode(self, payload: bytes) -> Envelope[tuple[Any, ...]]:
        """Unpacks an envelope, and migrates messages of older versions.

        Raises:
          UndecodableError: the bytes are no envelope.
          UnsupportedVersionError: a kind or version is not known on this side.
        """
        try:
            envelope = self._typed.decode(payload)
            is_current = True
        except _DECODING_ERRORS:
            # Some message is of another version, or broken.
            envelope, is_current = _decode(self._raw, payload), False
        header = envelope.header
        if header.format != FORMAT:
            raise UnsupportedVersionError(
                f"envelope of format {header.format}; this side reads {FORMAT} only; upgrade it"
            )
        if is_current:
            return envelope
        return Envelope(header, tuple(map(self._migrate, envelope.messages)))

    def decode_header(self, payload: bytes) -> Header:
        """Reads the header alone, for an envelope whose messages cannot be read.

        Raises:
          UndecodableError: the header cannot be read either.
        """
        header: Header = _decode(self._header, payload).header
        return header

    def _migrate(self, raw: msgspec.Raw) -> Any:
        try:
            tag = msgspec.msgpack.decode(raw, type=_Kind).kind
            fields: dict[str, Any] | None = None
            # Each migration leads to a later version; a chain is no longer than their number.
            for _ in self._migrations:
                if tag in self._migrations:
                    fields = self._migrations[tag](fields or msgspec.msgpack.decode(raw))
                    tag = fields["kind"]
            if tag in self.kinds:
                return msgspec.convert(fields, self._types) if fields else self._message.decode(raw)
        except (*_DECODING_ERRORS, TypeError, KeyError) as error:
            raise UndecodableError(f"a message cannot be read: {plain(error, limit=500)}") from None
        kind = tag.partition("/")[0]
        known = sorted(name for name in self.kinds if name.partition("/")[0] == kind)
        remedy = f"this side knows {', '.join(known)}" if known else "this side knows no such kind"
        raise UnsupportedVersionError(f"message {tag[:80]!r}: {remedy}; upgrade it")


SCHEMA = Schema()
"""All messages of this version."""


def _decode(decoder: Any, payload: bytes) -> Any:
    try:
        return decoder.decode(payload)
    except _DECODING_ERRORS as error:
        raise UndecodableError(
            f"{len(payload)} bytes are no envelope of messages: {plain(error, limit=500)}"
        ) from None


def check_size(topic: Topic, size_bytes: int) -> None:
    """Raises `OversizedError` for a payload that is too large for its topic."""
    limit = LIMITS[topic].max_entry_bytes
    if size_bytes > limit:
        raise OversizedError(
            f"payload of {size_bytes:,} bytes on topic {topic.value!r}; at most {limit:,}; "
            "send less at once"
        )


@dataclass(frozen=True, slots=True)
class Link:
    """One side of a bus: its transport, its keys, and the server's clock as it knows it."""

    transport: Transport
    keys: Keyring = NO_KEYS
    time: ServerTime = field(default_factory=ServerTime)

    async def open(self) -> None:
        """Connects; see `Transport.open`."""
        self.time.update(await self.transport.open())

    def seal(
        self, topic: Topic, producer: str, sequence: int, messages: Sequence[Message], **more: Any
    ) -> Entry:
        """Packs and signs messages; `more` are other fields of the `Header`."""
        now_ms = self.time.now_ms()
        header = Header(
            format=FORMAT, producer=producer, sequence=sequence, issued_at_ms=now_ms, **more
        )
        payload = SCHEMA.encode(header, messages)
        return Entry(payload, self.keys.sign(self.transport.stream(topic), payload))

    def verified(self, delivery: Delivery) -> bytes:
        """The payload of a delivery.

        Raises:
          OversizedError: it is too large for its topic.
          ForgedError: its signature is missing or wrong.
        """
        check_size(delivery.topic, delivery.size_bytes)
        stream = self.transport.stream(delivery.topic)
        self.keys.verify(stream, delivery.payload, delivery.signature)
        return delivery.payload
