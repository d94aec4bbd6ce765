"""Data that change are no divergence: the runtime tries the last good parameters on them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import runtime
from esper_fn.governors import Alarm
from esper_fn.lifecycle import Stage

STEPS = 120


def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.square(seeds.grow("hidden", x * params["w"]) - y))


@pytest.fixture(scope="module")
def trained() -> Any:
    """A run of two parts in one program, after its first part."""
    growth = ef.Growth(
        sites=[ef.site("hidden", features=4)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=1,
        policy=ef.policies.periodic(every=1, score="random"),
        settings=ef.lifecycle.settings(max_steps={Stage.STABILIZATION: 9999}, loss_variation=0.0),
        governor=ef.governors.standard(patience=5, max_drift=1e6),
    )
    optimizer = ef.optim.per_adapter(optax.sgd(1e-3))
    step = runtime.make_step(growth, loss_fn, optimizer, survey_every=None)
    run = jax.jit(runtime.scan_steps(step))
    state = runtime.init(
        optimizer, {"w": jnp.ones((4,))}, growth.init(jax.random.key(0)), snapshot_every=20
    )
    x = jax.random.normal(jax.random.key(1), (2 * STEPS, 16, 4))
    noise = 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    state, info = run(state, (x[:STEPS], x[:STEPS] + noise[:STEPS]), None, growth.commands())
    assert not np.asarray(info.verdict.alarm).any()
    assert int(state.growth_state.seeds.stage[0]) == Stage.STABILIZATION
    program = runtime.compile_fit(growth, loss_fn, optimizer, survey_every=None)

    def one_by_one(state: Any, batches: Any, survey_batch: Any, commands: Any) -> Any:
        """Steps of two programs each, which take commands in between."""
        state, infos = jax.tree.map(jnp.copy, state), []
        for index in range(STEPS):
            batch = jax.tree.map(lambda leaf, i=index: leaf[i : i + 1], batches)
            state, info = program(state, batch, survey_batch, lambda: commands)
            infos.append(info)
        return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)

    return growth, {"one": run, "two": one_by_one}, state, x[STEPS:], noise[STEPS:]


@pytest.mark.parametrize("programs", ["one", "two"])
def test_a_change_of_the_data_rolls_nothing_back(trained: Any, programs: str) -> None:
    growth, runs, state, x, noise = trained
    after, info = runs[programs](state, (x, 5 * x + noise), None, growth.commands())
    verdict = info.verdict
    assert float(info.loss[0]) > 10
    assert not np.asarray(verdict.should_roll_back).any()
    assert not np.asarray(verdict.is_quarantined).any()
    assert np.asarray(verdict.is_elevated).any()
    assert np.flatnonzero(np.asarray(verdict.alarm) == Alarm.DATA_CHANGED).size == 1
    assert int(after.growth_state.seeds.stage[0]) == Stage.STABILIZATION
    assert float(info.loss[-1]) < 0.8 * float(info.loss[0])
    # Snapshots are taken again, of parameters that learned the new data.
    assert int(after.ring.steps.max()) > STEPS + 60


@pytest.mark.parametrize("programs", ["one", "two"])
def test_parameters_that_went_wrong_are_rolled_back(trained: Any, programs: str) -> None:
    growth, runs, state, x, noise = trained
    broken = state._replace(params={"w": state.params["w"] + 4})
    after, info = runs[programs](broken, (x, x + noise), None, growth.commands())
    verdict = info.verdict
    assert float(info.loss[0]) > 10
    back = np.flatnonzero(np.asarray(verdict.should_roll_back))
    assert back.size == 1
    assert back[0] < 30
    assert int(verdict.alarm[back[0]]) == Alarm.DIVERGENCE
    assert np.asarray(verdict.is_quarantined)[back[0]].all()
    np.testing.assert_allclose(after.params["w"], 1.0, atol=0.1)
