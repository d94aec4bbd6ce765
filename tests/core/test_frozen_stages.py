"""Adapters learn in every stage in which they act, but where a stage is frozen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import make_step, mean_square, standard

import esper_fn as ef
from esper_fn.lifecycle import Stage
from esper_fn.types import Seeds

X = jax.random.normal(jax.random.key(0), (16, 6))


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("stage", [stage for stage in Stage if ef.lifecycle.ACTS[stage]])
def test_an_acting_adapter_learns_unless_its_stage_is_frozen(stage: Stage, is_frozen: bool) -> None:
    growth = ef.Growth(
        sites=[ef.site("a", features=6)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=1,
        policy=ef.policies.never(),
        settings=ef.lifecycle.settings(freeze=(stage,) if is_frozen else ()),
        adapters_at_once=None,
    )

    def loss_fn(params: jax.Array, seeds: Seeds, batch: jax.Array) -> jax.Array:
        return mean_square(seeds.grow("a", batch) @ params, jnp.ones((16, 3)))

    params = jax.random.normal(jax.random.key(1), (6, 3))
    state = growth.init(jax.random.key(2))
    state = state._replace(
        owner=jnp.zeros_like(state.owner),
        seeds=state.seeds._replace(
            stage=jnp.full((1,), stage, jnp.int8),
            slot=jnp.zeros((1,), jnp.int32),
            blueprint=jnp.zeros((1,), jnp.int8),
            alpha=jnp.ones((1,)),
        ),
    )
    optimizer = ef.optim.per_adapter(standard(optax.adamw(1e-2)))
    before = state.adapters["a"]["low_rank"]["up"]
    opt_state = optimizer.init((params, state.adapters))
    step = make_step(growth, loss_fn, optimizer)
    _, state, _, _ = step(params, state, opt_state, X, growth.commands())
    has_moved = not np.array_equal(before, state.adapters["a"]["low_rank"]["up"])
    assert has_moved is not is_frozen
