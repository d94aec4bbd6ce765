"""The lease of a run is removed or spoilt: training goes on, and it comes back."""

from __future__ import annotations

import logging
import time
from functools import partial

import pytest
import redis
from bus_support import lose, lose_all, lose_groups
from test_worker import Loop, until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._connect import make_transport

COMMAND_STREAMS = (Topic.URGENT, Topic.COMMANDS)
HIGHEST = 2**64 - 1


@pytest.fixture
def own_server(tmp_path):
    with bus.PrivateServer(tmp_path / "server") as running:
        yield running


@pytest.fixture
def raw(own_server):
    with redis.Redis(unix_socket_path=str(own_server.socket)) as client:
        yield client


@pytest.fixture
def rig(kind, request, run_name):
    """A run over either transport, one who steers it, and ways to remove its lease."""
    broker = bus.Broker()
    server = request.getfixturevalue("own_server") if kind == "redis" else None
    raw = request.getfixturevalue("raw") if kind == "redis" else None
    url = "memory" if server is None else server.url
    rig = Rig(url, run_name, broker, raw)
    yield rig
    rig.close()


class Rig:
    def __init__(self, url, run, broker, raw, **options):
        self.url, self.run, self.broker, self.raw = url, run, broker, raw
        self.loop = Loop(self.transport, **options)
        self.client = bus.connect(url, run=run, keys=bus.NO_KEYS, broker=broker)

    def transport(self):
        return make_transport(self.url, self.run, keys=bus.NO_KEYS, broker=self.broker)

    def key(self, name):
        return f"esper:{{{self.run}}}:{name}"

    def alerts(self):
        messages = self.client.watch([Topic.EVENTS], seconds=0.3, from_beginning=True)
        return [message.name for message in messages if isinstance(message, bus.Alert)]

    def calls(self):
        return sum(row["calls"] for row in self.raw.info("commandstats").values())

    def close(self):
        self.client.close()
        self.loop.close()


def streams_deleted(rig):
    if rig.raw is None:
        lose(rig.broker, rig.run, *COMMAND_STREAMS)
    else:
        rig.raw.delete(*map(rig.key, COMMAND_STREAMS))


def all_streams_deleted(rig):
    if rig.raw is None:
        lose(rig.broker, rig.run, *Topic)
    else:
        rig.raw.delete(*map(rig.key, Topic))


def groups_destroyed(rig):
    if rig.raw is None:
        lose_groups(rig.broker, rig.run)
        return
    for topic in COMMAND_STREAMS:
        for group in rig.raw.xinfo_groups(rig.key(topic)):
            rig.raw.xgroup_destroy(rig.key(topic), group["name"])


def bookkeeping_deleted(rig):
    if rig.raw is None:
        lose(rig.broker, rig.run)
    else:
        rig.raw.delete(*map(rig.key, ("run", "lease", "sequences", "attempts")))


def everything_deleted(rig):
    if rig.raw is None:
        lose_all(rig.broker)
    else:
        rig.raw.flushall()


FAULTS = [
    streams_deleted,
    all_streams_deleted,
    groups_destroyed,
    bookkeeping_deleted,
    everything_deleted,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stop_is_applied_at_once_though_the_lease_was_removed(rig, fault, caplog):
    loop, client = rig.loop, rig.client
    before = [bus.Cull(seed=seed) for seed in range(3)]
    for command in before:
        assert client.send(command, wait_seconds=10).is_applied
    fault(rig)
    stop = bus.Stop(reason="now")
    began = time.monotonic()
    assert client.send(stop, wait_seconds=20, must_listen=False).is_applied
    assert time.monotonic() - began < 4  # two seconds on a quiet machine
    after = bus.Cull(seed=9)
    assert client.send(after, wait_seconds=20).is_applied
    assert client.send(before[0], wait_seconds=20).is_applied  # answered again, not done again
    assert loop.effects == [*(command.id for command in before), stop.id, after.id]
    assert loop.error is None
    assert 1 <= len(rig.alerts()) <= 2  # again where a slow machine renews while it repairs
    assert [record for record in caplog.records if record.levelno >= logging.ERROR]
    if rig.raw is not None:
        quiet = rig.calls()
        time.sleep(1.0)
        assert rig.calls() - quiet < 100


def evicted(raw, run):
    raw.config_set("maxmemory-policy", "allkeys-random")
    raw.config_set("maxmemory", "1")
    raw.ping()
    until(lambda: raw.dbsize() == 0)
    raw.config_set("maxmemory", "0")


def swapped(raw, run):
    raw.swapdb(0, 1)


def replica_for_a_moment(raw, run):
    raw.replicaof("127.0.0.1", "1")
    time.sleep(0.3)
    raw.replicaof("no", "one")


def trimmed(raw, run):
    for topic in Topic:
        raw.xtrim(f"esper:{{{run}}}:{topic}", maxlen=0)


def renamed(raw, run):
    for key in raw.keys("*"):
        raw.rename(key, b"old:" + key)


def expired(raw, run):
    for key in raw.keys("*"):
        raw.pexpire(key, 1)
    time.sleep(0.01)  # an outcome in a stream that is about to go is nobody's fault


def scripts_forgotten(raw, run):
    raw.script_flush()


def owner_forgotten(raw, run):
    raw.hdel(f"esper:{{{run}}}:run", "owner", "number", "identity")


def positions_moved(raw, run, to="0-0"):
    for topic in COMMAND_STREAMS:
        key = f"esper:{{{run}}}:{topic}"
        for group in raw.xinfo_groups(key):
            raw.xgroup_setid(key, group["name"], to)


def positions_moved_ahead(raw, run):
    positions_moved(raw, run, to=f"{int(time.time() + 3_600) * 1_000}-0")


def positions_moved_to_the_end(raw, run):
    positions_moved(raw, run, to=f"{HIGHEST}-1")


def last_ids_moved_nearly_to_the_end(raw, run):
    for topic in COMMAND_STREAMS:
        raw.execute_command("XSETID", f"esper:{{{run}}}:{topic}", f"{HIGHEST}-1")


@pytest.mark.parametrize(
    "fault",
    [
        evicted,
        swapped,
        replica_for_a_moment,
        trimmed,
        renamed,
        expired,
        scripts_forgotten,
        owner_forgotten,
        positions_moved,
        positions_moved_ahead,
        positions_moved_to_the_end,
        last_ids_moved_nearly_to_the_end,
    ],
)
def test_a_stop_is_applied_at_once_whatever_the_server_did(own_server, raw, run_name, fault):
    rig = Rig(own_server.url, run_name, None, raw, lease_seconds=1.5)
    try:
        before = [bus.Cull(seed=seed) for seed in range(3)]
        for command in before:
            assert rig.client.send(command, wait_seconds=10).is_applied
        fault(raw, run_name)
        stop = bus.Stop()
        began = time.monotonic()
        assert rig.client.send(stop, wait_seconds=20, must_listen=False).is_applied
        assert time.monotonic() - began < 4  # two seconds on a quiet machine
        after = bus.Cull(seed=9)
        assert rig.client.send(after, wait_seconds=20, must_listen=False).is_applied
        assert rig.loop.effects == [*(command.id for command in before), stop.id, after.id]
        assert rig.loop.error is None
        quiet = rig.calls()
        time.sleep(0.5)
        assert rig.calls() - quiet < 100
    finally:
        rig.close()


def test_what_still_is_in_a_stream_is_not_lost_with_its_group(rig):
    rig.loop.close()  # keeps nobody from sending
    waiting = [bus.Cull(seed=seed) for seed in range(5)]
    for command in waiting[:2]:
        rig.client.send(command, wait_seconds=None, must_listen=False)
    rig.loop = Loop(rig.transport, start=False)
    until(lambda: rig.loop.worker.num_waiting == 2)
    groups_destroyed(rig)
    for command in waiting[2:]:
        rig.client.send(command, wait_seconds=None, must_listen=False)
    until(lambda: rig.loop.worker.num_waiting == 5)
    rig.loop._thread.start()
    until(lambda: len(rig.loop.effects) == 5)
    assert rig.loop.effects == [command.id for command in waiting]


def test_streams_that_begin_anew_under_an_earlier_clock_are_read(own_server, raw, run_name):
    rig = Rig(own_server.url, run_name, None, raw)
    try:
        done = bus.Cull(seed=1)
        assert rig.client.send(done, wait_seconds=10).is_applied
        for topic in COMMAND_STREAMS:
            # As by a server whose clock was set back, or another one that took over.
            raw.delete(rig.key(topic))
        until(lambda: raw.exists(*map(rig.key, COMMAND_STREAMS)) == 2)
        for topic in COMMAND_STREAMS:
            assert raw.xinfo_stream(rig.key(topic))["last-generated-id"] == b"0-0"
            raw.execute_command("XADD", rig.key(topic), "1-1", "other", "fields")
            until(lambda: len(rig.client.dead_letters()) >= 1)
        stop = bus.Stop()
        assert rig.client.send(stop, wait_seconds=20).is_applied
        assert rig.loop.effects == [done.id, stop.id]
        until(lambda: len(rig.client.dead_letters()) == 2)
    finally:
        rig.close()


def test_a_failover_to_a_server_that_lags_behind_loses_no_command(own_server, raw, run_name):
    rig = Rig(own_server.url, run_name, None, raw)
    try:
        first, second = bus.Cull(seed=1), bus.Cull(seed=2)
        assert rig.client.send(first, wait_seconds=10).is_applied
        copy = {key: raw.dump(key) for key in raw.keys("*")}
        assert rig.client.send(second, wait_seconds=10).is_applied
        raw.flushall()
        for key, value in copy.items():
            raw.restore(key, 5_000 if key.endswith(b":lease") else 0, value, replace=True)
        stop = bus.Stop()
        began = time.monotonic()
        assert rig.client.send(stop, wait_seconds=20).is_applied
        assert time.monotonic() - began < 4  # two seconds on a quiet machine
        assert rig.loop.effects == [first.id, second.id, stop.id]
    finally:
        rig.close()


def test_a_lease_removed_again_and_again_costs_the_server_little(own_server, raw, run_name):
    rig = Rig(own_server.url, run_name, None, raw)
    try:
        began, before = time.monotonic(), rig.calls()
        while time.monotonic() - began < 2:
            streams_deleted(rig)
            time.sleep(0.002)
        assert rig.calls() - before < 10_000  # 1,000 are the test's own
        assert rig.client.send(bus.Stop(), wait_seconds=20).is_applied
        assert len(rig.alerts()) <= 6
    finally:
        rig.close()


def spoil(rig, name, *command):
    # At once: the run makes what was deleted anew.
    with rig.raw.pipeline(transaction=True) as both:
        both.delete(rig.key(name))
        both.execute_command(command[0], rig.key(name), *command[1:])
        both.execute()


def write(rig, name, *command):
    rig.raw.execute_command(command[0], rig.key(name), *command[1:])


GARBAGE = {
    "epoch": partial(write, name="run", command=("HSET", "epoch", "garbage")),
    "high epoch": partial(write, name="run", command=("HSET", "epoch", "999999")),
    "infinite epoch": partial(write, name="run", command=("HSET", "epoch", "inf")),
    "binary owner": partial(write, name="run", command=("HSET", "owner", b"\xff\x00")),
    "number": partial(write, name="run", command=("HSET", "number", "x")),
    "high number": partial(write, name="run", command=("HSET", "number", "999999")),
    "run as text": partial(spoil, name="run", command=("SET", "x")),
    "lease": partial(spoil, name="lease", command=("SET", b"\xff nonsense")),
    "lease for ever": partial(spoil, name="lease", command=("SET", "99 somebody")),
    "lease as list": partial(spoil, name="lease", command=("RPUSH", "x")),
    "generation": partial(spoil, name="generation", command=("SET", b"\xff\xfe")),
    "generation as list": partial(spoil, name="generation", command=("RPUSH", "x")),
    "sequences as text": partial(spoil, name="sequences", command=("SET", "x")),
    "sequences": partial(write, name="sequences", command=("HSET", b"\xff", "many")),
    "attempts as set": partial(spoil, name="attempts", command=("SADD", "x")),
    "attempts": partial(write, name="attempts", command=("HSET", "nothing", "x")),
    "commands as text": partial(spoil, name="commands", command=("SET", "x")),
    "urgent as list": partial(spoil, name="urgent", command=("RPUSH", "x")),
    "outcomes as text": partial(spoil, name="outcomes", command=("SET", "x")),
    "events as text": partial(spoil, name="events", command=("SET", "x")),
    "foreign entries": partial(write, name="urgent", command=("XADD", "*", "x", b"\xff")),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_the_runs_keys_ends_nothing(own_server, raw, run_name, what):
    rig = Rig(own_server.url, run_name, None, raw, lease_seconds=0.6)
    try:
        fault = GARBAGE[what]
        rig.client.send(bus.Cull(seed=1), wait_seconds=10)
        fault.func(rig, fault.keywords["name"], *fault.keywords["command"])
        began = time.monotonic()
        stop = bus.Stop()
        assert rig.client.send(stop, wait_seconds=20, must_listen=False).is_applied
        assert time.monotonic() - began < 4  # two seconds on a quiet machine
        time.sleep(0.5)  # several renewals
        assert rig.client.send(bus.Cull(seed=2), wait_seconds=20).is_applied
        assert len(rig.loop.effects) == 3
        assert rig.loop.error is None
        assert not rig.loop.worker.is_fenced
        rig.loop.close()
        # The next one finds its way too.
        rig.loop = Loop(rig.transport)
        assert rig.client.send(bus.Cull(seed=3), wait_seconds=20).is_applied
        assert len(rig.loop.effects) == 1
    finally:
        rig.close()
