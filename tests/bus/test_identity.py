"""Signed commands are for one run: what was captured from an earlier one of its name is refused."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
import redis
from bus_support import lose_all, page
from test_worker import SECRET, Loop, until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._connect import make_transport
from esper_fn.bus._session import WorkerOptions
from esper_fn.bus._transport import Entry
from esper_fn.bus._worker import Worker
from esper_fn.errors import BusUnavailableError


@pytest.fixture
def site(kind, request, run_name):
    """An address of either kind, and a way to empty the server."""
    broker = bus.Broker()
    if kind == "memory":
        yield Site("memory", run_name, broker, partial(lose_all, broker))
        return
    with bus.PrivateServer() as server, redis.Redis(unix_socket_path=str(server.socket)) as raw:
        yield Site(server.url, run_name, broker, raw.flushall)


class Site:
    def __init__(self, url, run, broker, empty):
        self.url, self.run, self.broker, self.empty = url, run, broker, empty

    def transport(self):
        return make_transport(self.url, self.run, keys=SECRET, broker=self.broker)

    def loop(self, **options):
        return Loop(self.transport, keys=SECRET, **options)

    def connect(self):
        return bus.connect(self.url, run=self.run, keys=SECRET, broker=self.broker)

    def captured(self):
        """All commands in the streams, as whoever reads the wire has them."""

        async def main():
            transport = self.transport()
            await transport.open()
            entries = []
            for topic in (Topic.URGENT, Topic.COMMANDS):
                entries += await page(transport, topic, after="0-0", limit=100)
            await transport.close()
            return entries

        return asyncio.run(main())

    def put(self, deliveries):
        async def main():
            transport = self.transport()
            await transport.open()
            for number, entry in enumerate(deliveries):
                await transport.publish(
                    entry.topic, "thief", number, [Entry(entry.payload, entry.signature)]
                )
            await transport.close()

        asyncio.run(main())


def test_captured_commands_do_not_act_in_a_new_run_of_the_same_name(site):
    first = site.loop()
    with site.connect() as client:
        for command in (bus.Stop(), bus.Pause(), bus.Cull(seed=1)):
            assert client.send(command, wait_seconds=10).is_applied
    captured = site.captured()
    assert len(captured) == 3
    first.close()
    site.empty()
    second = site.loop()
    try:
        site.put(captured)
        with site.connect() as client:
            fresh = bus.Cull(seed=2)
            assert client.send(fresh, wait_seconds=10).is_applied
            until(lambda: len(client.dead_letters()) == 3)
            letters = [letter for _, letter in client.dead_letters()]
            assert {letter.reason for letter in letters} == {"replayed"}
            assert "another run of this name" in letters[0].text
        assert second.effects == [fresh.id]
        assert second.worker.counts == {"replayed": 3}
    finally:
        second.close()


def test_captured_commands_do_not_act_in_a_run_that_begins_with_them(site):
    first = site.loop()
    with site.connect() as client:
        assert client.send(bus.Stop(), wait_seconds=10).is_applied
    captured = site.captured()
    first.close()
    site.empty()
    site.put(captured)  # they wait already
    second = site.loop()
    try:
        with site.connect() as client:
            assert client.send(bus.Cull(seed=2), wait_seconds=10).is_applied
        assert len(second.effects) == 1
    finally:
        second.close()


def test_a_restored_run_stays_itself_and_takes_what_was_sent_meanwhile(site):
    first = site.loop()
    with site.connect() as client:
        early, late, waits = (bus.Cull(seed=seed) for seed in range(3))
        assert client.send(early, wait_seconds=10).is_applied
        saved = bus.RunPosition.from_dict(first.worker.position().as_dict())
        assert client.send(late, wait_seconds=10).is_applied
        first.close()
        client.send(waits, wait_seconds=None, must_listen=False)
        second = site.loop(position=saved)
        try:
            assert second.worker.position().identity == saved.identity
            until(lambda: len(second.effects) == 2)
            assert second.effects == [late.id, waits.id]
            assert client.send(waits, wait_seconds=10).is_applied
        finally:
            second.close()


def test_a_client_that_stays_signs_for_whichever_run_lives(site):
    with site.connect() as client:
        for turn in range(3):
            loop = site.loop()
            command = bus.Cull(seed=turn)
            assert client.send(command, wait_seconds=10).is_applied
            assert loop.effects == [command.id]
            loop.close()
            if turn == 1:
                site.empty()
        # The last run never saw the client's first numbers; nothing of it was refused.
        assert {letter.reason for _, letter in client.dead_letters()} <= {"gap"}


def test_a_signed_command_waits_for_a_run_to_be_signed_for(site):
    with site.connect() as client:
        early = bus.Cull(seed=1)
        with pytest.raises(BusUnavailableError, match="takes no commands yet"):
            client.send(early, wait_seconds=0.3, must_listen=False)
        loop = site.loop()
        try:
            until(lambda: loop.effects == [early.id])
        finally:
            loop.close()


def test_a_run_that_does_not_listen_yet_takes_no_commands(site):
    announcement = bus.Announcement(run=site.run, host="h", pid=1, sites={})
    worker = Worker(site.transport, announcement, options=WorkerOptions(keys=SECRET))
    worker.start(is_listening=False)
    try:
        with site.connect() as client:
            with pytest.raises(BusUnavailableError, match="takes no commands yet"):
                client.send(bus.Cull(seed=1), wait_seconds=0.3)
            time.sleep(0.1)
            assert worker.num_waiting == 0
            worker.listen()
            until(lambda: worker.num_waiting == 1)
    finally:
        worker.close()


def test_emptied_while_it_runs_a_run_refuses_what_was_captured_before(site):
    loop = site.loop(lease_seconds=0.6)
    try:
        with site.connect() as client:
            done = [bus.Cull(seed=seed) for seed in range(3)]
            for command in done:
                assert client.send(command, wait_seconds=10).is_applied
            captured = site.captured()
            site.empty()
            site.put(captured)
            stop = bus.Stop()
            assert client.send(stop, wait_seconds=10, must_listen=False).is_applied
            time.sleep(0.2)
            assert loop.effects == [*(command.id for command in done), stop.id]
    finally:
        loop.close()
