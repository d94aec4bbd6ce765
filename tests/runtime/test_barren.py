"""Where growth cannot help nothing is asked for, and the run says so once."""

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

ALIVE = 2


def batches(first: int, count: int) -> Any:
    rng = np.random.default_rng(first)
    return rng.standard_normal((count, 8, 6)).astype(np.float32)


def test_dead_chunks_are_left_alone_and_named_once() -> None:
    policy = ef.policies.periodic(every=1, count=3)
    growth = ef.Growth(
        sites=[ef.site("h", features=6, chunks=3)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=3,
        policy=policy,
        adapters_at_once=None,
    )
    # Chunk 0 is always zero, and of chunk 1 nothing reaches the loss.
    reads, counts = np.repeat([0.0, 1.0, 1.0], 2), np.repeat([1.0, 0.0, 1.0], 2)

    def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        h = seeds.grow("h", x * params * jnp.asarray(reads, jnp.float32))
        return jnp.mean(jnp.square((h - 1) * jnp.asarray(counts, jnp.float32)))

    with pytest.warns(RuntimeWarning, match="potential of exactly zero") as caught:
        done = runtime.fit(
            growth,
            loss_fn,
            ef.optim.per_adapter(optax.sgd(0.1)),
            jnp.ones((6,)),
            batches,
            num_steps=20,
            key=jax.random.key(0),
            survey_batch=batches(99, 1)[0],
            options=runtime.FitOptions(survey_every=5, segment_steps=5, snapshot_every=None),
        )
    words = [str(warning.message) for warning in caught if "exactly zero" in str(warning.message)]
    assert len(words) == 1
    assert "2 dormant seed(s)" in words[0]
    assert "'h' chunk 0, 'h' chunk 1" in words[0]
    assert {event["seed"] for event in done.events} == {ALIVE}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_held_out_data_that_is_not_finite_is_named_once(bad: float, run: Any) -> None:
    survey_batch = batches(99, 1)[0]
    run(survey_batch)  # warnings are errors here
    survey_batch[3, 2] = bad
    with pytest.warns(RuntimeWarning) as caught:
        done = run(survey_batch)
    assert ["survey_batch is not finite" in str(warning.message) for warning in caught] == [True]
    assert np.isfinite(done.losses).all()
    assert not np.asarray(done.state.growth_state.seeds.error_count).any()


@pytest.fixture(scope="module")
def run() -> Callable[[Any], runtime.Fit]:
    """A short fit on a survey batch, compiled once."""
    growth = ef.Growth(
        sites=[ef.site("h", features=6, chunks=3)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=3,
    )
    optimizer = ef.optim.per_adapter(optax.sgd(0.1))

    def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(seeds.grow("h", x * params) - 1))

    program = runtime.compile_fit(growth, loss_fn, optimizer, survey_every=5)

    def fit(survey_batch: Any) -> runtime.Fit:
        return runtime.fit(
            growth,
            loss_fn,
            optimizer,
            jnp.ones((6,)),
            batches,
            num_steps=10,
            key=jax.random.key(0),
            survey_batch=survey_batch,
            options=runtime.FitOptions(survey_every=5, segment_steps=5),
            program=program,
        )

    return fit
