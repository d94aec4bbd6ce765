"""Groups moved past commands, and streams that can take no more of them."""

from __future__ import annotations

import secrets

import pytest
import redis
from bus_support import run_async
from test_lost_lease import HIGHEST, Rig
from test_worker import until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._address import parse_address
from esper_fn.bus._redis import RedisTransport
from esper_fn.bus._transport import Entry, LeaseRequest, Settlement
from esper_fn.errors import BusUnavailableError, FencedError


@pytest.fixture
def rig(server):
    with redis.Redis(unix_socket_path=str(server.socket)) as raw:
        rig = Rig(server.url, f"run-{secrets.token_hex(6)}", None, raw, lease_seconds=0.9)
        yield rig
        rig.close()


@pytest.fixture
def transport(server, run_name):
    return RedisTransport(parse_address(server.url), run_name, has_key=False)


@pytest.fixture
def move(server, run_name):
    with redis.Redis(unix_socket_path=str(server.socket)) as raw:
        stream = f"esper:{{{run_name}}}:commands"

        def move(to):
            raw.xgroup_setid(stream, raw.xinfo_groups(stream)[0]["name"], to)

        yield move


async def publish(transport, number):
    await transport.publish(Topic.COMMANDS, "p", number, [Entry(b"%d" % number)])


async def read(transport, lease, limit=1):
    return await transport.read(lease, Topic.COMMANDS, limit=limit, wait_seconds=0.0)


def test_a_group_moved_past_waiting_commands_ends_the_lease(transport, move):
    async def main():
        attached = await transport.attach(LeaseRequest("h", 9))
        for number in range(3):
            await publish(transport, number)
        (first,) = await read(transport, attached.lease)
        taken = {Topic.COMMANDS: first.entry_id}
        await transport.renew(attached.lease, last_read=taken)
        move("$")
        with pytest.raises(FencedError) as caught:
            await transport.renew(attached.lease, last_read=taken)
        assert caught.value.epoch == 0
        again = await transport.attach(LeaseRequest("h", 9, cursor=taken))
        assert [entry.payload for entry in await read(transport, again.lease, 9)] == [b"1", b"2"]

    run_async(main(), transport)


def test_commands_on_their_way_are_not_skipped_ones(transport, move):
    async def main():
        attached = await transport.attach(LeaseRequest("h", 9))
        for number in range(4):
            await publish(transport, number)
        (first,) = await read(transport, attached.lease)
        await read(transport, attached.lease, 2)
        for last in ("0-0", first.entry_id):
            taken = {Topic.COMMANDS: last}
            await transport.renew(attached.lease, last_read=taken)
        (fourth,) = await read(transport, attached.lease)
        taken = {Topic.COMMANDS: fourth.entry_id}
        settlement = Settlement(1, {Topic.COMMANDS: [fourth.entry_id]}, {}, {})
        await transport.settle(attached.lease, settlement)  # the others wait for something
        await transport.renew(attached.lease, last_read=taken)

    run_async(main(), transport)


def test_commands_handed_to_somebody_else_are_skipped_ones(transport):
    async def main():
        attached = await transport.attach(LeaseRequest("h", 9))
        await publish(transport, 0)
        await read(transport, attached.lease._replace(holder="other"))
        with pytest.raises(FencedError):
            await transport.renew(attached.lease, last_read=attached.cursor)

    run_async(main(), transport)


def test_renewals_amid_many_commands_find_nothing_amiss(server, run_name):
    rig = Rig(server.url, run_name, None, None, lease_seconds=0.03, limit=64)
    try:
        for seed in range(1_500):
            command = bus.Stop() if seed % 2 else bus.Cull(seed=seed)
            rig.client.send(command, wait_seconds=None, must_listen=False)
        until(lambda: len(rig.loop.effects) == 1_500)
        assert rig.alerts() == []
    finally:
        rig.close()


def exhaust(rig, topic):
    rig.raw.execute_command("XSETID", rig.key(topic), f"{HIGHEST}-{HIGHEST}")


@pytest.mark.parametrize("remove", ["delete", "rename"])
@pytest.mark.parametrize("topic", [Topic.URGENT, Topic.COMMANDS])
def test_a_command_stream_that_takes_no_more_is_told_to_both_sides(rig, topic, remove):
    assert rig.client.send(bus.Cull(seed=1), wait_seconds=20).is_applied
    assert rig.client.send(bus.Stop(), wait_seconds=20).is_applied
    exhaust(rig, topic)
    until(lambda: "bus_stream_exhausted" in rig.alerts())
    command = bus.Stop() if topic is Topic.URGENT else bus.Cull(seed=2)
    with pytest.raises(BusUnavailableError) as caught:
        rig.client.send(command, wait_seconds=0.5)
    assert f"{rig.key(topic)} can take no more entries" in str(caught.value)
    assert "remove or rename it on the server (DEL, RENAME)" in str(caught.value)
    assert rig.alerts() == ["bus_stream_exhausted"]  # once
    if remove == "delete":
        rig.raw.delete(rig.key(topic))
    else:
        rig.raw.rename(rig.key(topic), rig.key("old"))
    assert rig.client.send(command, wait_seconds=20).is_applied
    assert len(rig.loop.effects) == 3
    assert rig.loop.error is None


def test_an_outcome_stream_that_takes_no_more_is_told(rig):
    assert rig.client.send(bus.Cull(seed=1), wait_seconds=20).is_applied
    exhaust(rig, Topic.OUTCOMES)
    stop = bus.Stop()
    rig.client.send(stop, wait_seconds=None)
    until(lambda: stop.id in rig.loop.effects)
    until(lambda: "bus_refuses" in rig.alerts())
    words = [
        message.text
        for message in rig.client.watch([Topic.EVENTS], seconds=0.3, from_beginning=True)
        if isinstance(message, bus.Alert)
    ]
    assert f"{rig.key(Topic.OUTCOMES)} can take no more entries" in words[0]
    rig.raw.delete(rig.key(Topic.OUTCOMES))
    assert rig.client.send(stop, wait_seconds=20).is_applied
    assert rig.loop.effects.count(stop.id) == 1
