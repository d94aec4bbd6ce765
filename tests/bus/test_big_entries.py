"""Whatever anybody wrote to the server, those who read stay small, and neighbours arrive."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import redis
from bus_support import run_async
from test_worker import Loop, until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._connect import make_transport
from esper_fn.bus._envelope import FORMAT, SCHEMA, Header
from esper_fn.bus._messages import LIMITS
from esper_fn.bus._transport import LeaseRequest
from esper_fn.cli import main

BIG = 48_000_000
# Peak of resident memory of this process, readers and writers included: less than one large
# entry, and room for what else a process with many tests behind it does meanwhile.
MOST_GROWTH = 40 << 20


@contextlib.contextmanager
def small():
    """The process never holds much more memory within the block than before it."""

    def status(name):
        rows = map(str.split, Path("/proc/self/status").read_text().splitlines())
        sizes = [int(row[1]) << 10 for row in rows if row[0] == f"{name}:"]
        return sizes[0] if sizes else pytest.skip("no peak of resident memory is shown here")

    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < MOST_GROWTH


class Rig:
    """A server of its own, a run's name, and who writes there past every check."""

    def __init__(self, server, run):
        self.url, self.run = server.url, run
        self.raw = redis.Redis(unix_socket_path=str(server.socket))
        self.ends = contextlib.ExitStack()
        self.ends.callback(self.raw.close)

    def key(self, name):
        return f"esper:{{{self.run}}}:{name}"

    def transport(self, keys=bus.NO_KEYS):
        return make_transport(self.url, self.run, keys=keys)

    def loop(self, keys=bus.NO_KEYS, **options):
        loop = Loop(lambda: self.transport(keys), keys=keys, **options)
        self.ends.callback(loop.close)
        return loop

    def client(self, keys=bus.NO_KEYS):
        return self.ends.enter_context(bus.connect(self.url, run=self.run, keys=keys))

    def on_server(self, command, *arguments):
        """Runs a command of which `LONG` stands for 48 MB that this process never sees."""
        script = """
        for i, argument in ipairs(ARGV) do
          local first, last = string.find(argument, 'LONG', 1, true)
          if first then
            local long = string.rep('9', 48000000)
            ARGV[i] = string.sub(argument, 1, first - 1) .. long .. string.sub(argument, last + 1)
          end
        end
        redis.call(unpack(ARGV))
        collectgarbage()
        """
        self.raw.eval(script, 0, command, *arguments)

    def add(self, topic, *fields):
        self.on_server("XADD", self.key(topic), "*", *fields)


@pytest.fixture
def rig(tmp_path, run_name):
    # Quicker without a file, and nothing here asks for one.
    with bus.PrivateServer(tmp_path / "server", options={"appendonly": "no"}) as server:
        rig = Rig(server, run_name)
        with rig.ends:
            yield rig


def envelope(*messages, sequence=0, producer="raw"):
    header = Header(format=FORMAT, producer=producer, sequence=sequence, issued_at_ms=1)
    return SCHEMA.encode(header, messages)


SHAPES = {
    "payload": ["m", "LONG"],
    "signature": ["m", "x", "s", "LONG"],
    "another field": ["x", "LONG"],
    "name of a field": ["LONG", "m"],
    "a field more": ["m", "x", "more", "LONG"],
}


@pytest.mark.parametrize(
    ("topic", "shape"),
    [*((Topic.COMMANDS, shape) for shape in SHAPES), (Topic.URGENT, "payload")],
)
def test_a_run_takes_the_neighbours_of_a_large_entry(rig, topic, shape):
    loop, client = rig.loop(), rig.client()
    first, second = (
        bus.Cull(seed=seed) if topic is Topic.COMMANDS else bus.Stop() for seed in range(2)
    )
    assert client.send(first, wait_seconds=10).is_applied
    with small():
        rig.add(topic, *SHAPES[shape])
        began = time.monotonic()
        assert client.send(second, wait_seconds=10).is_applied
        assert time.monotonic() - began < 3
        until(client.dead_letters)
    assert loop.effects == [first.id, second.id]
    ((_, letter),) = client.dead_letters()
    assert letter.reason == "oversized"
    assert letter.from_topic == topic
    assert BIG <= letter.size_bytes < BIG + 100
    assert (letter.payload, letter.signature) == (b"", b"")
    until(lambda: pending(rig, topic) == 0)
    assert loop.error is None


def pending(rig, topic):
    return sum(group["pending"] for group in rig.raw.xinfo_groups(rig.key(topic)))


def test_large_entries_that_wait_for_a_run_keep_nothing_from_it(rig):
    commands = [bus.Cull(seed=seed, id=f"c{seed}") for seed in range(4)]
    for number, command in enumerate(commands):
        rig.raw.xadd(rig.key(Topic.COMMANDS), {"m": envelope(command, sequence=number)})
        for _ in range(2):
            rig.add(Topic.COMMANDS, "m", "LONG")
    with small():
        loop, client = rig.loop(), rig.client()
        until(lambda: len(loop.effects) == 4, 20)
        until(lambda: len(client.dead_letters()) == 8, 20)
        # It took everything at once, and reads as before.
        until(lambda: pending(rig, Topic.COMMANDS) == 0)
        before = calls(rig.raw)
        time.sleep(0.5)
        assert calls(rig.raw) - before < 60
        last = bus.Cull(seed=9)
        assert client.send(last, wait_seconds=10).is_applied
    assert loop.effects == ["c0", "c1", "c2", "c3", last.id]


def calls(raw):
    return sum(row["calls"] for row in raw.info("commandstats").values())


def test_an_urgent_command_does_not_wait_for_large_entries(rig):
    for _ in range(8):
        rig.add(Topic.COMMANDS, "m", "LONG")
    client = rig.client()
    with small():
        loop, stop = rig.loop(), bus.Stop()
        began = time.monotonic()
        assert client.send(stop, wait_seconds=10).is_applied
        assert time.monotonic() - began < 5  # two seconds on a quiet machine
        until(lambda: len(client.dead_letters()) == 8, 20)
    assert loop.effects == [stop.id]


def test_as_many_commands_as_large_as_allowed_are_taken_once_and_in_order(rig):
    limit = LIMITS[Topic.COMMANDS].max_entry_bytes
    sent = []
    for number in range(300):
        command = bus.Batch(
            commands=tuple(bus.Cull(seed=i, site="s" * 180, sender="x" * 180) for i in range(150)),
        )
        payload = envelope(command, sequence=number)
        assert 0.9 * limit < len(payload) <= limit
        rig.raw.xadd(rig.key(Topic.COMMANDS), {"m": payload})
        sent.append(command.id)
    loop = rig.loop(limit=64)
    until(lambda: len(loop.effects) == 300, 30)
    assert loop.effects == sent
    assert rig.client().dead_letters() == []


def test_a_million_fields_are_one_large_entry(rig):
    fields = itertools.chain.from_iterable((b"ab", b"cd") for _ in range(500_000))
    rig.raw.execute_command("XADD", rig.key(Topic.COMMANDS), "*", *fields)
    with small():
        loop, client = rig.loop(), rig.client()
        assert client.send(bus.Cull(seed=1), wait_seconds=10).is_applied
        until(client.dead_letters)
    ((_, letter),) = client.dead_letters()
    assert (letter.reason, letter.size_bytes) == ("oversized", 2_000_000)
    assert len(loop.effects) == 1


def test_the_next_process_finds_a_large_entry_that_the_last_one_had(rig):
    t, u = rig.transport(), rig.transport()

    async def whole():
        older = await t.attach(LeaseRequest("one", 9))
        rig.raw.xadd(rig.key(Topic.COMMANDS), {"m": b"a"})
        rig.add(Topic.COMMANDS, "m", "LONG")
        rig.raw.xadd(rig.key(Topic.COMMANDS), {"m": b"b"})
        entries = []
        while len(entries) < 3:
            entries += await t.read(older.lease, Topic.COMMANDS, limit=9, wait_seconds=5)
        assert [d.payload for d in entries] == [b"a", b"", b"b"]
        claimed = await t.claim(older.lease, Topic.COMMANDS)
        sizes = [(d.payload, d.size_bytes < BIG) for d in claimed]
        assert sizes == [(b"a", True), (b"", False), (b"b", True)]
        cursor = {Topic.COMMANDS: entries[-1].entry_id}
        newer = await u.attach(LeaseRequest("two", 9, cursor=cursor, should_take_over=True))
        assert [d.payload for d in newer.leftovers] == [b"a", b"", b"b"]
        assert {d.deliveries for d in newer.leftovers} >= {4}
        return newer.leftovers[1]

    with small():
        assert run_async(whole(), t, u).withheld_bytes == BIG + 1


@pytest.mark.parametrize(
    ("topic", "shape"),
    [
        *((Topic.TELEMETRY, shape) for shape in SHAPES),
        (Topic.EVENTS, "payload"),
        (Topic.OUTCOMES, "payload"),
    ],
)
def test_who_follows_a_run_sees_the_neighbours_of_a_large_entry(rig, topic, shape):
    client, messages = rig.client(), []
    end = threading.Event()

    def follow():
        for message in client.watch(seconds=30):
            if not isinstance(message, bus.Alert):
                continue
            messages.append(message.name)
            if message.name == "last":
                end.set()
                return

    follower = threading.Thread(target=follow, daemon=True)
    with small():
        # So large an entry is the last one when it begins, too.
        rig.add(topic, *SHAPES[shape])
        follower.start()
        until(lambda: calls_of(rig.raw, "xread") >= 2)
        alerts = [bus.Alert(name=name, level="info", text="w") for name in ("first", "last")]
        rig.raw.xadd(rig.key(Topic.EVENTS), {"m": envelope(alerts[0])})
        rig.add(topic, *SHAPES[shape])
        time.sleep(0.2)
        rig.raw.xadd(rig.key(Topic.EVENTS), {"m": envelope(alerts[1])})
        assert end.wait(10)
    follower.join()
    assert messages == ["first", "last"]
    assert client.asynchronous.num_refused in {1, 2, 3}  # it reads outcomes itself too


def calls_of(raw, command):
    clients = raw.client_list()
    return sum(client["cmd"] == command for client in clients)


def test_a_sender_hears_what_became_of_it_though_outcomes_are_large(rig):
    loop, client = rig.loop(), rig.client()
    with small():
        for _ in range(3):
            rig.add(Topic.OUTCOMES, "m", "LONG")
            assert client.send(bus.Cull(seed=1), wait_seconds=10).is_applied
        with bus.connect(rig.url, run=rig.run, keys=bus.NO_KEYS) as other:
            rig.add(Topic.OUTCOMES, "m", "LONG")
            assert other.send(bus.Cull(seed=1), wait_seconds=10).is_applied
    assert len(loop.effects) == 4


def test_all_telemetry_as_large_as_allowed_is_followed_a_little_at_a_time(rig):
    limit = LIMITS[Topic.TELEMETRY].max_entry_bytes
    column = bus.Column.from_array(np.zeros(limit - 300, np.uint8))
    for number in range(100):
        payload = envelope(bus.Frame(step=number, columns={"a": column}), sequence=number)
        assert 0.99 * limit < len(payload) <= limit
        rig.raw.xadd(rig.key(Topic.TELEMETRY), {"m": payload})
    del payload
    client = rig.client()
    with small():
        frames = client.watch([Topic.TELEMETRY], seconds=20, from_beginning=True)
        steps = [frame.step for frame in itertools.islice(frames, 100)]
        frames.close()
    assert steps == list(range(100))


def bomb(num_bytes):
    """An envelope whose messages take a byte each."""
    head = envelope()[:-1]
    return head + b"\xdd" + num_bytes.to_bytes(4, "big") + b"\xc0" * num_bytes


def test_a_small_envelope_that_would_be_large_in_memory_is_not_made(rig):
    client = rig.client()
    for _ in range(3):
        rig.raw.xadd(rig.key(Topic.TELEMETRY), {"m": bomb(1_000_000)})
    last = bus.StepMetrics(step=7, loss=0.5)
    rig.raw.xadd(rig.key(Topic.TELEMETRY), {"m": envelope(last)})
    with small():
        (entries,) = itertools.islice(
            client.watch([Topic.TELEMETRY], seconds=20, from_beginning=True), 1
        )
    assert entries.step == 7
    assert client.asynchronous.num_refused == 3


def test_dlq_list_shows_the_neighbours_of_a_large_letter(rig, capsys):
    letter = bus.DeadLetter(
        reason="forged", text="w", from_topic="commands", entry_id="1-1", size_bytes=1,
        payload=b"\x00" * 120_000,
    )  # fmt: skip
    names = []
    for number in range(600):
        if number in {0, 300}:
            rig.add(Topic.DEAD, "m", "LONG")
        names.append(rig.raw.xadd(rig.key(Topic.DEAD), {"m": envelope(letter)}).decode())
    where = ["--bus", rig.url, "--run", rig.run]
    capsys.readouterr()
    with small():
        assert main(["dlq", *where, "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*names, "600"]
    with small():
        assert main(["dlq", *where, "show", names[-1]]) == 0
        assert main(["dlq", *where, "drop", names[-1]]) == 0
    assert rig.raw.xlen(rig.key(Topic.DEAD)) == 601


def test_a_letter_behind_many_entries_that_are_none_is_sent_again(rig, capsys):
    for _ in range(250):
        rig.raw.xadd(rig.key(Topic.DEAD), {"m": b"x"})
    letter = bus.DeadLetter(
        reason="gap", text="w", from_topic="commands", entry_id="1-1", size_bytes=1,
        payload=envelope(bus.Cull(seed=1)),
    )  # fmt: skip
    name = rig.raw.xadd(rig.key(Topic.DEAD), {"m": envelope(letter)}).decode()
    where = ["--bus", rig.url, "--run", rig.run]
    assert main(["dlq", *where, "list"]) == 0
    assert main(["dlq", *where, "replay", name]) == 0
    assert "sent again" in capsys.readouterr().out
    assert rig.raw.xlen(rig.key(Topic.COMMANDS)) == 1


LARGE_KEYS = {
    "lease": ("SET", "lease", "1 LONG"),
    "owner": ("HSET", "run", "owner", "1 LONG"),
    "generation": ("SET", "generation", "LONG"),
    "sequences": ("HSET", "sequences", "LONG", "1"),
    "number of a sequence": ("HSET", "sequences", "p/commands", "LONG"),
    "attempts": ("HSET", "attempts", "LONG", "1"),
}


@pytest.mark.parametrize("what", LARGE_KEYS)
def test_large_values_in_the_runs_keys_reach_nobody(rig, what):
    command, name, *rest = LARGE_KEYS[what]
    keys = bus.Keyring(active="k", keys={"k": b"0" * 32})
    loop, client = rig.loop(keys, lease_seconds=1.5), rig.client(keys)
    assert client.send(bus.Cull(seed=1), wait_seconds=10).is_applied
    with small():
        rig.on_server(command, rig.key(name), *rest)
        began = time.monotonic()
        stop = bus.Stop()
        assert client.send(stop, wait_seconds=10, must_listen=False).is_applied
        assert time.monotonic() - began < 4
        loop.close()
        rig.on_server(command, rig.key(name), *rest)
        if what == "lease":
            rig.raw.pexpire(rig.key(name), 100)
        again = rig.loop(keys, lease_seconds=1.5)
        assert client.send(bus.Cull(seed=1), wait_seconds=10, must_listen=False).is_applied
    assert len(again.effects) == 1
    assert loop.error is None


def test_names_of_runs_too_large_to_be_any_are_not_read(rig):
    rig.loop()
    for number in range(2):
        rig.on_server("SET", f"esper:{{LONG{number}}}:lease", "1 x")
    client = rig.client()
    with small():
        assert client.active_runs() == [rig.run]
