"""A worker and those who steer its run, over both transports."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from esper_fn import bus
from esper_fn.bus import Outcome, Topic
from esper_fn.bus._session import WorkerOptions
from esper_fn.bus._worker import Worker
from esper_fn.errors import (
    BusSecurityError,
    FencedError,
    LeaseHeldError,
    NobodyListensError,
    NoOutcomeError,
)

SECRET = bus.Keyring(active="k1", keys={"k1": b"0" * 32})


class Loop:
    """A training loop without training: carries out each command once a step."""

    def __init__(self, make, *, start=True, limit=4, step_seconds=0.001, position=None, **options):
        self.effects = []
        announcement = bus.Announcement(run="r", host="h", pid=1, sites={"hidden": 8})
        options = WorkerOptions(**options)
        self.worker = Worker(make, announcement, position=position, options=options)
        self.worker.start()
        self.limit = limit
        self.step_seconds = step_seconds
        self.step = 0
        self.error = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if start:
            self._thread.start()

    def one_step(self):
        for item in self.worker.take(self.step, self.limit):
            self.effects.append(item.command.id)
            self.worker.finish(
                item, Outcome(command_id=item.command.id, code="DONE", step=self.step)
            )
        self.worker.flush()
        self.step += 1

    def _run(self):
        try:
            while not self._stop.is_set():
                self.one_step()
                time.sleep(self.step_seconds)
        except FencedError as error:
            self.error = error

    def close(self):
        self._stop.set()
        if self._thread.ident:
            self._thread.join()
        self.worker.close()


@pytest.fixture
def connect(kind, request, run_name, make):
    clients = []

    def connect(keys=bus.NO_KEYS):
        transport = make()
        url = "memory" if kind == "memory" else request.getfixturevalue("server").url
        broker = getattr(transport, "_broker", None)
        client = bus.connect(url, run=run_name, keys=keys, broker=broker)
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def loop(make):
    loops = []

    def build(**options):
        loops.append(Loop(make, **options))
        return loops[-1]

    yield build
    for each in loops:
        each.close()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


def test_a_command_takes_effect_and_its_sender_hears_of_it(loop, connect):
    running, client = loop(), connect()
    command = bus.Cull(site="hidden", seed=3)
    outcome = client.send(command, wait_seconds=10)
    assert outcome.is_applied
    assert outcome.command_id == command.id
    assert running.effects == [command.id]


def test_the_same_command_again_gets_the_first_outcome(loop, connect):
    running, client = loop(), connect()
    command = bus.Cull(seed=3)
    first = client.send(command, wait_seconds=10)
    again = client.send(command, wait_seconds=10)
    other = connect().send(command, wait_seconds=10)
    assert first == again == other
    assert running.effects == [command.id]


def test_a_command_sent_again_before_it_is_applied_is_carried_out_once(loop, connect):
    running, client = loop(start=False), connect()
    command, other = bus.Cull(seed=3), bus.Cull(seed=4)
    for sent in (command, command, other):
        client.send(sent, wait_seconds=None)
    worker = running.worker
    until(lambda: worker.num_waiting == 3)
    first, second = worker.take(0, 4)
    assert [first.command.id, second.command.id] == [command.id, other.id]
    assert not worker.has_news
    for item in (second, first):
        outcome = Outcome(command_id=item.command.id, code="DONE", step=0)
        worker.finish(item, outcome)
    worker.flush()
    until(lambda: not worker.take(1, 4) and worker.num_waiting == 0)
    running._thread.start()
    assert client.send(command, wait_seconds=10).is_applied
    assert running.effects == []


def test_a_loop_hands_its_outcomes_over_and_waits_no_longer_than_it_says(loop, connect):
    running, client = loop(start=False), connect()
    client.send(bus.Cull(seed=3), wait_seconds=None)
    worker = running.worker
    until(lambda: worker.has_news)
    (item,) = worker.take(0, 4)
    worker.finish(item, Outcome(command_id=item.command.id, code="DONE"))
    assert worker._has_acks
    worker.flush(10.0)
    assert not worker._has_acks  # the thread has it
    began = time.monotonic()
    worker.flush(10.0)  # nothing is there to hand over
    assert time.monotonic() - began < 5


def test_a_thread_that_is_busy_holds_a_loop_no_longer_than_it_said(loop, connect):
    running, client = loop(start=False), connect()
    client.send(bus.Cull(seed=3), wait_seconds=None)
    worker, is_over = running.worker, threading.Event()
    until(lambda: worker.has_news)
    (item,) = worker.take(0, 4)
    worker._thread.soon(is_over.wait, 20)
    worker.finish(item, Outcome(command_id=item.command.id, code="DONE"))
    began = time.monotonic()
    worker.flush(0.05)
    assert 0.05 <= time.monotonic() - began < 10
    assert worker._has_acks
    is_over.set()
    until(lambda: not worker._has_acks)


def test_the_order_of_one_sender_is_kept(loop, connect):
    running, client = loop(), connect()
    commands = [bus.Cull(seed=i % 3) for i in range(300)]
    for command in commands[:-1]:
        client.send(command, wait_seconds=None)
    client.send(commands[-1], wait_seconds=20)
    assert running.effects == [command.id for command in commands]
    assert running.worker.counts == {}


def test_a_stop_overtakes_ten_thousand_commands(loop, connect):
    running, client = loop(start=False), connect()

    async def many():
        a = client.asynchronous
        await asyncio.gather(
            *(a.send(bus.Cull(seed=i), wait_seconds=None, must_listen=False) for i in range(10_000))
        )

    client._thread.call(many(), 60)
    until(lambda: running.worker.num_waiting > 1_000)
    stop = bus.Stop(reason="smoke")
    client.send(stop, wait_seconds=None)
    until(lambda: running.worker._consumer._ready[Topic.URGENT])
    running.one_step()
    assert running.effects[0] == stop.id


def test_an_expired_command_is_refused_and_set_aside(loop, connect):
    running, client = loop(start=False), connect()
    late = bus.Cull(seed=1, expires_after_seconds=0.1)
    good = bus.Cull(seed=2, expires_after_seconds=60)
    client.send(late, wait_seconds=None)
    client.send(good, wait_seconds=None)
    until(lambda: running.worker.num_waiting == 2)
    time.sleep(0.2)
    running._thread.start()
    assert client.send(late, wait_seconds=10).code == "EXPIRED"
    until(lambda: running.effects == [good.id])
    ((_, letter),) = client.dead_letters()
    assert letter.reason == "expired"


def test_nobody_listens_is_said_at_once(connect):
    with pytest.raises(NobodyListensError, match=r"active runs: "):
        connect().send(bus.Cull(seed=1))


def test_a_run_that_does_not_answer_is_named(loop, connect):
    loop(start=False)
    with pytest.raises(NoOutcomeError, match=r"has not answered within 0\.2 s"):
        connect().send(bus.Cull(seed=1), wait_seconds=0.2)


def test_forged_unsigned_and_foreign_messages_never_take_effect(loop, connect, make):
    running = loop(keys=SECRET)
    good = connect(SECRET)
    wrong = bus.Keyring(active="k1", keys={"k1": b"1" * 32})
    strange = bus.Keyring(active="k2", keys={"k2": b"0" * 32})
    for keys in (bus.NO_KEYS, wrong, strange):
        connect(keys).send(bus.Cull(seed=1), wait_seconds=None)
    command = bus.Cull(seed=2)
    assert good.send(command, wait_seconds=10).is_applied
    until(lambda: len(good.dead_letters()) == 3)
    assert {letter.reason for _, letter in good.dead_letters()} == {"forged"}
    assert running.effects == [command.id]
    assert running.worker.counts == {"forged": 3}


def test_keys_rotate_without_a_gap(loop, connect):
    both = {"k1": b"0" * 32, "k2": b"2" * 32}
    running = loop(keys=bus.Keyring(active="k2", keys=both))
    old, new = connect(SECRET), connect(bus.Keyring(active="k2", keys=both))
    assert new.send(bus.Cull(seed=1), wait_seconds=10).is_applied
    # An old sender is obeyed; it cannot verify an answer signed with a key it does not hold.
    old.send(bus.Cull(seed=1), wait_seconds=None)
    until(lambda: len(running.effects) == 2)


def test_telemetry_and_events_reach_a_watcher(loop, connect):
    import numpy as np

    running, client = loop(), connect()
    frame = bus.Frame(
        step=7, columns={"alpha": bus.Column.from_array(np.arange(1000, dtype=np.float32))}
    )
    seen = []

    def watch():
        for message in client.watch([Topic.TELEMETRY], seconds=10):
            seen.append(message)
            return

    watcher = threading.Thread(target=watch)
    watcher.start()
    end = time.monotonic() + 10
    while watcher.is_alive() and time.monotonic() < end:
        running.worker.offer([frame])
        time.sleep(0.02)
    watcher.join()
    assert seen[0].step == 7
    np.testing.assert_array_equal(seen[0].array("alpha"), np.arange(1000, dtype=np.float32))


def test_a_run_goes_on_where_its_position_stands(loop, connect):
    first, client = loop(), connect()
    done = [bus.Cull(seed=i) for i in range(5)]
    for command in done:
        client.send(command, wait_seconds=10)
    saved = bus.RunPosition.from_dict(first.worker.position().as_dict())
    later = bus.Cull(seed=9)
    client.send(later, wait_seconds=10)
    first.close()
    # Restored to before `later`: it comes again; what the position holds is answered only.
    second = loop(position=saved)
    until(lambda: second.effects == [later.id])
    assert client.send(done[0], wait_seconds=10).step == 0 or second.effects == [later.id]
    assert second.effects == [later.id]
    assert second.worker.position().epoch > saved.epoch


def test_the_loop_finishes_without_waiting_and_nobody_sees_less_for_it(loop, connect):
    running, client = loop(start=False), connect()
    sent = [bus.Cull(seed=i) for i in range(3)]
    for command in sent:
        client.send(command, wait_seconds=None)
    until(lambda: running.worker.num_waiting == 3)
    items = running.worker.take(0, 2)
    with running.worker._changed:
        for item in items:
            finish = threading.Thread(
                target=running.worker.finish,
                args=(item, Outcome(command_id=item.command.id, code="DONE", step=7)),
            )
            finish.start()
            finish.join(5)
            assert not finish.is_alive()
    assert running.worker._has_acks
    position = running.worker.position()
    assert [position.outcome(command.id) is not None for command in sent] == [True, True, False]
    running.worker.flush()
    until(lambda: running.worker.num_settled == 2)


def test_a_fresh_run_does_not_repeat_what_is_settled(loop, connect):
    first, client = loop(), connect()
    client.send(bus.Cull(seed=1), wait_seconds=10)
    first.close()
    second = loop()
    fresh = bus.Cull(seed=2)
    client.send(fresh, wait_seconds=10)
    assert second.effects == [fresh.id]


def test_the_holder_is_unique_and_a_stolen_lease_ends_the_old_loop(loop):
    first = loop(lease_seconds=1.0)
    with pytest.raises(LeaseHeldError):
        loop(lease_seconds=1.0)
    second = loop(lease_seconds=1.0, should_take_over=True)
    until(lambda: first.error is not None)
    assert "must not go on" in str(first.error) or "is over" in str(first.error)
    assert second.error is None


def test_a_remote_bus_without_a_key_is_refused(run_name):
    with pytest.raises(BusSecurityError, match="other machines"):
        bus.connect("redis://192.0.2.1:6379/0", run=run_name, keys=bus.NO_KEYS)


def test_back_pressure_drops_only_telemetry_and_counts_it(make):
    announcement = bus.Announcement(run="r", host="h", pid=1, sites={})
    limits = {Topic.TELEMETRY: 100, Topic.EVENTS: 100}
    worker = Worker(make, announcement, options=WorkerOptions(outbox_limits=limits))
    frames = [bus.StepMetrics(step=i, loss=0.0) for i in range(1000)]
    worker.offer(frames)  # not started: nothing drains
    assert worker.num_dropped == 900
    worker.start()
    worker.close()
