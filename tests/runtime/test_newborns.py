"""An adapter that acts from its first step is not held to account for what every newborn does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import runtime
from esper_fn.lifecycle import Stage

STEPS = 40
PARAMS = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)
QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}
OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "adam": optax.adam(1e-2),
    # Twenty steps of nothing: an adapter of zero is still zero after its first steps.
    "accumulated": optax.MultiSteps(optax.sgd(0.05), 20),
    # The second step is many times as large as the first.
    "warmed up": optax.adam(optax.warmup_cosine_decay_schedule(1e-7, 1e-2, 10, STEPS)),
}


def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
    h = seeds.grow("h", jnp.tanh(batch @ params))
    return jnp.mean(jnp.square(h - jnp.sin(3 * batch)))


def batches(first: int, count: int) -> Any:
    rng = np.random.default_rng(0)
    return rng.standard_normal((STEPS, 8, 6)).astype(np.float32)[first : first + count]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_adapter_that_is_zero_at_birth_grows_by_the_defaults(name: str) -> None:
    growth = ef.Growth(
        sites=[ef.site("h", features=6, chunks=2)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=2,
    )
    optimizer = ef.optim.per_adapter(OPTIMIZERS[name])
    run = runtime.scan_steps(runtime.make_step(growth, loss_fn, optimizer, survey_every=None))
    state = runtime.init(optimizer, PARAMS, growth.init(jax.random.key(1)), snapshot_every=None)
    state, infos = jax.jit(run, compiler_options=QUICK)(state, batches(0, STEPS), batches(0, 1)[0])
    stages = np.asarray(infos.stage)
    assert (stages[-1] != Stage.DORMANT).all()
    assert not (stages == Stage.ROLLED_BACK).any()
    adapters = state.growth_state.adapters["h"]["scale"]
    assert all((np.abs(leaf).max(1) > 1e-4).all() for leaf in jax.tree.leaves(adapters))
