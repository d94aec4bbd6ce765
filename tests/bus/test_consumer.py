"""The consumer against deliveries doubled, reordered, late and mistimed; clocks are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_fn import bus
from esper_fn.bus import Outcome, RunPosition, Topic
from esper_fn.bus._consumer import Consumer
from esper_fn.bus._envelope import SCHEMA, Header, Link
from esper_fn.bus._position import MAX_OUTCOMES, MAX_PRODUCERS
from esper_fn.bus._timing import ServerTime
from esper_fn.bus._transport import Delivery

KEYS = bus.Keyring(active="k", keys={"k": b"k" * 16})


class Rig:
    """A consumer whose clocks the test sets."""

    def __init__(self, position=None, keys=bus.NO_KEYS, server_ms=1_700_000_000_000):
        self.now = 1000.0
        self.server = ServerTime(lambda: self.now)
        self.server.update(server_ms)
        self.keys = keys
        self.consumer = Consumer(
            position or RunPosition(),
            Link(SimpleNamespace(stream=lambda topic: f"s:{topic.value}"), keys, self.server),
        )
        self.effects = []
        self.dead = []
        self.outcomes = []
        self.next_id = 0

    def delivery(
        self, command, *, producer="p", sequence=0, entry_ms=None, queued_ms=0, issued=None
    ):
        now = self.server.now_ms()
        header = Header(
            format=1,
            producer=producer,
            sequence=sequence,
            issued_at_ms=now if issued is None else issued,
            queued_ms=queued_ms,
        )
        payload = SCHEMA.encode(header, [command])
        self.next_id += 1
        name = f"{now if entry_ms is None else entry_ms}-{self.next_id}"
        return Delivery(
            command.topic, name, payload, self.keys.sign(f"s:{command.topic.value}", payload)
        )

    def turn(self, limit=3):
        self.consumer.expire_gaps()
        for item in self.consumer.take(limit):
            self.effects.append((item.command.id, item.command.seed))
            self.consumer.finish(item, Outcome(command_id=item.command.id, code="DONE"))
        for ack in self.consumer.collect_acks():
            if ack.dead is not None:
                self.dead.append(ack.dead)
            if ack.outcome is not None:
                self.outcomes.append(ack.outcome)


@given(data=st.data(), count=st.integers(1, 12), producers=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_doubled_and_reordered_deliveries_act_once_and_in_each_senders_order(
    data, count, producers
):
    rig = Rig()
    sent = [
        rig.delivery(
            bus.Cull(seed=number, id=f"{producer}-{number}"),
            producer=f"p{producer}",
            sequence=number,
        )
        for producer in range(producers)
        for number in range(count)
    ]
    copies = data.draw(st.lists(st.sampled_from(sent), max_size=10))
    flow = data.draw(st.permutations(sent + copies))
    # A copy is another entry with the same bytes.
    flow = [d._replace(entry_id=f"1700000000000-{100 + i}") for i, d in enumerate(flow)]
    for delivery in flow:
        rig.consumer.accept([delivery])
        if data.draw(st.booleans()):
            rig.turn()
    for _ in range(len(flow)):
        rig.turn()
    for producer in range(producers):
        own = [seed for name, seed in rig.effects if name.startswith(f"{producer}-")]
        assert own == list(range(count))
    assert rig.dead == []
    last = flow[-1].entry_id
    assert rig.consumer.position.cursor[Topic.COMMANDS] == last


@given(stop_at=st.integers(0, 9), save_at=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_restored_position_repeats_exactly_what_came_after_it(stop_at, save_at):
    rig = Rig()
    sent = [rig.delivery(bus.Cull(seed=i, id=f"c{i}"), sequence=i) for i in range(10)]
    rig.consumer.accept(sent)
    saved = rig.consumer.position.copy()
    for number in range(max(stop_at, save_at)):
        rig.turn(limit=1)
        if number + 1 == save_at:
            saved = rig.consumer.position.copy()
    done = len([e for e in rig.effects if int(e[0][1:]) < save_at])
    again = Rig(RunPosition.from_dict(saved.as_dict()))
    again.consumer.accept(sent)  # a server hands out everything after the cursor, or even before
    for _ in range(10):
        again.turn()
    assert done == save_at
    assert again.effects == [(f"c{i}", i) for i in range(save_at, 10)]
    assert [o.command_id for o in again.outcomes[:save_at]] == [f"c{i}" for i in range(save_at)]


def test_a_missing_number_is_waited_for_and_then_written_down():
    rig = Rig()
    rig.consumer.accept([rig.delivery(bus.Cull(seed=i, id=f"c{i}"), sequence=i) for i in (0, 2, 3)])
    rig.turn()
    assert [seed for _, seed in rig.effects] == [0]
    rig.now += 0.9
    rig.turn()
    assert len(rig.effects) == 1
    rig.now += 0.2
    rig.turn()
    assert [seed for _, seed in rig.effects] == [0, 2, 3]
    (letter,) = rig.dead
    assert letter.reason == "gap"
    assert "numbers 1 to 1 of producer p" in letter.text
    rig.consumer.accept([rig.delivery(bus.Cull(seed=1, id="c1"), sequence=1)])
    rig.turn()
    assert rig.dead[-1].reason == "replayed"
    assert len(rig.effects) == 3


HOUR_MS = 3_600_000


@pytest.mark.parametrize("jump_ms", [-HOUR_MS, HOUR_MS])
def test_a_step_of_the_servers_clock_expires_nothing_that_is_young(jump_ms):
    rig = Rig()
    rig.consumer.note_empty(Topic.COMMANDS)
    rig.now += 1.0
    before = rig.server.now_ms()
    rig.server.update(before + jump_ms)
    # The server names entries by its old clock until the new one has caught up, or by the new one.
    for number, entry_ms in enumerate((before, before + jump_ms)):
        rig.consumer.accept(
            [
                rig.delivery(
                    bus.Cull(seed=number, expires_after_seconds=5),
                    sequence=number,
                    entry_ms=max(before, entry_ms),
                )
            ]
        )
    rig.turn()
    assert len(rig.effects) == 2
    late = bus.Cull(seed=2, expires_after_seconds=5)
    stuck = max(before, rig.server.now_ms())  # names never go back
    rig.consumer.accept([rig.delivery(late, sequence=2, entry_ms=stuck)])
    rig.now += 6.0
    rig.turn()
    assert len(rig.effects) == 2
    assert [letter.reason for letter in rig.dead] == ["expired"]


def test_time_spent_with_the_sender_counts():
    rig = Rig()
    rig.consumer.accept([rig.delivery(bus.Cull(seed=0, expires_after_seconds=5), queued_ms=6_000)])
    rig.turn()
    assert rig.effects == []
    assert rig.outcomes[0].code == "EXPIRED"


def test_a_wrong_wall_clock_of_a_sender_changes_nothing():
    rig = Rig(keys=KEYS)
    rig.consumer.note_empty(Topic.COMMANDS)
    for number, issued in enumerate((None, 0, 2**50)):
        command = bus.Cull(seed=number, expires_after_seconds=5)
        rig.consumer.accept([rig.delivery(command, sequence=number, issued=issued)])
    rig.turn()
    assert len(rig.effects) == 3


def test_an_old_message_of_an_unknown_producer_is_a_replay():
    rig = Rig(keys=KEYS)
    old = rig.server.now_ms() - 25 * HOUR_MS
    rig.consumer.accept([rig.delivery(bus.Cull(seed=0), issued=old)])
    rig.turn()
    assert rig.effects == []
    assert rig.dead[0].reason == "replayed"


def test_forgotten_producers_cannot_be_replayed_and_nothing_grows():
    position = RunPosition()
    for number in range(MAX_PRODUCERS + 10):
        position.issued[f"p{number}/commands"] = number
        position.advance(f"p{number}/commands", 0)
    assert len(position.sequences) == MAX_PRODUCERS
    assert position.issued_floor_ms == 9
    assert position.changes["p0/commands"] == -1
    rig = Rig(position, keys=KEYS)
    rig.consumer.accept([rig.delivery(bus.Cull(seed=0), producer="p3", issued=3)])
    rig.turn()
    assert rig.effects == []
    assert rig.dead[0].reason == "replayed"


def test_a_deadline_outlives_a_server_that_forgets():
    rig = Rig()
    sent = [
        rig.delivery(bus.Cull(seed=seed, expires_after_seconds=5 + 90 * seed), sequence=seed)
        for seed in range(2)
    ]
    rig.consumer.accept(sent)
    rig.consumer.reset_streams()
    rig.now += 10
    rig.turn()
    assert [dead.reason for dead in rig.dead] == ["expired"]
    assert [seed for _, seed in rig.effects] == [1]


def test_an_entry_that_a_lagging_clock_names_before_the_cursor_is_taken_once():
    rig = Rig()
    rig.consumer.accept([rig.delivery(bus.Cull(seed=0, id="a"), entry_ms=1_000)])
    rig.turn()
    cursor = dict(rig.consumer.position.cursor)
    late = rig.delivery(bus.Cull(seed=1, id="b"), sequence=1, entry_ms=900)
    for _ in range(3):
        rig.consumer.accept([late])
        rig.turn()
    other = rig.delivery(bus.Cull(seed=2, id="c"), producer="q", entry_ms=901)
    rig.consumer.accept([other])
    rig.turn()
    assert [name for name, _ in rig.effects] == ["a", "b", "c"]
    assert rig.consumer.position.cursor == cursor
    assert rig.dead == []


def test_the_latest_outcomes_are_kept_and_not_all():
    position = RunPosition()
    for number in range(3 * MAX_OUTCOMES):
        position.record(Outcome(command_id=f"c{number}", code="DONE"))
        assert len(position.outcomes) <= 1.1 * MAX_OUTCOMES
    latest = range(3 * MAX_OUTCOMES - 1, 2 * MAX_OUTCOMES - 1, -1)
    assert all(position.outcome(f"c{number}") is not None for number in latest)
    assert position.outcome("c0") is None


def test_the_position_goes_to_json_and_back_and_refuses_the_rest():
    import json

    rig = Rig()
    rig.consumer.accept([rig.delivery(bus.Cull(seed=0, id="c"))])
    rig.turn()
    position = rig.consumer.position
    back = RunPosition.from_dict(json.loads(json.dumps(position.as_dict())))
    assert back == position
    assert back.outcome("c").is_applied
    with pytest.raises(ValueError, match="not a run's position"):
        RunPosition.from_dict({"epoch": "x"})
