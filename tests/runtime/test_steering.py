"""A run steered and watched from another thread, over the bus."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import bus, checkpoint, policies, runtime
from esper_fn._layout import make_layout
from esper_fn.errors import RunStoppedError
from esper_fn.runtime._positions import SavedPositions

SITE = ef.site("hidden", features=8, chunks=4)
LAYOUT = make_layout(sites=[SITE], blueprints={"scale": ef.blueprints.scale_shift()}, capacity=2)
GROWTH = ef.Growth(
    **LAYOUT.arguments, policy=policies.never(), graft=ef.grafting.linear(8), adapters_at_once=None
)
OPTIMIZER = ef.optim.per_adapter(optax.sgd(1e-2))


def loss_fn(params, seeds, batch):
    inputs, targets = batch
    hidden = seeds.grow("hidden", jnp.tanh(inputs @ params["in"]))
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def batches(first, count):
    source = np.random.default_rng(0)
    inputs = source.normal(size=(512, 6)).astype(np.float32)
    targets = (inputs[:, :4] ** 2).argmax(1).astype(np.int32)
    rows = (np.arange(first, first + count)[:, None] * 16 + np.arange(16)) % 512
    return inputs[rows], targets[rows]


SURVEY = tuple(leaf[0] for leaf in batches(20, 1))
PROGRAM = runtime.compile_fit(GROWTH, loss_fn, OPTIMIZER, survey_every=None)
PARAMS = {
    "in": jax.random.normal(jax.random.key(0), (6, 8)) / 3,
    "out": jax.random.normal(jax.random.key(1), (8, 4)) / 3,
}


def fit(steering, *, num_steps=1_000_000, batches=batches, segment_steps=1, **options):
    return runtime.fit(
        GROWTH,
        loss_fn,
        OPTIMIZER,
        PARAMS,
        batches,
        num_steps=num_steps,
        key=jax.random.key(1),
        survey_batch=SURVEY,
        options=runtime.FitOptions(survey_every=None, segment_steps=segment_steps),
        program=PROGRAM,
        steering=steering,
        **options,
    )


@pytest.fixture(scope="module")
def server():
    with bus.PrivateServer() as running:
        yield running


@pytest.fixture(params=["memory", "redis"])
def url(request):
    return "memory" if request.param == "memory" else request.getfixturevalue("server").url


@pytest.fixture
def name():
    return f"run-{secrets.token_hex(4)}"


class Running:
    """`fit` in a thread."""

    def __init__(self, url, name, **options):
        self.steering = runtime.steer(url, GROWTH, run=name, max_commands=4)
        self.options = options
        self.fitted = None
        self.error = None
        self.steps = []
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        try:
            with self.steering:
                self.fitted = fit(
                    self.steering,
                    listener=lambda segment: self.steps.append(segment.first_step),
                    **self.options,
                )
        except BaseException as error:
            self.error = error


@contextmanager
def running(url, name, **options):
    run = Running(url, name, **options)
    run.thread.start()
    with bus.connect(url, run=name, keys=bus.NO_KEYS) as client:
        until(lambda: run.error is not None or run.steps)
        try:
            yield run, client
        finally:
            if run.thread.is_alive():
                client.send(bus.Stop(reason="the test is over"), wait_seconds=None)
            run.thread.join(30)
            assert not run.thread.is_alive()
    if run.error is not None:
        raise run.error


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


def test_commands_take_force_in_a_jitted_loop_and_are_answered(url, name):
    with running(url, name) as (run, client):
        born = client.send(bus.Germinate(site=SITE.name, seed=0, blueprint="scale"))
        assert born.is_applied
        (seed,) = born.seeds
        assert (seed.before, seed.after) == ("DORMANT", "GERMINATED")
        again = client.send(bus.Germinate(site=SITE.name, seed=0, blueprint="scale"))
        assert (again.code, again.text) == (
            "ILLEGAL_TRANSITION",
            "the seed's stage does not allow it",
        )
        assert client.send(bus.Cancel(seed=0)).code in {"DONE", "ILLEGAL_TRANSITION"}
        wrong = client.send(bus.Germinate(site="nowhere", seed=0, blueprint="scale"))
        assert wrong.code == "REFUSED"
        assert "unknown site 'nowhere'; allowed:" in wrong.text
        far = client.send(bus.Cull(site=SITE.name, seed=99))
        assert f"it has seeds 0..{SITE.num_seeds - 1}" in far.text
        odd = client.send(bus.Transition(seed=0, target="BORED"))
        assert "unknown target 'BORED'" in odd.text
    assert run.fitted.num_compiled == 0


def test_a_batch_is_whole_or_nothing(url, name):
    with running(url, name) as (_, client):
        bad = bus.Batch(commands=(bus.Germinate(seed=0, blueprint="scale"), bus.Cull(seed=1)))
        outcome = client.send(bad)
        assert outcome.code == "ILLEGAL_TRANSITION"
        assert [seed.code for seed in outcome.seeds] == ["BATCH_REFUSED", "ILLEGAL_TRANSITION"]
        assert outcome.seeds[0].after == "DORMANT"
        good = bus.Batch(commands=tuple(bus.Germinate(seed=i, blueprint="scale") for i in range(2)))
        assert client.send(good).is_applied
        large = bus.Batch(commands=tuple(bus.Cull(seed=i) for i in range(5)))
        assert "takes 4 a step" in client.send(large).text


def test_two_commands_to_one_seed_keep_their_order(url, name):
    with running(url, name) as (run, client):
        client.send(bus.Pause())
        ids = []
        for command in (
            bus.Germinate(seed=0, blueprint="scale"),
            bus.Cancel(seed=0),
            bus.Germinate(seed=1, blueprint="scale"),
        ):
            client.send(command, wait_seconds=None)
            ids.append(command)
        until(lambda: len(run.steering._deferred) == 3)
        before = len(run.steps)
        time.sleep(0.05)
        assert len(run.steps) == before
        client.send(bus.Resume())
        first, second, third = (client.send(command) for command in ids)
        assert (first.code, second.code, third.code) == ("DONE", "DONE", "DONE")
        assert first.step < second.step <= third.step


def test_a_command_that_comes_during_a_step_takes_force_in_it(url, name):
    sent = {}

    def late(first, count):
        # Asked for when the step has begun, and before its gradients are there.
        if first in {3, 4}:
            command = bus.Germinate(seed=first - 3, blueprint="scale")
            client.send(command, wait_seconds=None)
            until(lambda: steering.worker.num_waiting == 1)
            sent[first] = command
        return batches(first, count)

    steering = runtime.steer(url, GROWTH, run=name, max_commands=4)
    with steering, bus.connect(url, run=name, keys=bus.NO_KEYS) as client:
        fitted = fit(steering, num_steps=8, batches=late)
        steps = {e["seed"]: e["step"] for e in fitted.events if e["to"] == "GERMINATED"}
        assert steps == {0: 3, 1: 4}
        messages = client.watch([bus.Topic.OUTCOMES], seconds=20, from_beginning=True)
        answers = {o.command_id: o.step for o in itertools.islice(messages, len(sent))}
        assert answers == {command.id: step for step, command in sent.items()}


def test_a_segment_of_one_step_decides_as_a_longer_one_does():
    start = {"commands": lambda first: [ef.commands.germinate(1, "scale")] * (first == 0)}
    single, many = (fit(None, num_steps=60, segment_steps=length, **start) for length in (1, 20))
    assert single.events == many.events
    assert [e["to"] for e in single.events][:2] == ["GERMINATED", "GRAFTING"]
    np.testing.assert_allclose(single.losses, many.losses, rtol=1e-5)
    assert single.num_compiled == many.num_compiled == 0


def test_a_paused_run_ends_at_once_when_it_is_stopped(url, name):
    with running(url, name) as (run, client):
        client.send(bus.Pause())
        count = len(run.steps)
        stop = client.send(bus.Stop(reason="enough", sender="me"))
        assert stop.is_applied
        run.thread.join(30)
        assert len(run.steps) == count
        assert run.fitted.num_steps == count
        with pytest.raises(RunStoppedError, match="by me: enough"):
            run.steering.check_stopped()


def test_telemetry_shows_the_seeds_without_a_transfer_of_its_own(url, name):
    with running(url, name) as (run, client):
        client.send(bus.Germinate(seed=1, blueprint="scale"))
        run.steering.checkpoint_failed(OSError("disk full"))
        kinds = {}
        needed = {bus.Frame, bus.StepMetrics, bus.LifecycleEvent, bus.Announcement}
        for message in client.watch(seconds=20, from_beginning=True):
            kinds.setdefault(type(message), message)
            if needed | {bus.CheckpointEvent} <= set(kinds):
                break
        assert (kinds[bus.CheckpointEvent].what, kinds[bus.CheckpointEvent].text) == (
            "failed",
            "disk full",
        )
        assert kinds[bus.Announcement].sites == {SITE.name: SITE.num_seeds}
        assert kinds[bus.Frame].array("stage").shape == (LAYOUT.num_seeds,)
        assert kinds[bus.LifecycleEvent].cause == "command"


def test_a_checkpoint_holds_the_position_and_later_commands_come_again(
    url, name, tmp_path, monkeypatch
):
    # Without checkpoints, all that is settled would be forgotten at once.
    monkeypatch.setattr("esper_fn.bus._worker._TRIM_EVERY", 1)

    def options(writer):
        return {"checkpoints": runtime.Checkpoints(writer=writer, every_steps=10_000_000)}

    with checkpoint.Writer(tmp_path) as writer:
        with running(url, name, **options(writer)) as (run, client):
            early = bus.Germinate(seed=0, blueprint="scale")
            assert client.send(early).is_applied
            assert client.send(bus.Checkpoint()).is_applied
            messages = client.watch([bus.Topic.EVENTS], seconds=20, from_beginning=True)
            saved = next(m for m in messages if isinstance(m, bus.CheckpointEvent))
            assert saved.what == "saved"
            assert saved.step in checkpoint.steps(tmp_path)
            late = bus.Germinate(seed=1, blueprint="scale")
            assert client.send(late).is_applied
            # As after SIGKILL: what came after the checkpoint is not saved.
            run.steering.should_save = lambda: False
            writer.save = lambda *_, **__: None
        first = run.fitted
    with checkpoint.Writer(tmp_path) as writer:
        with running(url, name, **options(writer)) as (run, client):
            outcome = client.send(late)
            assert outcome.is_applied
            assert client.send(early).is_applied
        events = [e for e in run.fitted.events if e["to"] == "GERMINATED"]
        assert [e["seed"] for e in events] == [0, 1]
        assert run.fitted.resumed_from is not None
        assert run.fitted.resumed_from < first.num_steps


def test_commands_are_forgotten_when_no_checkpoint_needs_them(url, name, tmp_path):
    with checkpoint.Writer(tmp_path, keep=checkpoint.latest(1)) as writer:
        keeping = runtime.Checkpoints(writer=writer, every_steps=10_000_000)
        with running(url, name, checkpoints=keeping) as (run, client):

            def lengths():
                transport = client.asynchronous.transport
                commands = {bus.Topic.COMMANDS: "0-0"}
                entries = transport.tail(commands, limit=1_000, wait_seconds=0.0)
                return len(client._thread.call(entries))

            def save():
                before = writer.last_acknowledged
                client.send(bus.Checkpoint())
                until(lambda: writer.last_acknowledged != before)

            for seed in (0, 1):
                client.send(bus.Germinate(seed=seed, blueprint="scale"))
            assert lengths() == 2
            save()  # itself a command, the last one in the position of its step
            until(lambda: lengths() == 1)
            for _ in range(3):
                client.send(bus.Cancel(seed=1))
            time.sleep(0.2)
            assert lengths() == 4  # the checkpoint may need them again
            save()
            save()  # by now the first one is gone
            until(lambda: lengths() <= 2)
        assert run.fitted.num_steps in checkpoint.steps(tmp_path)


def test_positions_of_an_earlier_process_are_kept_until_its_steps_are_gone(tmp_path):
    positions = {
        step: bus.RunPosition(cursor={bus.Topic.COMMANDS: f"{step}-0"}) for step in range(5)
    }
    with checkpoint.Writer(tmp_path, keep=checkpoint.latest(2)) as writer:
        for step in (0, 1):
            writer.save(step, {"x": np.ones(2)})
        writer.wait()
    with checkpoint.Writer(tmp_path, keep=checkpoint.latest(2)) as writer:
        saved = SavedPositions(writer)
        writer.restore()
        assert saved.restore(positions[1]) == 1
        assert saved.newly_saved() is None
        assert saved.oldest() is None  # nobody here knows where step 0 stood
        oldest = []
        for step in (2, 3, 4):
            saved.add(step, positions[step])
            writer.save(step, {"x": np.ones(2)})
            writer.wait()
            assert saved.newly_saved() == step
            oldest.append(saved.oldest())
    assert oldest == [positions[1].cursor, positions[2].cursor, positions[3].cursor]
