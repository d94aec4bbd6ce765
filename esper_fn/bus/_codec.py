"""Messages to bytes and back: parcels, versions, limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from esper_fn._text import plain
from esper_fn.bus._messages import AnyMessage, Id, Message
from esper_fn.bus._topics import POLICIES, Topic
from esper_fn.errors import MessageError, OversizedError, UndecodableError, UnsupportedVersionError

FORMAT = 1
"""Of the parcel around the messages; part of what is signed."""
MAX_MESSAGES = 256
"""In a parcel: a message may take one byte in it, and much more in memory."""


class Header(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """What stands before the messages of a parcel.

    Attributes:
      format: `FORMAT`.
      producer: who published; one name a connection, never used again.
      sequence: 0, 1, 2, ... for each producer and topic; a repeated parcel keeps its number.
      issued_at_ms: when, on the server's clock as the producer knew it.
      held_ms: how long the producer held it before this publication.
      trace: W3C `traceparent`, or nothing.
      identity: of the run that a signed command is for.
    """

    format: int
    producer: Id
    sequence: int
    issued_at_ms: int
    held_ms: int = 0
    trace: str | None = None
    identity: Annotated[str, Meta(max_length=80)] = ""


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a stream: a header and messages in order."""

    header: Header
    messages: tuple[Any, ...]


class _Unread(msgspec.Struct, frozen=True, array_like=True):
    header: Header
    messages: Annotated[tuple[msgspec.Raw, ...], Meta(max_length=MAX_MESSAGES)]


class _Unopened(msgspec.Struct, frozen=True, array_like=True):
    header: Header


class _Kind(msgspec.Struct, frozen=True):
    kind: str = ""


Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""From the fields of one version to those of the next, the new `kind` included."""


class Schema:
    """The messages one side knows.

    Args:
      types: a union of `Message` classes.
      migrations: by an old tag, what makes its fields those of the next version.

    Raises:
      ValueError: a migration for a tag that is still in use.
    """

    def __init__(
        self, types: Any = AnyMessage, migrations: Mapping[str, Migration] | None = None
    ) -> None:
        self._migrations = dict(migrations or {})
        self._types = types
        self._known = {of.__struct_config__.tag: of for of in get_args(types)}
        if both := sorted(self._known.keys() & self._migrations.keys()):
            raise ValueError(
                f"migrations={both} are for current tags; migrate from older ones only"
            )
        whole = msgspec.defstruct(
            "Whole",
            [
                ("header", Header),
                ("messages", Annotated[tuple[types, ...], Meta(max_length=MAX_MESSAGES)]),
            ],
            frozen=True,
            array_like=True,
        )
        self._whole: Any = msgspec.msgpack.Decoder(whole)
        self._unread = msgspec.msgpack.Decoder(_Unread)
        self._unopened = msgspec.msgpack.Decoder(_Unopened)
        self._one: Any = msgspec.msgpack.Decoder(types)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def kinds(self) -> dict[str, type[Message]]:
        """Message classes by tag."""
        return dict(self._known)

    def encode(self, header: Header, messages: Sequence[Message]) -> bytes:
        """The bytes of a parcel."""
        return self._encoder.encode((header, messages))

    def decode(self, payload: bytes) -> Parcel:
        """A parcel from its bytes; messages of older versions are brought up to date.

        Raises:
          UndecodableError: bytes that are no parcel.
          UnsupportedVersionError: a kind or version that is not known here.
        """
        try:
            whole = self._whole.decode(payload)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return self._decode_singly(payload)
        _check_format(whole.header)
        return Parcel(whole.header, whole.messages)

    def decode_header(self, payload: bytes) -> Header:
        """The header alone, where the messages cannot be read.

        Raises:
          UndecodableError: not even that.
        """
        try:
            return self._unopened.decode(payload).header
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise _no_parcel(payload, error) from None

    def _decode_singly(self, payload: bytes) -> Parcel:
        try:
            unread = self._unread.decode(payload)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise _no_parcel(payload, error) from None
        _check_format(unread.header)
        return Parcel(unread.header, tuple(self._upgrade(bytes(raw)) for raw in unread.messages))

    def _upgrade(self, raw: bytes) -> Any:
        known = self._known
        try:
            tag = msgspec.msgpack.decode(raw, type=_Kind).kind
            if tag in known:
                return self._one.decode(raw)
            fields: dict[str, Any] | None = None
            # Each migration leads to a later version; a chain is no longer than their number.
            for _ in range(len(self._migrations)):
                if tag not in self._migrations:
                    break
                fields = self._migrations[tag](fields or msgspec.msgpack.decode(raw))
                tag = fields["kind"]
            if fields is not None and tag in known:
                return msgspec.convert(fields, self._types)
        except (msgspec.MsgspecError, RecursionError, ValueError, TypeError, KeyError) as error:
            raise UndecodableError(f"a message cannot be read: {plain(error, limit=500)}") from None
        kind = tag.partition("/")[0]
        here = sorted(name for name in known if name.partition("/")[0] == kind)
        remedy = f"this side knows {', '.join(here)}" if here else "this side knows no such kind"
        raise UnsupportedVersionError(f"message {tag[:80]!r}: {remedy}; upgrade it")


def _no_parcel(payload: bytes, error: Exception) -> UndecodableError:
    words = plain(error, limit=500)
    return UndecodableError(f"{len(payload)} bytes are no parcel of messages: {words}")


def _check_format(header: Header) -> None:
    if header.format != FORMAT:
        raise UnsupportedVersionError(
            f"parcel of format {header.format}; this side reads {FORMAT} only; upgrade it"
        )


SCHEMA = Schema()
"""All messages of this version."""


def check_size(topic: Topic, size_bytes: int) -> None:
    """Refuses a payload that its topic does not take.

    Raises:
      OversizedError: it is too large.
    """
    limit = POLICIES[topic].max_entry_bytes
    if size_bytes > limit:
        raise OversizedError(
            f"payload of {size_bytes:,} bytes on topic {topic.value!r}; at most {limit:,}; "
            "send less at once"
        )


def check_topic(topic: Topic, message: Message) -> None:
    """Refuses a message that lies in a stream it does not belong to.

    Raises:
      MessageError: it does not.
    """
    if message.topic is not topic:
        raise MessageError(
            f"{type(message).__name__} lies on topic {topic.value!r}; it belongs on "
            f"{message.topic.value!r}"
        )
