"""What a connected bus costs a training step, with its server up and down."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from benchmarks._timing import Row, ratio, summarise
from esper_fn import bus, policies, runtime

_WIDTH = 512
_ROWS = 96


def loop_rows(server: bus.PrivateServer, *, repeats: int) -> dict[str, Row]:
    """Steps with and without the bus in turns, a server that is killed, and sender to outcome."""
    growth = ef.growth(
        ef.lattice(
            sites=[ef.site("hidden", features=_WIDTH, chunks=16)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=4,
        ),
        policy=policies.never(),
    )
    source = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(source.normal(size=(_WIDTH, _WIDTH)) / 30, jnp.float32),
        "out": jnp.asarray(source.normal(size=(_WIDTH, 10)) / 30, jnp.float32),
    }
    inputs = jnp.asarray(source.normal(size=(1, _ROWS, _WIDTH)), jnp.float32)
    targets = jnp.asarray(source.integers(10, size=(1, _ROWS)), jnp.int32)

    def loss_fn(params: Any, seeds: Any, batch: Any) -> Any:
        hidden = seeds.grow("hidden", jnp.tanh(batch[0] @ params["in"]))
        for _ in range(6):
            hidden = jnp.tanh(hidden @ params["in"])
        logits = hidden @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    optimizer = ef.optim.per_body(optax.sgd(1e-3))
    segment = runtime.compile_fit(growth, loss_fn, optimizer, survey_every=None)

    def fit(steering: Any, num_steps: int, should_stop: Any = None) -> list[float]:
        """Seconds of each step."""
        times: list[float] = []
        last = [time.perf_counter()]

        def listen(_: Any) -> None:
            now = time.perf_counter()
            times.append(now - last[0])
            last[0] = now

        runtime.fit(
            growth, loss_fn, optimizer, params, lambda first, count: (inputs, targets),
            num_steps=num_steps, key=jax.random.key(0), survey_batch=(inputs[0], targets[0]),
            survey_every=None, segment_steps=1, segment=segment, max_commands=16,
            listener=listen, steering=steering, should_stop=should_stop,
        )  # fmt: skip
        return times[3:]

    def on_bus(run: str, num_steps: int) -> list[float]:
        with runtime.steer(server.url, growth, run=run, keys=bus.NO_KEYS) as steering:
            return fit(steering, num_steps)

    fit(None, 20)
    turns = max(3, repeats // 40)
    bare, up, down = [], [], []
    for turn in range(turns):
        bare.append(float(np.median(fit(None, 60))))
        up.append(float(np.median(on_bus(f"loop-{turn}-{secrets.token_hex(3)}", 60))))
    for turn in range(turns):
        bare_now = float(np.median(fit(None, 60)))
        with runtime.steer(server.url, growth, run=f"down-{turn}", keys=bus.NO_KEYS) as steering:
            server.kill()
            down.append(float(np.median(fit(steering, 60))) / bare_now)
            server.start()
    rows = {
        "step_bare": summarise(bare, "ms"),
        "step_with_bus_over_bare": ratio(up, bare),
        "step_with_server_down_over_bare": summarise(down, "ratio"),
    }
    return rows | _answers(server, growth, fit, repeats=min(repeats, 400))


def _answers(server: bus.PrivateServer, growth: Any, fit: Any, *, repeats: int) -> dict[str, Row]:
    """From a client's call to its outcome, through the loop, against a step."""
    run = f"answers-{secrets.token_hex(3)}"
    is_over = threading.Event()
    steps: list[float] = []

    def work() -> None:
        with runtime.steer(server.url, growth, run=run, keys=bus.NO_KEYS) as steering:
            steps.extend(fit(steering, 10**7, is_over.is_set))

    thread = threading.Thread(target=work)
    thread.start()
    waits = []
    with bus.connect(server.url, run=run, keys=bus.NO_KEYS) as client:
        while run not in client.living():
            time.sleep(0.05)
        client.send(bus.Cull(seed=0), wait_seconds=60)
        for number in range(repeats):
            began = time.perf_counter()
            client.send(bus.Cull(seed=number % 16), wait_seconds=60)
            waits.append(time.perf_counter() - began)
    is_over.set()
    thread.join()
    p99, step = float(np.quantile(waits, 0.99)), float(np.median(steps))
    return {
        "answer_p99": summarise([p99], "ms", num_samples=repeats, step_ms=step * 1e3),
        "answer_p99_minus_step": summarise([max(0.0, p99 - step)], "ms", num_samples=repeats),
    }
