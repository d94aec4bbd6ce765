"""The contract of `Transport`, for every implementation."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from bus_support import length, page, run_async

from esper_fn.bus import Topic
from esper_fn.bus._messages import LIMITS
from esper_fn.bus._transport import Entry, LeaseRequest, Settlement
from esper_fn.errors import BusUnavailableError, BusyError, FencedError, LeaseHeldError


def entries(*texts):
    return [Entry(text.encode(), b"") for text in texts]


def texts(deliveries):
    return [delivery.payload.decode() for delivery in deliveries]


def settlement(number, deliveries=(), *, outcomes=(), dead=(), sequences=None):
    done, cursor = {}, {}
    for delivery in deliveries:
        done.setdefault(delivery.topic, []).append(delivery.entry_id)
        cursor[delivery.topic] = delivery.entry_id
    return Settlement(number, done, cursor, sequences or {}, entries(*outcomes), entries(*dead))


async def read(transport, lease, topic=Topic.COMMANDS, *, limit=100, wait=0.0):
    return await transport.read(lease, topic, limit=limit, wait_seconds=wait)


def test_entries_come_out_in_order_and_once_for_each_lease(make):
    t = make()

    async def main():
        await t.open()
        lease = (await t.attach(LeaseRequest("h", 9))).lease
        await t.publish(Topic.COMMANDS, "p", 0, entries("a", "b"))
        await t.publish(Topic.COMMANDS, "p", 2, entries("c"))
        first = await read(t, lease, limit=2)
        assert texts(first) == ["a", "b"]
        assert texts(await read(t, lease)) == ["c"]
        assert await read(t, lease) == []
        await t.settle(lease, settlement(1, first))
        newer = (await t.attach(LeaseRequest("h", 9))).lease
        assert texts(await read(t, newer)) == ["c"]
        newest = await t.attach(LeaseRequest("h", 9, cursor={}))
        assert texts(await read(t, newest.lease)) == ["a", "b", "c"]
        assert await length(t, Topic.COMMANDS) == 3

    run_async(main(), t)


def test_a_repeated_publication_adds_nothing(make):
    t = make()

    async def main():
        first = await t.publish(Topic.COMMANDS, "p", 0, entries("a", "b"))
        again = await t.publish(Topic.COMMANDS, "p", 0, entries("a", "b"))
        more = await t.publish(Topic.COMMANDS, "p", 1, entries("b", "c"))
        other = await t.publish(Topic.COMMANDS, "q", 0, entries("x"))
        assert [p.num_new for p in (first, again, more, other)] == [2, 0, 1, 1]
        assert texts(await page(t, Topic.COMMANDS)) == ["a", "b", "c", "x"]

    run_async(main(), t)


def test_a_full_command_stream_refuses_all_or_nothing_until_it_is_drained(make):
    t = make()
    limit = LIMITS[Topic.URGENT].max_entries

    async def main():
        await t.publish(Topic.URGENT, "p", 0, entries(*map(str, range(limit - 1))))
        with pytest.raises(BusyError, match=f"at most {limit:,}"):
            await t.publish(Topic.URGENT, "p", limit - 1, entries("x", "y"))
        assert await length(t, Topic.URGENT) == limit - 1
        lease = (await t.attach(LeaseRequest("h", 9))).lease
        got = await read(t, lease, Topic.URGENT, limit=500)
        with pytest.raises(BusyError):
            await t.publish(Topic.URGENT, "p", limit - 1, entries("x", "y"))
        await t.settle(lease, settlement(1, got))
        await t.publish(Topic.URGENT, "p", limit - 1, entries("x", "y"))
        assert await length(t, Topic.URGENT) == limit + 1

    run_async(main(), t)


def test_telemetry_forgets_the_oldest(make):
    t = make()
    limit = LIMITS[Topic.TELEMETRY].max_entries

    async def main():
        for start in range(0, 3 * limit, 500):
            await t.publish(
                Topic.TELEMETRY, "p", start, entries(*map(str, range(start, start + 500)))
            )
        assert limit <= await length(t, Topic.TELEMETRY) <= 1.1 * limit

    run_async(main(), t)


def test_a_waiting_reader_wakes_within_milliseconds(make):
    reader, writer = make(), make()

    async def main():
        await reader.open()
        await writer.open()
        lease = (await reader.attach(LeaseRequest("h", 9))).lease
        task = asyncio.create_task(read(reader, lease, Topic.URGENT, wait=None))
        await asyncio.sleep(0.1)
        assert not task.done()
        began = time.perf_counter()
        await writer.publish(Topic.URGENT, "p", 0, entries("now"))
        assert texts(await task) == ["now"]
        assert time.perf_counter() - began < 0.5

    run_async(main(), reader, writer)


def test_a_reader_gives_up_after_its_time(make):
    t = make()

    async def main():
        lease = (await t.attach(LeaseRequest("h", 9))).lease
        began = time.perf_counter()
        assert await read(t, lease, wait=0.2) == []
        assert 0.15 < time.perf_counter() - began < 2
        assert await t.tail({Topic.EVENTS: "0-0"}, limit=9, wait_seconds=0.05) == []

    run_async(main(), t)


def test_tail_shows_everyone_everything(make):
    t, u = make(), make()

    async def main():
        await t.publish(Topic.EVENTS, "p", 0, entries("old"))
        after = await t.last_ids([Topic.EVENTS, Topic.OUTCOMES])
        assert after[Topic.OUTCOMES] == "0-0"
        await t.publish(Topic.EVENTS, "p", 1, entries("new"))
        for reader in (t, u):
            assert texts(await reader.tail(after, limit=9, wait_seconds=1)) == ["new"]
        assert texts(await page(t, Topic.EVENTS, after="0-0", limit=9)) == ["old", "new"]

    run_async(main(), t, u)


def test_one_who_waits_for_entries_keeps_no_other_waiting(make):
    async def main():
        await transport.publish(Topic.EVENTS, "p", 0, [Entry(b"old")])
        last = await transport.last_ids([Topic.EVENTS])
        waits = asyncio.create_task(transport.tail(last, limit=9, wait_seconds=None))
        await asyncio.sleep(0.05)
        early = {Topic.EVENTS: "0-0"}
        async with asyncio.timeout(2):
            (entry,) = await transport.tail(early, limit=9, wait_seconds=0.0)
        assert entry.payload == b"old"
        await transport.publish(Topic.EVENTS, "p", 1, [Entry(b"new")])
        assert [delivery.payload for delivery in await waits] == [b"new"]

    transport = make()
    run_async(main(), transport)


def test_what_is_not_settled_is_claimed_with_its_count(make):
    t = make()

    async def main():
        lease = (await t.attach(LeaseRequest("h", 9))).lease
        await t.publish(Topic.COMMANDS, "p", 0, entries(*map(str, range(1_203))))
        got = []
        while len(got) < 1_202:
            got += await read(t, lease, limit=1_202 - len(got))
        await t.settle(lease, settlement(1, got[:1]))
        for count in (2, 3):
            claimed = await t.claim(lease, Topic.COMMANDS)
            assert texts(claimed) == [str(number) for number in range(1, 1_202)]
            assert {d.deliveries for d in claimed} == {count}
        assert texts(await read(t, lease)) == ["1202"]
        await t.settle(lease, settlement(2, claimed))
        assert texts(await t.claim(lease, Topic.COMMANDS)) == ["1202"]
        await t.discard(Topic.COMMANDS, [d.entry_id for d in await t.claim(lease, Topic.COMMANDS)])
        assert await t.claim(lease, Topic.COMMANDS) == []

    run_async(main(), t)


def test_one_holder_at_a_time(make):
    t, u = make(), make()

    async def main():
        older = await t.attach(LeaseRequest("one", 0.3))
        with pytest.raises(LeaseHeldError, match="held by one"):
            await u.attach(LeaseRequest("two", 9))
        assert (
            await u.active_runs() == [t.run]
            if hasattr(t, "_broker")
            else t.run in await u.active_runs()
        )
        renewed = await t.renew(older.lease)
        assert renewed.server_ms > 1_600_000_000_000
        await asyncio.sleep(0.4)
        newer = await u.attach(LeaseRequest("two", 9))
        assert newer.lease.epoch > older.lease.epoch
        with pytest.raises(FencedError, match="driven by two"):
            await t.renew(older.lease)
        with pytest.raises(FencedError, match="must not go on"):
            await t.settle(older.lease, settlement(1))
        await t.release(older.lease)  # does not end the other's
        await u.renew(newer.lease)
        newest = await t.attach(LeaseRequest("three", 9, should_take_over=True, least_epoch=70))
        assert newest.lease.epoch == 71
        await t.release(newest.lease)
        assert t.run not in await u.active_runs()

    run_async(main(), t, u)


def test_a_settlement_is_whole_and_counts_once(make):
    t = make()

    async def main():
        attached = await t.attach(LeaseRequest("h", 9))
        await t.publish(Topic.COMMANDS, "p", 0, entries("a", "b"))
        await t.publish(Topic.URGENT, "p", 0, entries("stop"))
        got = await read(t, attached.lease, Topic.URGENT) + await read(t, attached.lease)
        assert texts(got) == ["stop", "a", "b"]
        done = settlement(1, got[:2], outcomes=["A"], dead=["D"], sequences={"p/commands": 0})
        for _ in range(3):
            await t.settle(attached.lease, done)
        assert texts(await page(t, Topic.OUTCOMES, after="0-0", limit=9)) == ["A"]
        assert texts(await page(t, Topic.DEAD, after="0-0", limit=9)) == ["D"]
        again = await t.attach(LeaseRequest("h", 9))
        assert again.sequences == {"p/commands": 0}
        assert again.cursor[Topic.URGENT] == got[0].entry_id
        assert again.attempts == {(Topic.COMMANDS, got[2].entry_id): 1}
        with pytest.raises(FencedError):
            await read(t, attached.lease)
        rest = await read(t, again.lease, Topic.URGENT) + await read(t, again.lease)
        assert texts(rest) == ["b"]
        await t.settle(again.lease, settlement(1, rest, sequences={"p/commands": -1}))
        last = await t.attach(LeaseRequest("h", 9))
        assert (last.sequences, last.attempts) == ({}, {})

    run_async(main(), t)


def test_a_run_restored_to_an_earlier_position_gets_its_commands_again(make):
    t = make()

    async def main():
        attached = await t.attach(LeaseRequest("h", 9))
        await t.publish(Topic.COMMANDS, "p", 0, entries("a", "b", "c"))
        got = await read(t, attached.lease)
        await t.settle(attached.lease, settlement(1, got[:2]))
        saved = {Topic.COMMANDS: got[0].entry_id}
        again = await t.attach(LeaseRequest("h", 9, cursor=saved))
        assert texts(await read(t, again.lease)) == ["b", "c"]
        assert again.leftovers == []
        # In force, but its settlement was lost: handed back for its first outcome.
        later = await t.attach(LeaseRequest("h", 9, cursor={Topic.COMMANDS: got[2].entry_id}))
        assert texts(later.leftovers) == ["b", "c"]
        assert await read(t, later.lease) == []

    run_async(main(), t)


def test_trim_and_discard(make):
    t = make()

    async def main():
        await t.publish(Topic.COMMANDS, "p", 0, entries(*"abcd"))
        rows = await page(t, Topic.COMMANDS, after="0-0", limit=9)
        assert await t.trim(Topic.COMMANDS, rows[2].entry_id) == 2
        assert await t.discard(Topic.COMMANDS, [rows[3].entry_id, rows[0].entry_id]) == 1
        assert texts(await page(t, Topic.COMMANDS, after="0-0", limit=9)) == ["c"]
        assert await t.discard(Topic.COMMANDS, []) == 0

    run_async(main(), t)


def test_a_cancelled_call_leaves_nothing_for_the_next_one(make):
    t = make()

    async def main():
        await t.publish(Topic.EVENTS, "p", 0, entries("a"))
        for turn in range(40):
            task = asyncio.create_task(length(t, Topic.EVENTS))
            for _ in range(turn % 4):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert texts(await page(t, Topic.EVENTS, after="0-0", limit=9)) == ["a"]
        lease = (await t.attach(LeaseRequest("h", 9))).lease
        waiting = asyncio.create_task(read(t, lease, wait=None))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await t.publish(Topic.COMMANDS, "p", 0, entries("b"))
        got = await read(t, lease, wait=1)
        # A read that was cancelled on its way may have taken the entry: it is claimed then.
        got += await t.claim(lease, Topic.COMMANDS)
        assert set(texts(got)) == {"b"}

    run_async(main(), t)


def test_a_closed_transport_says_so(make):
    t = make()

    async def main():
        await t.open()
        await t.close()
        with pytest.raises(BusUnavailableError, match="closed"):
            await length(t, Topic.EVENTS)

    run_async(main())


def test_a_reader_whose_lease_is_taken_over_is_woken_and_takes_nothing(make):
    t, u = make(), make()

    async def main():
        old = await t.attach(LeaseRequest("paused", 9))
        waiting = asyncio.create_task(read(t, old.lease, wait=None))
        await asyncio.sleep(0.05)
        new = await u.attach(LeaseRequest("heir", 9, should_take_over=True))
        await u.publish(Topic.COMMANDS, "p", 0, entries("a"))
        with pytest.raises(FencedError):
            await asyncio.wait_for(waiting, 5)
        assert texts(await read(u, new.lease)) == ["a"]

    run_async(main(), t, u)
