"""`seeds.grow` under JAX's transformations measures and computes what it does without them."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded
from support import QUICK, blank, make_step, place, same_bits, standard

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.errors import LayoutError
from esper_fn.lifecycle import Stage

LAYERS = 2
LAYOUT = make_layout(
    sites=[
        ef.site("shared", features=8, chunks=3),
        ef.site("deep", features=8, chunks=2, layers=LAYERS),
    ],
    blueprints={"silu": ef.blueprints.bottleneck(3, activation="silu")},
    capacity=3,
)
ROWS = {
    0: ("silu", Stage.FINE_TUNING, 0.6),
    1: ("silu", Stage.TRAINING, 0.0),
    3: ("silu", Stage.GRAFTING, 0.4),
    5: ("silu", Stage.FINE_TUNING, 0.8),
    6: ("silu", Stage.FOSSILIZED, 1.0),
}

TWO_DEVICES = "--xla_force_host_platform_device_count=2"


def _layer(h: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.tanh(h @ weights)


def _total(h: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(h - 0.5)) / 6  # a sum over examples: parts of a batch add up


def plainly(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    h = x
    for weights in params["shared"]:
        h = seeds.grow("shared", _layer(h, weights))
    for index, weights in enumerate(params["deep"]):
        h = seeds.layer("deep", index).grow("deep", _layer(h, weights))
    return _total(h)


def with_scans(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    """The same seeds at every turn of one scan, their own ones at every turn of the other."""
    h, _ = jax.lax.scan(
        lambda h, w: (seeds.grow("shared", _layer(h, w)), None), x, params["shared"]
    )

    def step(h: jax.Array, sliced: Any) -> Any:
        weights, own = sliced
        return own.grow("deep", _layer(h, weights)), None

    h, _ = jax.lax.scan(step, h, (params["deep"], seeds.layers("deep")))
    return _total(h)


def with_checkpoints(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def block(h: jax.Array, weights: jax.Array, seeds: Any) -> jax.Array:
        return seeds.grow("shared", _layer(h, weights))

    @jax.checkpoint
    def step(h: jax.Array, sliced: Any) -> Any:
        weights, own = sliced
        return own.grow("deep", _layer(h, weights)), None

    h = x
    for weights in params["shared"]:
        h = block(h, weights, seeds)
    h, _ = jax.lax.scan(step, h, (params["deep"], seeds.layers("deep")))
    return _total(h)


def with_inner_jit(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    @jax.jit
    def sliced(seeds: Any, h: jax.Array, weights: jax.Array) -> jax.Array:
        return seeds.grow("shared", _layer(h, weights))

    @jax.jit
    def closing_over(h: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
        return seeds.layer("deep", index).grow("deep", _layer(h, weights))

    h = x
    for weights in params["shared"]:
        h = sliced(seeds, h, weights)
    for index, weights in enumerate(params["deep"]):
        h = closing_over(h, weights, jnp.int32(index))
    return _total(h)


def with_vmap_over_examples(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jax.vmap(lambda example: plainly(params, seeds, example))(x))


def with_parts_of_the_batch(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(
        jax.lax.map(lambda part: plainly(params, seeds, part), x.reshape(3, 2, x.shape[-1]))
    )


@cache
def setting(at_once: int | None) -> Any:
    growth = ef.Growth(**LAYOUT.arguments, adapters_at_once=at_once)
    rng = np.random.default_rng(2)
    params = {
        name: jnp.asarray(rng.standard_normal((LAYERS, 8, 8)) * 0.5, jnp.float32)
        for name in ("shared", "deep")
    }
    x = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)
    return growth, params, place(growth, blank(growth), ROWS), x


@cache
def ran(loss_fn: Any, at_once: int | None) -> Any:
    growth, params, state, x = setting(at_once)
    run = jax.jit(growth.value_and_grad(loss_fn), compiler_options=QUICK)
    return run(params, state, x)


PER_CALL = ("num_features", "num_live", "num_dead", "num_errors")


@pytest.mark.parametrize(
    ("loss_fn", "calls", "at_once"),
    [
        (with_scans, 1, 2),
        (with_scans, 1, None),
        (with_checkpoints, 1, 1),
        (with_inner_jit, 1, 1),
        (with_vmap_over_examples, 6, 3),
        (with_parts_of_the_batch, 3, 3),
    ],
)
def test_gradients_and_statistics_are_the_plain_ones(
    loss_fn: Any, calls: int, at_once: int | None
) -> None:
    value, grads, statistics = ran(loss_fn, at_once)
    want, want_grads, expected_statistics = ran(plainly, None)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, other in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)
    for name in expected_statistics._fields:
        times = calls if name in PER_CALL else 1
        np.testing.assert_allclose(
            getattr(statistics, name),
            times * np.asarray(getattr(expected_statistics, name)),
            rtol=1e-4,
            atol=1e-5,
            err_msg=name,
        )


def test_shared_seeds_are_measured_at_every_use() -> None:
    _, _, statistics = ran(plainly, None)
    # Shared: 3 chunks of 3, 3 and 2 features, 6 rows, 2 uses. Deep: 2 layers of 2 chunks of 4.
    assert statistics.num_values.tolist() == [36.0, 36.0, 24.0, 24.0, 24.0, 24.0, 24.0]
    assert statistics.num_live.tolist() == [2.0, 2.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_evaluation_seeds_enter_a_jit_without_tracing_it_anew() -> None:
    growth, params, state, x = setting(3)
    traces = []

    @jax.jit
    def evaluate(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        traces.append(None)
        return plainly(params, seeds, x)

    first = evaluate(params, growth.seeds(state), x)
    again = evaluate(params, growth.seeds(state), x)
    other = state._replace(seeds=state.seeds._replace(alpha=state.seeds.alpha / 2))
    changed = evaluate(params, growth.seeds(other), x)
    assert len(traces) == 1
    assert same_bits(first, again)
    assert float(changed) != float(first)
    np.testing.assert_allclose(first, ran(plainly, None)[0], rtol=1e-5)


@pytest.mark.parametrize("at_once", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_population_under_vmap_is_a_loop_over_its_members(at_once: int | None) -> None:
    """Whole training steps: parameters, states, optimiser states and statistics of four
    networks."""
    growth = ef.Growth(
        **LAYOUT.arguments,
        adapters_at_once=at_once,
        policy=ef.policies.periodic(every=1, score="gradient"),
    )
    optimizer = ef.optim.per_adapter(standard(optax.sgd(0.05)))
    step = make_step(growth, plainly, optimizer)
    _, params, state, x = setting(1)
    members = []
    for index in range(4):
        scaled = jax.tree.map(lambda leaf, i=index: leaf * (1 + 0.2 * i), params)
        own = state._replace(policy=growth.policy.init(LAYOUT), key=jax.random.key(index))
        rows = {seed: ROWS[seed] for seed in list(ROWS)[: index + 1]}
        own = place(growth, own._replace(owner=jnp.full_like(own.owner, -1)), rows, noise=0.0)
        members.append((scaled, own, optimizer.init((scaled, own.adapters))))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    population = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)), compiler_options=QUICK)
    nothing = growth.commands(size=1)
    for _ in range(3):
        *stacked, infos = population(*stacked, x, nothing)
        alone = [step(*member, x, nothing) for member in members]
        members = [tuple(member[:3]) for member in alone]
        for index, (_, after, _, info) in enumerate(alone):
            mine = jax.tree.map(lambda leaf, i=index: leaf[i], infos)
            np.testing.assert_array_equal(mine.stage, info.stage)
            np.testing.assert_array_equal(mine.request_code, info.request_code)
            np.testing.assert_allclose(mine.loss, info.loss, rtol=1e-5)
            np.testing.assert_array_equal(stacked[1].owner[index], after.owner)
        for got, *own in zip(
            jax.tree.leaves(stacked[0]), *[jax.tree.leaves(m[0]) for m in members], strict=True
        ):
            np.testing.assert_allclose(got, np.stack(own), rtol=1e-4, atol=1e-6)
    assert (np.asarray(stacked[1].seeds.stage) == Stage.GERMINATED).any()


def test_shard_map_over_one_device() -> None:
    sharded.check_gradients(1)


def test_two_devices_take_the_same_decisions() -> None:
    """In a process of its own, where XLA is told of two CPU devices."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(Path(ef.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(here / "sharded.py")],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}",
            "PYTHONPATH": path,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_growth_may_be_a_static_argument() -> None:
    growth, _, state, _ = setting(1)
    count = jax.jit(lambda growth, state: growth.slots(state), static_argnums=0)
    assert set(count(growth, state)) == {declared.name for declared in growth.layout.sites}


@pytest.mark.parametrize("index", [2, -1, np.int64(2)])
def test_a_layer_that_is_not_there(index: Any) -> None:
    growth, _, state, _ = setting(1)
    with pytest.raises(LayoutError, match=r"layers 0\.\.1, got"):
        growth.seeds(state).layer("deep", index)


@pytest.mark.parametrize(
    ("name", "least"), [("adapters_at_once", 1), ("max_ablations", 1), ("directed_births", 0)]
)
@pytest.mark.parametrize("value", [1.5, True, -1, "many"])
def test_counts_are_whole_numbers(name: str, least: int, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an int, at least {least}.*got {value!r}"):
        ef.Growth(**LAYOUT.arguments, **{name: value})
