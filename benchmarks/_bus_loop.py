"""What a connected bus costs a training step, and how soon a command is answered by a loop.

The process that trains keeps to one core, its bus's thread included, and all others to the rest. So
a step pays for all that the bus does there, and steps are alike enough to see it: spread over two
busy cores they differ by two thirds from one second to the next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from benchmarks._timing import Row, exact, ratio, summarise, time_interleaved
from esper_fn import bus, policies, runtime

_WIDTH = 512
_ROWS = 192
_SEEDS = 16
_SETTLING = 6
"""Steps after a turn that count for nobody: telemetry of the block before may still go out."""
_FIRST = 4
"""Steps of a run that count for nobody."""
_BLOCK = 12
"""Steps timed at once: enough for some publications of telemetry, and few, as this machine's speed
changes within a second."""

Ask = Callable[[str, float, list[int]], dict[str, Any]]
"""`ask(run, step_seconds, cores)`: what the process found that sent commands to a run."""


class Training:
    """A run of some size, whose steps are timed."""

    def __init__(self) -> None:
        self.growth = ef.Growth(
            sites=[ef.site("hidden", features=_WIDTH, chunks=_SEEDS)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=4,
            policy=policies.never(),
        )
        source = np.random.default_rng(0)
        self.params = {
            "in": jnp.asarray(source.normal(size=(_WIDTH, _WIDTH)) / 30, jnp.float32),
            "out": jnp.asarray(source.normal(size=(_WIDTH, 10)) / 30, jnp.float32),
        }
        self.inputs = jnp.asarray(source.normal(size=(1, _ROWS, _WIDTH)), jnp.float32)
        self.targets = jnp.asarray(source.integers(10, size=(1, _ROWS)), jnp.int32)
        self.optimizer = ef.optim.per_adapter(optax.sgd(1e-3))
        self.program = runtime.compile_fit(self.growth, _loss, self.optimizer, survey_every=None)

    def fit(
        self, steering: Any, num_steps: int, should_stop: Callable[[], bool] | None = None
    ) -> list[float]:
        """Trains; seconds of each step from `_FIRST` on."""
        times = [time.perf_counter()]
        runtime.fit(
            self.growth, _loss, self.optimizer, self.params,
            lambda first, count: (self.inputs, self.targets),
            num_steps=num_steps, key=jax.random.key(0),
            survey_batch=(self.inputs[0], self.targets[0]),
            options=runtime.FitOptions(survey_every=None, segment_steps=1, max_commands=16),
            program=self.program, steering=steering, should_stop=should_stop,
            listener=lambda _: times.append(time.perf_counter()),
        )  # fmt: skip
        return np.diff(times[_FIRST:]).tolist()


def _loss(params: Any, seeds: Any, batch: Any) -> Any:
    hidden = seeds.grow("hidden", jnp.tanh(batch[0] @ params["in"]))
    for _ in range(6):
        hidden = jnp.tanh(hidden @ params["in"])
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


class _Switch:
    """A steering that a run has for some blocks of steps, and not for others.

    One run, so that its arrays lie where they lay.
    """

    def __init__(self, steering: runtime.Steering, num_pairs: int) -> None:
        self._steering = steering
        self.max_commands = steering.max_commands
        self._turns = [on for turn in range(num_pairs) for on in _in_turns(turn)]
        self._at = 0
        self._began = 0.0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        """Mean of a step in each block, stalls included."""

    @property
    def _is_on(self) -> bool:
        return self._turns[self._at // (_SETTLING + _BLOCK)] if not self.is_over() else False

    def commands(self, step: int) -> list[ef.commands.Command]:
        return self._steering.commands(step) if self._is_on else []

    def answer(self, step: int, outcomes: Callable[[], Any]) -> None:
        if self._is_on:
            self._steering.answer(step, outcomes)

    def listener(self, segment: runtime.Segment) -> None:
        if self._is_on:
            self._steering.listener(segment)

    def should_stop(self) -> bool:
        is_stopped = self._steering.should_stop() if self._is_on else False
        within, is_on = self._at % (_SETTLING + _BLOCK), self._is_on
        now = time.perf_counter()
        if within == _SETTLING - 1:
            self._began = now
        elif within == _SETTLING + _BLOCK - 1:
            self.seconds[is_on].append((now - self._began) / _BLOCK)
        self._at += 1
        return is_stopped or self.is_over()

    def is_over(self) -> bool:
        return self._at >= len(self._turns) * (_SETTLING + _BLOCK)

    def stop_condition(self, should_stop: object) -> Callable[[], bool]:
        del should_stop
        return self.should_stop

    def should_start(self) -> bool:
        return True

    def should_save(self) -> bool:
        return False

    def with_position(self, checkpoints: Any) -> Any:
        return checkpoints


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keeps this thread, and the threads it starts, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def loop_rows(server: bus.PrivateServer, ask: Ask, *, num_pairs: int) -> dict[str, Row]:
    """Blocks of steps with and without the bus in turns, and from sender to outcome.

    Call it before JAX has counted the cores.
    """
    cores = os.sched_getaffinity(0)
    others = sorted(cores - {max(cores)}) or sorted(cores)
    with bus.PrivateServer() as doomed, _one_core():
        for single in (server, doomed):
            os.sched_setaffinity(single.pid, others)
        return _rows(server, doomed, lambda run, step: ask(run, step, others), num_pairs, cores)


def _rows(
    server: bus.PrivateServer,
    doomed: bus.PrivateServer,
    ask: Callable[[str, float], dict[str, Any]],
    num_pairs: int,
    cores: set[int],
) -> dict[str, Row]:
    training = Training()
    training.fit(None, 20)
    up = _blocks(server, training, num_pairs, is_killed=False)
    down = _blocks(doomed, training, num_pairs, is_killed=True)
    step = float(np.median(up.seconds[False]))
    answers = _answers(server, training, ask, step, cores)
    beside = _answers(server, training, ask, step, os.sched_getaffinity(0))
    return {
        "step_bare": summarise(up.seconds[False], "ms"),
        "step_with_bus_over_bare": _told(up),
        "step_with_server_down_over_bare": _told(down),
        "step_in_two_programs_over_one": _two_programs(training),
        **_idle(server, training),
        **{f"answer_{name}": row for name, row in answers.items()},
        **{f"answer_on_one_core_{name}": row for name, row in beside.items()},
    }


def _in_turns(turn: int) -> tuple[bool, bool]:
    """Who goes first changes, so that a drift of the machine cancels."""
    return (False, True) if turn % 4 in {0, 3} else (True, False)


def _blocks(
    server: bus.PrivateServer, training: Training, num_pairs: int, *, is_killed: bool
) -> _Switch:
    with _steered(server.url, training) as steering:
        if is_killed:
            server.kill()
        switch = _Switch(steering, num_pairs)
        training.fit(switch, 10**7)
        steering.worker.close(0.0 if is_killed else 2.0)
    return switch


@contextlib.contextmanager
def _steered(url: str, training: Training, run: str = "") -> Iterator[runtime.Steering]:
    run = run or f"loop-{secrets.token_hex(4)}"
    with runtime.steer(url, training.growth, run=run, keys=bus.NO_KEYS) as steering:
        yield steering


def _told(switch: _Switch) -> Row:
    """Ratios of neighbours, with the standard error of their median by bootstrap."""
    steered, bare = switch.seconds[True], switch.seconds[False]
    ratios = np.asarray(steered) / np.asarray(bare)
    draws = np.random.default_rng(0).choice(ratios, (2_000, len(ratios)))
    return ratio(
        steered,
        bare,
        standard_error=float(np.median(draws, axis=1).std()),
        added_us_a_step=float(np.median(np.asarray(steered) - np.asarray(bare)) * 1e6),
        steps_a_block=_BLOCK,
        bare_step_ms=float(np.median(bare)) * 1e3,
    )


def _idle(server: bus.PrivateServer, training: Training) -> dict[str, Row]:
    """What the pairs do not see: the processor time of a connection on which nothing is said."""
    seconds = 6.0
    with _steered(server.url, training):
        began = time.process_time()
        time.sleep(seconds)
        spent = time.process_time() - began
    return {"idle_connection": exact(spent / seconds, "ratio", seconds=seconds)}


def _two_programs(training: Training) -> Row:
    """A segment of one step, with commands in between, over the same step as one program."""
    states = [
        runtime.init(training.optimizer, training.params, training.growth.init(jax.random.key(0)))
        for _ in range(2)
    ]
    states = [jax.tree.map(jnp.copy, state) for state in states]
    batch = (training.inputs, training.targets)
    survey = (training.inputs[0], training.targets[0])
    silence = training.growth.commands((), size=16)

    def two() -> None:
        states[0], infos = training.program(states[0], batch, survey, lambda: silence)
        jax.device_get(infos)

    def single() -> None:
        states[1], infos = training.program(states[1], batch, survey, silence)
        jax.device_get(infos)

    times = time_interleaved({"two": two, "one": single}, repeats=200, warmup=20)
    return ratio(times["two"], times["one"])


def _answers(
    server: bus.PrivateServer,
    training: Training,
    ask: Callable[[str, float], dict[str, Any]],
    step_seconds: float,
    cores: set[int],
) -> dict[str, Row]:
    """From another process's call to its outcome, through the loop, against a step.

    With `cores`, the bus's thread may use these, as where a loop waits for an accelerator.
    """
    run = f"answers-{secrets.token_hex(3)}"
    is_over = threading.Event()
    steps: list[float] = []

    def work() -> None:
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        with _steered(server.url, training, run) as steering:
            os.sched_setaffinity(0, own)
            steps.extend(training.fit(steering, 10**7, is_over.is_set))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        answers = ask(run, step_seconds)
    finally:
        is_over.set()
        thread.join()
    waits = np.asarray(answers["waits"])
    beyond = waits - np.asarray(steps)[np.asarray(answers["steps"]) - _FIRST]
    p99, step = float(np.quantile(waits, 0.99)), float(np.median(steps))
    about = {
        "num_samples": len(waits),
        "step_ms": step * 1e3,
        "step_p99_ms": float(np.quantile(steps, 0.99)) * 1e3,
    }
    return {
        "p50": summarise([float(np.median(waits))], "ms", **about),
        "p99": summarise([p99], "ms", **about),
        "p99_minus_step": summarise([max(0.0, p99 - step)], "ms", **about),
        # Steps are not equally long: each wait less the step that applied the command.
        "p99_beyond_its_step": summarise([float(np.quantile(beyond, 0.99))], "ms", **about),
    }
