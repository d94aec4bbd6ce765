"""SIGTERM while a run is paused over the bus: it saves and ends, whatever became of the server."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time

import pytest
from test_steering import GROWTH, fit, until

from esper_fn import bus, checkpoint, runtime
from esper_fn.errors import BusUnavailableError

GRACE_SECONDS = 8


@pytest.fixture
def own_server():
    with bus.PrivateServer() as running:
        yield running


def up(server):
    pass


def killed(server):
    server.kill()


def silent(server):
    server.send_signal(signal.SIGSTOP)


def emptied(server):
    import redis

    with redis.Redis(unix_socket_path=str(server.socket)) as raw:
        raw.flushall()


@pytest.mark.parametrize("fault", [None, up, killed, silent, emptied])
def test_a_paused_run_saves_and_ends_when_it_is_asked_to(fault, tmp_path, request):
    server = None if fault is None else request.getfixturevalue("own_server")
    url = "memory" if server is None else server.url
    name, times = f"run-{secrets.token_hex(4)}", {}

    def operator():
        with bus.connect(url, run=name, keys=bus.NO_KEYS) as client:
            until(lambda: len(steps) > 2)
            assert client.send(bus.Pause()).is_applied
            time.sleep(0.2)
            times["steps"] = len(steps)
            if fault is not None:
                fault(server)
                time.sleep(0.2)
            times["asked"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    steps = []
    thread = threading.Thread(target=operator, daemon=True)
    with checkpoint.Writer(tmp_path) as writer, runtime.termination() as is_stopping:
        thread.start()
        with runtime.steer(url, GROWTH, run=name, max_commands=4) as steering:
            fitted = fit(
                steering,
                should_stop=is_stopping,
                listener=steps.append,
                checkpoints=runtime.Checkpoints(writer=writer, every_steps=10_000_000),
            )
        ended = time.monotonic()
    thread.join(10)
    assert ended - times["asked"] < GRACE_SECONDS
    assert fitted.num_steps == times["steps"] == len(steps)
    assert checkpoint.steps(tmp_path) == [fitted.num_steps]
    assert not steering.is_stopped


@pytest.mark.parametrize("first_steps", [0, 3])
def test_a_run_paused_before_its_first_step_ends_without_it(first_steps, tmp_path):
    name, broker = f"run-{secrets.token_hex(4)}", bus.Broker()

    def run(num_steps, should_stop=None):
        with (
            checkpoint.Writer(tmp_path) as writer,
            runtime.steer("memory", GROWTH, run=name, max_commands=4, broker=broker) as steering,
        ):

            def pause_is_there(_=None):
                until(lambda: steering.worker.has_news)

            if should_stop is not None and not first_steps:
                steering.worker.listen()
                pause_is_there()
            return fit(
                steering,
                num_steps=num_steps,
                should_stop=should_stop,
                checkpoints=runtime.Checkpoints(
                    writer=writer, every_steps=10_000_000, recall=pause_is_there
                ),
            )

    if first_steps:
        run(first_steps)
    with bus.connect("memory", run=name, keys=bus.NO_KEYS, broker=broker) as client:
        client.send(bus.Pause(), wait_seconds=None, must_listen=False)

        def should_stop():
            outcomes = client.watch([bus.Topic.OUTCOMES], seconds=0.05, from_beginning=True)
            return any(outcome.is_applied for outcome in outcomes)

        fitted = run(6, should_stop)
    assert fitted.num_steps == len(fitted.losses) == first_steps
    assert checkpoint.steps(tmp_path) == [first_steps] * bool(first_steps)


def test_a_restored_run_keeps_its_identity_and_takes_what_was_sent_meanwhile(tmp_path):
    keys = bus.Keyring(active="k", keys={"k": b"k" * 32})
    name, broker = f"run-{secrets.token_hex(4)}", bus.Broker()

    def run(num_steps):
        with (
            checkpoint.Writer(tmp_path) as writer,
            runtime.steer(
                "memory", GROWTH, run=name, max_commands=4, broker=broker, keys=keys
            ) as steering,
        ):
            fit(
                steering,
                num_steps=num_steps,
                checkpoints=runtime.Checkpoints(writer=writer, every_steps=10_000_000),
            )
            return steering.worker.position(), steering.worker.counts

    with bus.connect("memory", run=name, keys=keys, broker=broker) as client:
        early = bus.Germinate(seed=1, blueprint="scale")
        with pytest.raises(BusUnavailableError, match="takes no commands yet"):
            client.send(early, wait_seconds=0.2, must_listen=False)  # it goes out later
        first, _ = run(3)
        meanwhile = bus.Germinate(seed=0, blueprint="scale")
        client.send(meanwhile, wait_seconds=None, must_listen=False)
        second, counts = run(6)
        assert first.identity
        assert second.identity == first.identity
        assert counts == {}
        assert second.outcome(early.id).is_applied
        assert second.outcome(meanwhile.id).is_applied
