"""Faults on a real server: nothing accepted is lost, nothing is done twice."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis
from bus_proxy import Proxy
from bus_support import length
from test_worker import Loop, until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._connect import make_transport
from esper_fn.bus._envelope import FORMAT, SCHEMA, Header, Link
from esper_fn.bus._messages import LIMITS
from esper_fn.bus._outbox import Publisher
from esper_fn.bus._transport import Entry
from esper_fn.errors import BusError, BusUnavailableError, OversizedError

HERE = Path(__file__).parent


@pytest.fixture
def own_server(tmp_path):
    with bus.PrivateServer(tmp_path / "server", with_port=True) as running:
        yield running


def maker(url, run, keys=bus.NO_KEYS):
    return lambda: make_transport(url, run, keys=keys)


class Sender(threading.Thread):
    """Sends numbered commands, several at once; notes which were accepted."""

    def __init__(self, url, run, count, *, at_once=20, **fields):
        super().__init__(daemon=True)
        self.commands = [bus.Cull(seed=i % 5, **fields) for i in range(count)]
        self.accepted, self.error = [], None
        self._url, self._run, self._at_once = url, run, at_once

    def run(self):
        try:
            asyncio.run(self._work())
        except BusError as error:
            self.error = error

    async def _work(self):
        async with bus.connect_async(self._url, run=self._run, keys=bus.NO_KEYS) as client:
            for first in range(0, len(self.commands), self._at_once):
                some = self.commands[first : first + self._at_once]
                await asyncio.gather(
                    *(client.send(c, wait_seconds=None, must_listen=False) for c in some)
                )
                self.accepted += [c.id for c in some]


def test_a_server_killed_mid_flow_loses_nothing_accepted(own_server, run_name):
    loop = Loop(maker(own_server.url, run_name), limit=50)
    sender = Sender(own_server.url, run_name, 2_000)
    sender.start()
    until(lambda: len(sender.accepted) > 300)
    own_server.kill()
    own_server.start()
    back = time.monotonic()
    count = len(loop.effects)
    until(lambda: len(loop.effects) > count, 10)
    assert time.monotonic() - back < 2
    sender.join(30)
    until(lambda: len(loop.effects) >= 2_000, 30)
    assert loop.effects == [c.id for c in sender.commands]
    until(lambda: loop.worker.num_settled >= 2_000)
    loop.close()
    with bus.connect(own_server.url, run=run_name, keys=bus.NO_KEYS) as client:
        assert client.dead_letters() == []


def test_a_server_that_lost_its_memory_gets_everything_again(own_server, run_name):
    loop = Loop(maker(own_server.url, run_name), start=False, lease_seconds=0.6)
    with bus.connect(own_server.url, run=run_name, keys=bus.NO_KEYS) as client:
        waiting = [bus.Cull(seed=i) for i in range(20)]
        for command in waiting:
            client.send(command, wait_seconds=None)
        until(lambda: loop.worker.num_waiting == 20)
        with redis.Redis(unix_socket_path=str(own_server.socket)) as raw:
            raw.flushall()
        until(lambda: loop.worker._session.num_data_losses == 1)
        fresh = bus.Cull(seed=99)
        client.send(fresh, wait_seconds=None)
        until(lambda: loop.worker.num_waiting >= 21)
        time.sleep(0.2)
        loop._thread.start()
        until(lambda: len(loop.effects) >= 21)
        time.sleep(0.2)
        assert loop.effects == [c.id for c in (*waiting, fresh)]
        seen = [
            message.name
            for message in client.watch([Topic.EVENTS], seconds=1, from_beginning=True)
            if isinstance(message, bus.Alert)
        ]
        assert seen == ["bus_data_lost"]
    loop.close()


def test_clients_send_unanswered_commands_again_to_a_server_that_lost_them(own_server, run_name):
    with bus.connect(own_server.url, run=run_name, keys=bus.NO_KEYS) as client:
        sent = [bus.Cull(seed=i) for i in range(4)]
        for command in sent[:3]:
            client.send(command, wait_seconds=None, must_listen=False)
        with redis.Redis(unix_socket_path=str(own_server.socket)) as raw:
            raw.flushall()
        client.send(sent[3], wait_seconds=None, must_listen=False)
        loop = Loop(maker(own_server.url, run_name))
        until(lambda: len(loop.effects) == 4)
        assert loop.effects == [command.id for command in sent]
        assert client.dead_letters() == []
        loop.close()


def start_run(url, run, folder, die_after=0):
    return subprocess.Popen(
        [sys.executable, str(HERE / "run_process.py"), url, run, str(folder), str(die_after)]
    )


def effects(folder):
    path = folder / "state.json"
    return json.loads(path.read_text())["effects"] if path.exists() else []


def test_a_run_killed_between_effect_and_acknowledgement_acts_once(server, run_name, tmp_path):
    sender = Sender(server.url, run_name, 30)
    sender.start()
    sender.join(20)
    dies = start_run(server.url, run_name, tmp_path, die_after=7)
    assert dies.wait(20) == -signal.SIGKILL
    lives = start_run(server.url, run_name, tmp_path)
    try:
        until(lambda: len(effects(tmp_path)) >= 30, 20)
        with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
            # The seventh is in force; its outcome got lost with the process and is told now.
            assert client.send(sender.commands[6], wait_seconds=10).is_applied
        assert effects(tmp_path) == [c.id for c in sender.commands]
    finally:
        lives.kill()
        lives.wait()


def test_a_paused_run_that_was_replaced_is_fenced_off(server, run_name, tmp_path):
    first = start_run(server.url, run_name, tmp_path)
    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        until(lambda: run_name in client.active_runs())
        assert client.send(bus.Cull(seed=0), wait_seconds=10).is_applied
        first.send_signal(signal.SIGSTOP)
        until(lambda: run_name not in client.active_runs())
        second = start_run(server.url, run_name, tmp_path)
        try:
            until(lambda: run_name in client.active_runs())
            assert client.send(bus.Cull(seed=1), wait_seconds=10).is_applied
            first.send_signal(signal.SIGCONT)
            assert first.wait(10) == 7
            assert client.send(bus.Cull(seed=2), wait_seconds=10).is_applied
            assert len(effects(tmp_path)) == 3
        finally:
            for process in (first, second):
                process.kill()
                process.wait()


def test_poison_is_set_aside_after_five_deaths_and_its_neighbours_act(server, run_name, tmp_path):
    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        commands = [bus.Cull(seed=0), bus.Cull(seed=1, sender="poison"), bus.Cull(seed=2)]
        for command in commands:
            client.send(command, wait_seconds=None, must_listen=False)
        for _ in range(5):
            assert start_run(server.url, run_name, tmp_path).wait(20) == -signal.SIGKILL
        lives = start_run(server.url, run_name, tmp_path)
        try:
            until(lambda: len(effects(tmp_path)) == 2, 20)
            assert effects(tmp_path) == [commands[0].id, commands[2].id]
            until(client.dead_letters)
            ((_, letter),) = client.dead_letters()
            assert letter.reason == "failing"
            assert client.send(commands[1], wait_seconds=10).code == "FAILING"
        finally:
            lives.kill()
            lives.wait()


def test_an_answer_cut_after_the_write_makes_one_entry(server, run_name):
    proxy = Proxy(server.port)
    try:

        async def main():
            transport = make_transport(proxy.url, run_name, keys=bus.NO_KEYS)
            await transport.open()
            publisher = Publisher(Link(transport), Topic.COMMANDS)
            for number in range(5):
                proxy.cut_replies = True
                task = publisher.post(bus.Cull(seed=number))
                await asyncio.sleep(0.15)
                proxy.cut_replies = False
                assert await asyncio.wait_for(task, 10) == number
            assert publisher.num_failures >= 5
            assert await length(transport, Topic.COMMANDS) == 5
            await publisher.close()
            await transport.close()

        asyncio.run(main())
    finally:
        proxy.close()


@pytest.mark.parametrize("fault", ["cut", "silence", "slow"])
def test_a_broken_network_delays_and_loses_nothing(server, run_name, fault):
    proxy = Proxy(server.port)
    try:
        loop = Loop(maker(proxy.url, run_name), limit=50)
        sender = Sender(proxy.url, run_name, 600)
        sender.start()
        until(lambda: len(sender.accepted) > 100)
        if fault == "cut":
            for _ in range(5):
                proxy.cut()
                time.sleep(0.1)
        elif fault == "silence":
            proxy.is_silent = True
            began = time.monotonic()
            for _ in range(200):
                loop.worker.take(0, 0)
                loop.worker.offer([bus.StepMetrics(step=0, loss=0.0)])
            assert time.monotonic() - began < 0.5  # the loop never waits
            proxy.is_silent = False
        else:
            proxy.delay_seconds = 0.05
        until(lambda: len(loop.effects) >= 600, 40)
        assert loop.effects == [c.id for c in sender.commands]
        sender.join(20)
        loop.close()
    finally:
        proxy.close()


def test_a_dead_server_costs_the_loop_nothing_and_clients_are_told(own_server, run_name):
    loop = Loop(maker(own_server.url, run_name), start=False)
    client = bus.connect(own_server.url, run=run_name, keys=bus.NO_KEYS)
    own_server.kill()
    frame = [bus.StepMetrics(step=0, loss=0.0)]
    worst = 0.0
    for _ in range(2_000):
        began = time.perf_counter()
        loop.one_step()
        loop.worker.offer(frame)
        worst = max(worst, time.perf_counter() - began)
    assert worst < 0.25
    with pytest.raises(BusUnavailableError, match="does not answer"):
        client.send(bus.Cull(seed=1), wait_seconds=1)
    own_server.start()
    loop._thread.start()
    command = bus.Cull(seed=2)
    until(lambda: not client.asynchronous.transport._keys.breaker.seconds_left())
    assert client.send(command, wait_seconds=20).is_applied
    client.close()
    loop.close()


def raw_entry(transport, payload, keys=bus.NO_KEYS, topic=Topic.COMMANDS):
    return Entry(payload, keys.sign(transport.stream(topic), payload))


def envelope(command, *, producer="raw", sequence=0, format_=FORMAT, identity=""):
    header = Header(
        format=format_,
        producer=producer,
        sequence=sequence,
        issued_at_ms=int(time.time() * 1000),
        identity=identity,
    )
    return SCHEMA.encode(header, [command])


SECRET = bus.Keyring(active="k1", keys={"k1": b"0" * 32})


def test_what_must_not_act_is_set_aside_and_the_rest_goes_on(server, run_name):
    loop = Loop(maker(server.url, run_name, SECRET), keys=SECRET)
    identity = loop.worker.position().identity
    good = envelope(bus.Cull(seed=1, id="good"), identity=identity)

    async def inject():
        t = make_transport(server.url, run_name, keys=SECRET)
        await t.open()
        signed = raw_entry(t, good, SECRET)
        elsewhere = Entry(good, SECRET.sign(t.stream(Topic.OUTCOMES), good))
        big = LIMITS[Topic.COMMANDS].max_entry_bytes + 1
        strange = envelope(bus.StepMetrics(step=1, loss=0.0), producer="odd", identity=identity)
        downgraded = envelope(bus.Cull(seed=1, id="down"), producer="down", format_=0)
        for number, entry in enumerate(
            [
                signed,
                signed,  # a copy of a valid message
                elsewhere,
                Entry(good, signed.signature[:-1]),
                Entry(good, b""),
                raw_entry(t, b"\xc1nonsense", SECRET),
                Entry(b"x" * big, b""),
                raw_entry(t, strange, SECRET),
                raw_entry(t, downgraded, SECRET),
            ]
        ):
            await t.publish(Topic.COMMANDS, "injector", number, [entry])
        with redis.Redis(unix_socket_path=str(server.socket)) as raw:
            raw.xadd(t.stream(Topic.COMMANDS), {"other": "fields"})
        await t.close()

    asyncio.run(inject())
    with bus.connect(server.url, run=run_name, keys=SECRET) as client:
        assert client.send(bus.Cull(seed=2, id="last"), wait_seconds=10).is_applied
        until(lambda: len(client.dead_letters()) == 8)
        reasons = [letter.reason for _, letter in client.dead_letters()]
        assert reasons.count("forged") == 4
        assert sorted(set(reasons)) == ["forged", "oversized", "undecodable", "unsupported"]
        (oversized,) = [le for _, le in client.dead_letters() if le.reason == "oversized"]
        assert oversized.payload == b""
        assert oversized.size_bytes > 65_536
    assert loop.effects == ["good", "last"]
    assert loop.worker.counts["duplicate"] == 1
    loop.close()


def test_an_oversized_message_is_refused_by_its_sender(server, run_name):
    loop = Loop(maker(server.url, run_name))
    with bus.connect(server.url, run=run_name, keys=bus.NO_KEYS) as client:
        culls = tuple(bus.Cull(seed=i, site="s" * 200, sender="x" * 200) for i in range(256))
        with pytest.raises(OversizedError, match="at most 65,536"):
            client.send(bus.Batch(commands=culls), wait_seconds=5)
        assert client.send(bus.Cull(seed=1), wait_seconds=10).is_applied
    loop.close()


def test_a_full_memory_delays_commands_and_loses_none(tmp_path, run_name):
    options = {"maxmemory": "64mb", "maxmemory-policy": "noeviction"}
    with bus.PrivateServer(tmp_path / "s", options=options) as server:
        loop = Loop(maker(server.url, run_name), limit=50)
        with redis.Redis(unix_socket_path=str(server.socket)) as raw:
            raw.config_set("maxmemory", "1")
            sender = Sender(server.url, run_name, 100)
            sender.start()
            time.sleep(0.5)
            assert loop.effects == []
            raw.config_set("maxmemory", "64mb")
        until(lambda: len(loop.effects) == 100, 20)
        assert loop.effects == [c.id for c in sender.commands]
        loop.close()


def test_a_stalled_watcher_never_blocks_the_run_and_memory_is_bounded(server, run_name):
    loop = Loop(maker(server.url, run_name), start=False)
    limit = LIMITS[Topic.TELEMETRY].max_entries

    async def count():
        t = make_transport(server.url, run_name, keys=bus.NO_KEYS)
        await t.tail({Topic.TELEMETRY: "0-0"}, limit=1, wait_seconds=0.0)
        number = await length(t, Topic.TELEMETRY)
        await t.close()
        return number

    asyncio.run(count())
    began = time.monotonic()
    for step in range(300):
        loop.worker.offer([bus.StepMetrics(step=step, loss=0.0) for _ in range(200)])
    assert time.monotonic() - began < 5
    assert asyncio.run(count()) <= 1.1 * limit
    loop.close()
