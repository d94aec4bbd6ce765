"""What a transport says of a lease that was removed or belongs to somebody else."""

from __future__ import annotations

import asyncio

import pytest
import redis
from bus_support import length, lose, lose_groups, run_async
from test_worker import Loop, until

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._transport import Entry, LeaseRequest, OtherRunError, Settlement
from esper_fn.bus._worker import Worker
from esper_fn.errors import BusUnavailableError, FencedError, LeaseHeldError

STREAMS = (Topic.URGENT, Topic.COMMANDS)


@pytest.fixture
def losses(kind, request, make, run_name):
    """Removes streams of the run, its groups, or all of it."""
    if kind == "memory":
        broker = make()._broker
        yield {
            "streams": lambda: lose(broker, run_name, *STREAMS),
            "groups": lambda: lose_groups(broker, run_name),
            "rest": lambda: lose(broker, run_name),
        }
        return
    keys = [f"esper:{{{run_name}}}:{topic}" for topic in STREAMS]
    others = [f"esper:{{{run_name}}}:{name}" for name in ("run", "lease", "sequences")]

    def groups():
        for key in keys:
            for group in raw.xinfo_groups(key):
                raw.xgroup_destroy(key, group["name"])

    with redis.Redis(unix_socket_path=str(request.getfixturevalue("server").socket)) as raw:
        yield {
            "streams": lambda: raw.delete(*keys),
            "groups": groups,
            "rest": lambda: raw.delete(*others),
        }


async def publish(transport, producer, number, text):
    await transport.publish(Topic.COMMANDS, producer, number, [Entry(text)])


async def read(transport, lease):
    return await transport.read(lease, Topic.COMMANDS, limit=9, wait_seconds=0.0)


@pytest.mark.parametrize("what", ["streams", "groups", "rest"])
def test_a_removed_lease_is_nobodys_and_is_taken_again_from_the_cursor(make, losses, what):
    t = make()

    async def main():
        attached = await t.attach(LeaseRequest("h", 9))
        await publish(t, "p", 0, b"a")
        await publish(t, "p", 1, b"b")
        first, _ = await read(t, attached.lease)
        losses[what]()
        with pytest.raises(FencedError) as caught:
            await t.renew(attached.lease)
        assert caught.value.epoch == 0
        if what != "rest":
            with pytest.raises(FencedError):
                await read(t, attached.lease)
            with pytest.raises(FencedError):
                await t.claim(attached.lease, Topic.COMMANDS)
        again = await t.attach(
            LeaseRequest(
                "h",
                9,
                least_epoch=attached.lease.epoch,
                cursor={Topic.COMMANDS: first.entry_id},
                counts_attempts=False,
            )
        )
        assert again.lease.epoch > attached.lease.epoch
        assert again.attempts == {}
        await t.renew(again.lease)
        await publish(t, "q", 0, b"c")
        left = [delivery.payload for delivery in await read(t, again.lease)]
        assert left == ([b"c"] if what == "streams" else [b"b", b"c"])
        assert again.lost == ({Topic.COMMANDS} if what == "streams" else set())

    run_async(main(), t)


def test_two_leases_with_one_number_are_not_mistaken_for_each_other(make, losses):
    t, u = make(), make()

    async def main():
        older = await t.attach(LeaseRequest("one", 9))
        losses["rest"]()
        other_one = await u.attach(LeaseRequest("two", 9))
        assert other_one.lease.epoch == older.lease.epoch
        for call in (
            t.renew(older.lease),
            t.settle(older.lease, Settlement(1, {}, {}, {})),
        ):
            with pytest.raises(FencedError) as caught:
                await call
            assert caught.value.epoch == 0  # nobody has proved to be newer
        await u.renew(other_one.lease)
        with pytest.raises(LeaseHeldError) as attached:
            await t.attach(LeaseRequest("one", 9, least_epoch=older.lease.epoch))
        assert attached.value.epoch == other_one.lease.epoch

    run_async(main(), t, u)


def test_commands_are_accepted_for_the_run_that_lives_and_no_other(make):
    t = make()

    async def main():
        with pytest.raises(OtherRunError) as nobody:
            await t.publish(Topic.COMMANDS, "p", 0, [Entry(b"a")], identity="a")
        assert nobody.value.identity == ""
        attached = await t.attach(LeaseRequest("h", 9, identity="a"))
        await t.publish(Topic.COMMANDS, "p", 0, [Entry(b"a")], identity="a")
        await t.renew(attached.lease, identity="b")
        await t.publish(Topic.COMMANDS, "p", 0, [Entry(b"a")], identity="a")  # it is there
        with pytest.raises(OtherRunError) as other:
            await t.publish(Topic.COMMANDS, "p", 1, [Entry(b"b")], identity="a")
        assert other.value.identity == "b"
        await t.publish(Topic.COMMANDS, "p", 1, [Entry(b"b")])
        assert await length(t, Topic.COMMANDS) == 2
        await t.attach(LeaseRequest("h", 9))
        with pytest.raises(OtherRunError):
            await t.publish(Topic.COMMANDS, "p", 2, [Entry(b"b")], identity="b")

    run_async(main(), t)


def test_a_run_whose_lease_somebody_took_on_an_emptied_server_goes_on_and_waits(
    make, losses, caplog
):
    """Both began with the same number, so neither has proved to be the newer one."""
    announcement = bus.Announcement(run="r", host="h", pid=1, sites={})
    blocks = []

    class Blocked:
        """Lets a transport reach its server when nothing blocks it."""

        def __init__(self):
            self.inner = make()

        def __getattr__(self, name):
            call = getattr(self.inner, name)
            if name not in {"renew", "attach", "read", "claim", "settle", "publish"}:
                return call

            async def checked(*args, **options):
                if blocks:
                    raise BusUnavailableError("cut")
                return await call(*args, **options)

            return checked

    async def holder():
        transport = make()
        try:
            return await transport.holder()
        finally:
            await transport.close()

    first = Loop(Blocked, lease_seconds=0.6)
    try:
        blocks.append(1)
        losses["rest"]()
        losses["groups"]()
        second = Worker(make, announcement)
        second.start()
        owner = asyncio.run(holder())
        blocks.clear()
        until(lambda: first.step > 1_000)
        assert asyncio.run(holder()) == owner
        assert first.error is None
        assert not second.is_fenced
        assert not first.worker.is_fenced
        until(lambda: "takes no commands until the other one ends" in caplog.text)
        second.close()
        until(lambda: asyncio.run(holder()) is not None, 5)
        assert first.error is None
    finally:
        first.close()


def test_a_lease_taken_again_whose_answer_got_lost_does_not_fence_itself_off(make, losses):
    lost = []

    class Cut:
        """Loses the answers to some attachments."""

        def __init__(self):
            self.inner = make()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        async def attach(self, *args, **options):
            attached_again = await self.inner.attach(*args, **options)
            if lost and lost.pop():
                raise BusUnavailableError("cut")
            return attached_again

    loop = Loop(Cut, lease_seconds=0.6)
    try:
        lost += [True, True]
        losses["groups"]()
        until(lambda: not lost)
        until(lambda: loop.worker.position().epoch >= 4)
        assert loop.error is None
    finally:
        loop.close()
