"""Groups moved past commands, and streams that can take no more of them."""

from __future__ import annotations

import secrets

import pytest
import redis
from bus_support import run_async
from test_lost_lease import HIGHEST, Place
from test_worker import until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._address import parse_address
from esper_fn.bus._redis import RedisTransport
from esper_fn.bus._transport import Entry, Settlement
from esper_fn.errors import BusUnavailableError, FencedError


@pytest.fixture
def place(server):
    with redis.Redis(unix_socket_path=str(server.socket)) as raw:
        place = Place(server.url, f"run-{secrets.token_hex(6)}", None, raw, lease_seconds=0.9)
        yield place
        place.close()


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


async def read(transport, lease, limit=1, consumer="h"):
    return await transport.read(
        [Topic.COMMANDS], lease.group, consumer, limit=limit, wait_seconds=0.0
    )


def test_a_group_moved_past_waiting_commands_is_no_place(transport, move):
    async def main():
        held = await transport.attach("h", lease_seconds=9)
        for number in range(3):
            await publish(transport, number)
        (first,) = await read(transport, held.lease)
        taken = {Topic.COMMANDS: first.entry_id}
        await transport.renew(held.lease, lease_seconds=9, last_read=taken)
        move("$")
        with pytest.raises(FencedError) as caught:
            await transport.renew(held.lease, lease_seconds=9, last_read=taken)
        assert caught.value.epoch == 0
        again = await transport.attach("h", lease_seconds=9, cursor=taken)
        assert [one.payload for one in await read(transport, again.lease, 9)] == [b"1", b"2"]

    run_async(main(), transport)


def test_commands_on_their_way_are_not_skipped_ones(transport, move):
    async def main():
        held = await transport.attach("h", lease_seconds=9)
        for number in range(4):
            await publish(transport, number)
        (first,) = await read(transport, held.lease)
        await read(transport, held.lease, 2)
        for last in ("0-0", first.entry_id):
            taken = {Topic.COMMANDS: last}
            await transport.renew(held.lease, lease_seconds=9, last_read=taken)
        (fourth,) = await read(transport, held.lease)
        taken = {Topic.COMMANDS: fourth.entry_id}
        settlement = Settlement(1, {Topic.COMMANDS: [fourth.entry_id]}, {}, {})
        await transport.settle(held.lease, settlement)  # the others wait for something
        await transport.renew(held.lease, lease_seconds=9, last_read=taken)

    run_async(main(), transport)


def test_commands_handed_to_somebody_else_are_skipped_ones(transport):
    async def main():
        held = await transport.attach("h", lease_seconds=9)
        await publish(transport, 0)
        await read(transport, held.lease, consumer="other")
        with pytest.raises(FencedError):
            await transport.renew(held.lease, lease_seconds=9, last_read=held.cursor)

    run_async(main(), transport)


def test_renewals_amid_many_commands_find_nothing_amiss(server, run_name):
    place = Place(server.url, run_name, None, None, lease_seconds=0.03, limit=64)
    try:
        for seed in range(1_500):
            command = bus.Stop() if seed % 2 else bus.Cull(seed=seed)
            place.client.send(command, wait_seconds=None, must_listen=False)
        until(lambda: len(place.loop.effects) == 1_500)
        assert place.alerts() == []
    finally:
        place.close()


def exhaust(place, topic):
    place.raw.execute_command("XSETID", place.key(topic), f"{HIGHEST}-{HIGHEST}")


@pytest.mark.parametrize("remove", ["delete", "rename"])
@pytest.mark.parametrize("topic", [Topic.URGENT, Topic.COMMANDS])
def test_a_command_stream_that_takes_no_more_is_told_to_both_sides(place, topic, remove):
    assert place.client.send(bus.Cull(seed=1), wait_seconds=20).is_done
    assert place.client.send(bus.Stop(), wait_seconds=20).is_done
    exhaust(place, topic)
    until(lambda: "bus_stream_exhausted" in place.alerts())
    command = bus.Stop() if topic is Topic.URGENT else bus.Cull(seed=2)
    with pytest.raises(BusUnavailableError) as caught:
        place.client.send(command, wait_seconds=0.5)
    assert f"{place.key(topic)} can take no more entries" in str(caught.value)
    assert "remove or rename it on the server (DEL, RENAME)" in str(caught.value)
    assert place.alerts() == ["bus_stream_exhausted"]  # once
    if remove == "delete":
        place.raw.delete(place.key(topic))
    else:
        place.raw.rename(place.key(topic), place.key("old"))
    assert place.client.send(command, wait_seconds=20).is_done
    assert len(place.loop.effects) == 3
    assert place.loop.error is None


def test_an_outcome_stream_that_takes_no_more_is_told(place):
    assert place.client.send(bus.Cull(seed=1), wait_seconds=20).is_done
    exhaust(place, Topic.OUTCOMES)
    stop = bus.Stop()
    place.client.send(stop, wait_seconds=None)
    until(lambda: stop.id in place.loop.effects)
    until(lambda: "bus_refuses" in place.alerts())
    words = [
        message.text
        for message in place.client.watch([Topic.EVENTS], seconds=0.3, from_beginning=True)
        if isinstance(message, bus.Alert)
    ]
    assert f"{place.key(Topic.OUTCOMES)} can take no more entries" in words[0]
    place.raw.delete(place.key(Topic.OUTCOMES))
    assert place.client.send(stop, wait_seconds=20).is_done
    assert place.loop.effects.count(stop.id) == 1
