"""Messages: every type goes there and back, old ones are understood, nothing else is."""

from __future__ import annotations

import itertools
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_fn import bus
from esper_fn.bus import Message, Topic
from esper_fn.bus._envelope import FORMAT, SCHEMA, Header, Schema
from esper_fn.bus._messages import LIMITS
from esper_fn.bus._outbox import grouped
from esper_fn.errors import (
    BusSecurityError,
    ForgedError,
    OversizedError,
    UndecodableError,
    UnsupportedVersionError,
)

HEADER = Header(format=FORMAT, producer="p", sequence=3, issued_at_ms=7, queued_ms=1)
NAMES = st.text(max_size=20)
FINITE = st.floats(allow_nan=False)
COLUMNS = st.sampled_from(["u1", "i2", "i4", "f4", "f8"]).flatmap(
    lambda dtype: st.binary(max_size=64).map(
        lambda data: bus.Column(dtype, data[: len(data) // 8 * 8])
    )
)
FIELDS = {
    "id": st.text("abc-0", min_size=1, max_size=80),
    "command_id": st.text("abc-0", min_size=1, max_size=80),
    "expires_after_seconds": st.none() | st.floats(0.001, 1000),
    "seed": st.integers(0, 2**40),
    "step": st.integers(-1, 2**40),
    "columns": st.dictionaries(NAMES, COLUMNS, max_size=4),
    "level": st.sampled_from(["info", "warning", "critical"]),
    "what": st.sampled_from(["saved", "restored", "failed"]),
    "from_topic": st.sampled_from(Topic),
    "commands": st.lists(st.builds(bus.Cull, seed=st.integers(0, 9)), min_size=1, max_size=4).map(
        tuple
    ),
    "seeds": st.lists(
        st.builds(bus.SeedOutcome, seed=st.integers(0, 9), code=NAMES, before=st.none() | NAMES),
        max_size=3,
    ).map(tuple),
    "site": st.none() | NAMES,
}
TYPES = {
    "str": NAMES, "int": st.integers(-(2**60), 2**60), "float": FINITE, "bytes": st.binary(),
    "bool": st.booleans(),
}  # fmt: skip


def messages(kind):
    """Values of a message class, drawn from its own annotations."""

    def values(field):
        if field.name in FIELDS and not (field.name == "site" and field.required):
            return FIELDS[field.name]
        text = str(field.type)
        if "dict" in text:
            inner = FINITE if "float" in text else st.integers(0, 2**30)
            return st.dictionaries(NAMES, inner, max_size=3)
        if "tuple" in text:
            return st.lists(NAMES, max_size=3).map(tuple)
        for name, strategy in TYPES.items():
            if name in text:
                is_optional = "None" in text
                return st.none() | strategy if is_optional else strategy
        raise AssertionError(f"no strategy for {kind.__name__}.{field.name}: {text}")

    return st.builds(kind, **{field.name: values(field) for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("kind", SCHEMA.kinds.values(), ids=SCHEMA.kinds)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_encode_then_decode_is_the_identity(kind, data):
    sent = tuple(data.draw(st.lists(messages(kind), min_size=1, max_size=3)))
    envelope = SCHEMA.decode(SCHEMA.encode(HEADER, sent))
    assert envelope.messages == sent
    assert envelope.header == HEADER
    assert all(type(message) is kind for message in envelope.messages)


def test_every_message_has_a_topic_a_version_and_words():
    for tag, kind in SCHEMA.kinds.items():
        assert issubclass(kind, Message)
        assert kind.topic in Topic
        assert tag.rpartition("/")[2] == "1"
        assert kind.__doc__


def test_a_forked_process_names_its_commands_differently():
    output = subprocess.run(
        [sys.executable, "-c",
         "import os\nfrom esper_fn.bus._messages import new_id\nnew_id()\nchild = os.fork()\n"
         "os.write(1, (new_id() + ' ').encode())\nif child: os.waitpid(child, 0)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(set(output.stdout.split())) == 2


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_envelope_are_refused_and_nothing_else_happens(payload):
    with pytest.raises((UndecodableError, UnsupportedVersionError)):
        SCHEMA.decode(payload)


@given(st.integers(0, 200), st.integers(1, 255))
@settings(max_examples=80, deadline=None)
def test_a_damaged_envelope_is_refused_or_read_as_something_lawful(offset, flip):
    good = bytearray(SCHEMA.encode(HEADER, [bus.Germinate(seed=1, blueprint="mlp", id="i" * 40)]))
    good[offset % len(good)] ^= flip
    try:
        for message in SCHEMA.decode(bytes(good)).messages:
            msgspec.convert(msgspec.to_builtins(message), type(message))
    except (UndecodableError, UnsupportedVersionError):
        pass


class OldPing(Message, frozen=True, kw_only=True, tag="ping/1"):
    """As version 1 had it."""

    topic = Topic.EVENTS
    name: str
    millis: int


class NewPing(Message, frozen=True, kw_only=True, tag="ping/2"):
    """As version 2 has it."""

    topic = Topic.EVENTS
    name: str
    seconds: float
    note: str = ""


class LaterPing(Message, frozen=True, kw_only=True, tag="ping/2"):
    """Version 2 with one more field that has a default."""

    topic = Topic.EVENTS
    name: str
    seconds: float
    extra: int = 5


def to_two(fields):
    return {"kind": "ping/2", "name": fields["name"], "seconds": fields["millis"] / 1000}


ONE = Schema(OldPing | bus.Cull)
TWO = Schema(NewPing | bus.Cull, {"ping/1": to_two})
LATER = Schema(LaterPing | bus.Cull, {"ping/1": to_two})


def test_a_rolling_upgrade_goes_both_ways():
    mixed = [OldPing(name="a", millis=1500), bus.Cull(seed=3, id="c")]
    decoded = TWO.decode(ONE.encode(HEADER, mixed)).messages
    assert decoded == (NewPing(name="a", seconds=1.5), mixed[1])
    with pytest.raises(UnsupportedVersionError, match="'ping/2': this side knows ping/1"):
        ONE.decode(TWO.encode(HEADER, [NewPing(name="a", seconds=1.5)]))
    # Neighbours of an unknown kind lie in other envelopes and are not touched.
    assert ONE.decode(TWO.encode(HEADER, mixed[1:])).messages == (mixed[1],)
    # Within a version: more fields are ignored by the old side, and have defaults on the new one.
    assert TWO.decode(LATER.encode(HEADER, [LaterPing(name="a", seconds=1.0)])).messages == (
        NewPing(name="a", seconds=1.0),
    )
    assert LATER.decode(TWO.encode(HEADER, [NewPing(name="a", seconds=1.0)])).messages == (
        LaterPing(name="a", seconds=1.0),
    )


def test_a_migration_for_a_current_tag_is_refused():
    with pytest.raises(ValueError, match="current tags"):
        Schema(OldPing | bus.Cull, {"ping/1": to_two})


def test_a_later_format_is_refused():
    header = msgspec.structs.replace(HEADER, format=2)
    with pytest.raises(UnsupportedVersionError, match="format 2; this side reads 1"):
        SCHEMA.decode(SCHEMA.encode(header, [bus.Pause()]))


def test_limits_name_the_size_and_the_limit():
    from esper_fn.bus._envelope import check_size

    with pytest.raises(OversizedError, match=r"65,537 bytes on topic 'commands'; at most 65,536"):
        check_size(Topic.COMMANDS, 65_537)
    for make in (
        lambda: {"kind": "cull/1", "seed": -1},
        lambda: {"kind": "cull/1", "seed": 1, "id": ""},
        lambda: {"kind": "cull/1", "seed": 1, "site": "s" * 201},
        lambda: {"kind": "batch/1", "commands": []},
        lambda: {"kind": "cull/1", "seed": 1, "expires_after_seconds": 0},
    ):
        payload = msgspec.msgpack.encode((HEADER, [make()]))
        with pytest.raises(UndecodableError, match=r"`|length"):
            SCHEMA.decode(payload)


def test_columns_are_arrays_of_any_size():
    values = np.arange(1000, dtype=np.float32) / 3
    column = bus.Column.from_array(values)
    np.testing.assert_array_equal(column.array(), values)
    assert bus.Column.from_array(values.astype(">f4")).data == column.data
    assert len(SCHEMA.encode(HEADER, [bus.Frame(step=1, columns={"a": column})])) < 4_100


KEYS = bus.Keyring(active="a", keys={"a": b"k" * 16, "b": b"l" * 16})


@given(payload=st.binary(max_size=80), offset=st.integers(0, 500), flip=st.integers(1, 255))
@settings(max_examples=80, deadline=None)
def test_any_flipped_byte_breaks_a_signature(payload, offset, flip):
    signature = KEYS.sign("stream", payload)
    KEYS.verify("stream", payload, signature)
    whole = bytearray(payload + signature)
    whole[offset % len(whole)] ^= flip
    with pytest.raises(ForgedError):
        KEYS.verify("stream", bytes(whole[: len(payload)]), bytes(whole[len(payload) :]))
    with pytest.raises(ForgedError):
        KEYS.verify("another stream", payload, signature)
    for cut in (0, 1, len(signature) - 1):
        with pytest.raises(ForgedError):
            KEYS.verify("stream", payload, signature[:cut])


def test_keys_are_read_from_the_environment_and_files_only_when_private(tmp_path):
    ring = bus.read_keys({"ESPER_BUS_KEYS": "new:" + "00" * 32 + ",old:" + "11" * 32})
    assert ring.active == "new"
    assert set(ring.keys) == {"new", "old"}
    assert "\\x00" not in repr(ring)
    assert not bus.read_keys({}).is_required
    path = tmp_path / "keys"
    path.write_text("a:" + "22" * 32)
    path.chmod(0o644)
    with pytest.raises(BusSecurityError, match="chmod 600"):
        bus.read_keys({"ESPER_BUS_KEY_FILE": str(path)})
    path.chmod(0o600)
    assert bus.read_keys({"ESPER_BUS_KEY_FILE": str(path)}).active == "a"
    for text, words in (
        ("a:xyz", "id:hex"),
        ("a:00", "at least 16"),
        ("a-b:" + "00" * 16, "letters, digits and _"),
    ):
        with pytest.raises(BusSecurityError, match=words):
            bus.read_keys({"ESPER_BUS_KEYS": text})


@pytest.mark.parametrize("num_seeds", [0, 1, 16, 256])
def test_outcomes_share_envelopes_that_their_topic_allows(num_seeds):
    rows = tuple(
        bus.SeedOutcome(
            seed=10**6 + index,
            code="BLUEPRINT_NOT_SERVED",
            before="STABILIZATION",
            after="STABILIZATION",
        )
        for index in range(num_seeds)
    )
    outcomes = [
        bus.Outcome(
            command_id=f"{number:080}", code="BATCH_REFUSED", text="é" * 500, step=1, seeds=rows
        )
        for number in range(300)
    ]
    groups = grouped(outcomes)
    assert list(itertools.chain.from_iterable(groups)) == outcomes
    limit = LIMITS[Topic.OUTCOMES].max_entry_bytes
    assert max(len(msgspec.msgpack.encode(group)) for group in groups) < limit - 1024
    assert grouped([]) == []
