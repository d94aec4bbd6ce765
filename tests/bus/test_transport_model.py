"""One model, two transports: the same calls give the same answers."""

from __future__ import annotations

import asyncio
import secrets

from bus_support import page
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from esper_fn import bus
from esper_fn.bus import Topic
from esper_fn.bus._address import parse_address
from esper_fn.bus._memory import MemoryTransport
from esper_fn.bus._redis import RedisTransport
from esper_fn.bus._transport import Entry, LeaseRequest, Settlement
from esper_fn.errors import FencedError, LeaseHeldError

URL = {}


class Both(RuleBasedStateMachine):
    """Calls both transports and a plain list, and holds the three together."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        run = f"model-{secrets.token_hex(6)}"
        self.transports = [
            MemoryTransport(run, bus.Broker()),
            RedisTransport(parse_address(URL["url"]), run, has_key=False),
        ]
        self.log = []
        self.numbers = {"p": 0, "q": 0}
        self.leases = []
        self.handed = []
        self.settled = 0
        self.number = 0
        self.outcomes = []

    def both(self, call):
        async def work():
            answers = []
            for transport in self.transports:
                try:
                    answers.append(await call(transport))
                except (FencedError, LeaseHeldError) as error:
                    answers.append(type(error))
            return answers

        return self.loop.run_until_complete(work())

    @rule(producer=st.sampled_from("pq"), count=st.integers(1, 3), back=st.integers(0, 2))
    def publish(self, producer, count, back):
        first = max(0, self.numbers[producer] - back)
        names = [f"{producer}{first + i}".encode() for i in range(count)]
        memory, real = self.both(
            lambda t: t.publish(Topic.COMMANDS, producer, first, [Entry(n) for n in names])
        )
        new = max(0, first + count - self.numbers[producer])
        assert memory.num_new == real.num_new == new
        self.log += names[count - new :]
        self.numbers[producer] = max(self.numbers[producer], first + count)

    @rule(take_over=st.booleans(), holder=st.sampled_from("ab"))
    def attach(self, take_over, holder):
        memory, real = self.both(
            lambda t: t.attach(LeaseRequest(holder, 600, should_take_over=take_over))
        )
        if memory is LeaseHeldError:
            assert real is LeaseHeldError
            return
        assert memory.lease == real.lease
        assert memory.sequences == real.sequences
        assert [d.payload for d in memory.leftovers] == [d.payload for d in real.leftovers] == []
        assert sorted(memory.attempts.values()) == sorted(real.attempts.values())
        self.leases.append(memory.lease)
        self.handed, self.number = [], 0
        self.read_from = self.settled

    @rule(limit=st.integers(1, 4), which=st.integers(0, 3))
    def read(self, limit, which):
        if not self.leases:
            return
        lease = self.leases[max(0, len(self.leases) - 1 - which)]
        memory, real = self.both(
            lambda t: t.read(lease, Topic.COMMANDS, limit=limit, wait_seconds=0.0)
        )
        if lease != self.leases[-1]:
            assert memory is FencedError
            assert real is FencedError
            return
        expected = self.log[self.read_from : self.read_from + limit]
        assert [d.payload for d in memory] == [d.payload for d in real] == expected
        self.read_from += len(expected)
        self.handed += zip(memory, real, strict=True)

    @rule(count=st.integers(1, 3), repeat=st.booleans(), is_stale=st.booleans())
    def settle(self, count, repeat, is_stale):
        if not self.handed:
            return
        stale = is_stale and len(self.leases) > 1
        lease = self.leases[-2] if stale else self.leases[-1]
        now, later = self.handed[:count], self.handed[count:]
        self.number += 1

        async def once(transport):
            deliveries = [pair[self.transports.index(transport)] for pair in now]
            settlement = Settlement(
                self.number,
                {Topic.COMMANDS: [d.entry_id for d in deliveries]},
                {Topic.COMMANDS: deliveries[-1].entry_id},
                {"p/commands": self.settled},
                [Entry(b"o" + d.payload) for d in deliveries],
            )
            for _ in range(1 + repeat):
                await transport.settle(lease, settlement)

        answers = self.both(once)
        if stale:
            assert answers == [FencedError, FencedError]
            return
        assert answers == [None, None]
        self.handed = later
        self.settled += len(now)
        self.outcomes += [b"o" + pair[0].payload for pair in now]

    @rule()
    def look(self):
        for topic, expected in ((Topic.COMMANDS, self.log), (Topic.OUTCOMES, self.outcomes)):
            memory, real = self.both(lambda t, at=topic: page(t, at, after="0-0", limit=1000))
            assert [d.payload for d in memory] == [d.payload for d in real] == expected

    def teardown(self):
        self.both(lambda t: t.close())
        self.loop.close()


def test_both_transports_follow_one_model(server):
    URL["url"] = server.url
    machine = Both.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
    machine().runTest()
