"""Wrong arguments of runs are named, with what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import runtime
from esper_fn._layout import make_layout

X = np.ones((8, 6), np.float32)
LAYOUT = make_layout(
    sites=[ef.site("h", features=6, chunks=2)],
    blueprints={"scale": ef.blueprints.scale_shift()},
    capacity=2,
)


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(seeds.grow("h", x * params) - 1))


def fit(**options: Any) -> Any:
    arguments = {"batches": lambda first, count: np.stack([X] * count), "survey_batch": X}
    arguments = {**arguments, "num_steps": 6, "key": jax.random.key(0), **options}
    batches = arguments.pop("batches")
    optimizer = ef.optim.per_adapter(optax.sgd(0.1))
    growth = ef.Growth(**LAYOUT.arguments)
    return runtime.fit(growth, loss_fn, optimizer, jnp.ones((6,)), batches, **arguments)


def fit_host(batches: Any) -> Any:
    return runtime.fit_host(loss_fn, optax.sgd(0.1), jnp.ones((6,)), batches, num_steps=6)


def too_few(first: int, count: int) -> Any:
    return np.stack([X] * 5)[first : first + count]


def surveys_twice() -> Any:
    optimizer = ef.optim.per_adapter(optax.sgd(0.1))
    growth = ef.Growth(**LAYOUT.arguments)
    step = runtime.make_step(growth, loss_fn, optimizer)
    survey = runtime.make_survey(growth, loss_fn)
    return runtime.scan_steps(step, survey=survey, survey_every=25)


def without_slots() -> Any:
    optimizer = ef.optim.per_adapter(optax.sgd(0.1))
    state = ef.Growth(**LAYOUT.arguments).init(jax.random.key(0))
    pair = (jnp.ones((6,)), state.adapters)
    return optimizer.update(pair, optimizer.init(pair), pair)


FEW = r"batches\(0, 6\) must give arrays with a leading axis of 6 steps, got shape \(5, 8, 6\)"
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "too few batches": (lambda: fit(batches=too_few), FEW),
    "of a host": (lambda: fit_host(too_few), FEW),
    "none left": (
        lambda: fit(batches=too_few, num_steps=12, options=runtime.FitOptions(segment_steps=6)),
        r"batches\(0, 6\) must give",
    ),
    "a list of batches": (
        lambda: fit(batches=[X] * 6),
        r"batches must be a function of \(first_step, count\), .*got a list",
    ),
    "one batch": (
        lambda: fit(batches=lambda first, count: {"x": X, "seed": 0}),
        r"got shape \(\) at batch\['seed'\]",
    ),
    "no held-out batch": (lambda: fit(survey_batch=None), "survey_batch must be a held-out batch"),
    "a number as key": (lambda: fit(key=0), "key must be a random key"),
    "two surveys": (surveys_twice, "step surveys by itself"),
    "no slots": (without_slots, r"slots=growth\.slots\(state\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named(what: str) -> None:
    run, message = BAD[what]
    with pytest.raises((TypeError, ValueError), match=message):
        run()


def test_without_surveys_no_held_out_batch_is_needed() -> None:
    done = fit(survey_batch=None, options=runtime.FitOptions(survey_every=None))
    assert done.losses.shape == (6,)
