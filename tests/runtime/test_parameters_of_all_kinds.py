"""Parameters, optimisers and debugging flags as users have them, in the ready loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn import runtime

X = jax.random.normal(jax.random.key(0), (8, 6))
GROWTH = ef.Growth(
    sites=[ef.site("a", features=6, chunks=2)],
    blueprints={"scale": ef.blueprints.scale_shift()},
    capacity=1,
    adapters_at_once=None,
)
W = np.linspace(-1, 1, 6, dtype=np.float32)
PARAMS: dict[str, Any] = {
    "weak": {"w": jnp.broadcast_to(jnp.asarray(0.3), (6,)), "b": jnp.asarray(0.5)},
    "number": {"w": W, "b": 0.5, "absent": None},
    "whole numbers and keys": {
        "w": W,
        "b": 0.5,
        "n": 3,
        "flag": True,
        "ids": np.arange(3),
        "key": jax.random.key(5),
        "old key": jax.random.PRNGKey(5),
    },
}
OPTIMISERS: dict[str, Any] = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "plateau": optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0, rtol=1.0)
    ),
    "polyak": optax.polyak_sgd(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(seeds.grow("a", x) @ params["w"] + params["b"] - 1.0))


def batches(first: int, count: int) -> jax.Array:
    return jnp.broadcast_to(X, (count, *X.shape))


def fit(params: Any, optimizer: Any, **options: Any) -> runtime.Fit:
    arguments: dict[str, Any] = {
        "num_steps": 9,
        "survey_batch": X,
        "options": runtime.FitOptions(segment_steps=3, survey_every=None, snapshot_every=None),
        "key": jax.random.key(1),
        "commands": lambda step: [cmd.germinate(0, "scale")] if step == 0 else [],
        **options,
    }
    return runtime.fit(GROWTH, loss_fn, optimizer, params, batches, **arguments)


@pytest.mark.parametrize("kind", list(PARAMS))
def test_parameters_of_every_kind_train_and_compile_nothing_later(kind: str) -> None:
    params = PARAMS[kind]
    # Weight decay: what does not learn may not decay either.
    result = fit(params, ef.optim.per_adapter(OPTIMISERS["adamw"]))
    assert result.num_compiled == 0
    assert result.losses[-1] < result.losses[0]
    after = result.state.params
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for name in after.keys() - {"w", "b", "absent"}:
        assert after[name].dtype == jnp.asarray(params[name]).dtype
        assert bool(jnp.all(after[name] == params[name]))
    moved = optax.apply_updates({"w": params["w"], "b": params["b"]}, {"w": 0.0, "b": 0.0})
    assert after["w"].dtype == moved["w"].dtype == jnp.float32
    assert not np.array_equal(after["w"], params["w"])


def test_a_step_of_ones_own_takes_them_too() -> None:
    params = {**PARAMS["whole numbers and keys"], "k": jax.random.key(1)}
    optimizer = ef.optim.per_adapter(OPTIMISERS["adamw"])

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, commands: Any) -> Any:
        loss, grads, statistics = GROWTH.value_and_grad(loss_fn)(params, state, X)
        updates, opt_state = optimizer.update(
            grads, opt_state, (params, state.adapters), slots=GROWTH.slots(state)
        )
        params, adapters = ef.optim.apply_updates((params, state.adapters), updates)
        state, _ = GROWTH.update(state, adapters, statistics, loss, commands)
        return params, state, opt_state, loss

    state = GROWTH.init(jax.random.key(1))
    opt_state = optimizer.init((params, state.adapters))
    losses, after = [], params
    for turn in range(4):
        commands = GROWTH.commands([cmd.germinate(0, "scale")] if turn == 0 else [], size=1)
        after, state, opt_state, loss = step(after, state, opt_state, commands)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for name in after.keys() - {"w", "b"}:
        assert bool(jnp.all(after[name] == params[name]))
    plain = {"w": W, "b": np.float32(0.5)}
    change = jax.tree.map(jnp.ones_like, plain)
    both = ef.optim.apply_updates(plain, change), optax.apply_updates(plain, change)
    assert all(map(np.array_equal, *map(jax.tree.leaves, both)))


def test_one_step_after_another_is_compiled_once() -> None:
    optimizer = ef.optim.per_adapter(OPTIMISERS["injected"])
    step = jax.jit(runtime.make_step(GROWTH, loss_fn, optimizer, survey_every=None))
    state = runtime.init(
        optimizer, PARAMS["whole numbers and keys"], GROWTH.init(jax.random.key(1))
    )
    state, _ = step(state, X, X, GROWTH.commands())
    with runtime.count_compilations() as count:
        for _ in range(2):
            state, _ = step(state, X, X, GROWTH.commands())
    assert count.num_compiled == 0


@pytest.mark.parametrize("kind", ["plateau", "polyak"])
def test_optimisers_that_look_at_the_loss_run(kind: str) -> None:
    result = fit(PARAMS["number"], ef.optim.per_adapter(OPTIMISERS[kind]))
    assert result.num_compiled == 0
    assert np.isfinite(result.losses).all()
    if kind == "plateau":
        # With `rtol=1` no fall counts: the factor falls every step.
        scales = optax.tree.get_all_with_path(result.state.opt_state.host, "scale")
        assert [float(scale) for _, scale in scales] == [pytest.approx(0.1**9)]


def test_a_line_search_runs_for_the_host_and_not_for_an_adapter() -> None:
    search = optax.lbfgs()
    result = fit(PARAMS["whole numbers and keys"], ef.optim.per_adapter(search, optax.adam(0.1)))
    assert result.num_compiled == 0
    assert result.losses[-1] < 0.5 * result.losses[0]
    with pytest.raises(
        TypeError, match=r"an adapter has no loss of its own; give the adapters another"
    ):
        fit(PARAMS["number"], ef.optim.per_adapter(search))


def test_the_host_alone_takes_the_same_parameters_and_optimisers() -> None:
    result = runtime.fit_host(
        loss_fn,
        OPTIMISERS["plateau"],
        PARAMS["whole numbers and keys"],
        batches,
        num_steps=9,
        segment_steps=3,
    )
    assert result.num_compiled == 0
    assert np.isfinite(result.losses).all()
    assert int(result.state["n"]) == 3


DIRECTED = ef.Growth(
    sites=[ef.site("a", features=6)],
    blueprints={"low_rank": ef.blueprints.low_rank(1)},
    capacity=1,
    policy=ef.policies.periodic(every=1),
    adapters_at_once=None,
    directed_births=1,
    max_ablations=1,
)


@pytest.mark.parametrize("flag", ["jax_debug_infs", "jax_debug_key_reuse"])
def test_a_sound_run_is_sound_under_the_debugging_flags(flag: str) -> None:
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        result = runtime.fit(
            DIRECTED,
            loss_fn,
            ef.optim.per_adapter(optax.sgd(0.1)),
            {"w": W, "b": np.float32(0.5)},
            batches,
            num_steps=4,
            survey_batch=X,
            options=runtime.FitOptions(segment_steps=2, survey_every=2, snapshot_every=2),
            key=jax.random.key(1),
        )
    finally:
        jax.config.update(flag, before)
    assert np.isfinite(result.losses).all()
    assert result.events[0]["to"] == "GERMINATED"
