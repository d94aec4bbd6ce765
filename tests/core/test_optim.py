"""One optimiser state for every body."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import standard

from esper_fn.optim import Slots, per_body

P = 3


def bodies(seed: int = 0) -> Any:
    key = jax.random.key(seed)
    return {"site": {"b": {"w": jax.random.normal(key, (P, 2, 4)), "c": jnp.ones((P, 2))}}}


def slots(born: list[bool], learns: list[bool]) -> Any:
    return {"site": {"b": Slots(is_born=jnp.asarray(born), learns=jnp.asarray(learns))}}


HOST = {"w": jnp.arange(4.0)}
NOBODY = [False] * P
ALL = [True] * P


def gradients(seed: int) -> Any:
    key = jax.random.key(100 + seed)
    like = (HOST, bodies())
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def run(optimizer: Any, flags: list[Any], first: int = 0, state: Any = None) -> Any:
    params = (HOST, bodies())
    state = optimizer.init(params) if state is None else state
    updates = None
    for index, flag in enumerate(flags):
        updates, state = optimizer.update(gradients(first + index), state, params, slots=flag)
    return updates, state


TRANSFORMATIONS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-3),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "scheduled": optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "rmsprop": optax.rmsprop(1e-2),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_body_born_late_gets_the_updates_of_one_born_first(name: str) -> None:
    optimizer = per_body(standard(TRANSFORMATIONS[name]))
    on = slots(NOBODY, ALL)
    late = [on] * 50 + [slots([False, True, False], ALL), on, on]
    updates, _ = run(optimizer, late)
    fresh, _ = run(optimizer, [on, on, on], first=50)
    for one, two in zip(jax.tree.leaves(updates[1]), jax.tree.leaves(fresh[1]), strict=True):
        np.testing.assert_array_equal(one[1], two[1])
    if name not in ("sgd", "lion"):  # a sign or a momentum may coincide
        assert any(
            not np.array_equal(one[0], two[0])
            for one, two in zip(jax.tree.leaves(updates[1]), jax.tree.leaves(fresh[1]), strict=True)
        ), "an old body must differ from a newborn, or the test shows nothing"


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_each_body_is_an_optimisation_of_its_own(name: str) -> None:
    optimizer = per_body(standard(TRANSFORMATIONS[name]))
    updates, _ = run(optimizer, [slots(NOBODY, ALL)] * 4)
    alone = standard(TRANSFORMATIONS[name])
    for slot in range(P):
        body = jax.tree.map(lambda leaf, slot=slot: leaf[slot], bodies()["site"]["b"])
        state = alone.init(body)
        for index in range(4):
            d_body = jax.tree.map(
                lambda leaf, slot=slot: leaf[slot], gradients(index)[1]["site"]["b"]
            )
            expected, state = alone.update(d_body, state, body)
        for one, two in zip(
            jax.tree.leaves(updates[1]["site"]["b"]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(one[slot], two, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_host_is_optimised_as_without_bodies(name: str) -> None:
    updates, _ = run(per_body(standard(TRANSFORMATIONS[name])), [slots(NOBODY, ALL)] * 3)
    alone = standard(TRANSFORMATIONS[name])
    state = alone.init(HOST)
    for index in range(3):
        expected, state = alone.update(gradients(index)[0], state, HOST)
    np.testing.assert_array_equal(updates[0]["w"], expected["w"])


def test_a_frozen_body_stands_still_weight_decay_and_moments_included() -> None:
    optimizer = per_body(standard(optax.adamw(1e-2, weight_decay=0.5)))
    _, state = run(optimizer, [slots(NOBODY, ALL)] * 2)
    updates, after = run(optimizer, [slots(NOBODY, [True, False, True])], first=2, state=state)
    for leaf in jax.tree.leaves(updates[1]):
        np.testing.assert_array_equal(leaf[1], np.zeros_like(leaf[1]))
        assert (np.asarray(leaf[0]) != 0).all()
    for old, new in zip(jax.tree.leaves(state.bodies), jax.tree.leaves(after.bodies), strict=True):
        np.testing.assert_array_equal(old[1], new[1])


def test_host_and_bodies_may_have_different_optimisers() -> None:
    optimizer = per_body(standard(optax.sgd(1.0)), standard(optax.sgd(0.0)))
    updates, _ = run(optimizer, [slots(NOBODY, ALL)])
    np.testing.assert_array_equal(updates[0]["w"], -gradients(0)[0]["w"])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates[1]))


def test_a_bank_without_parameters_is_passed_through() -> None:
    params = (HOST, {"site": {"noop": {}}})
    optimizer = per_body(standard(optax.adamw(1e-2)))
    state = optimizer.init(params)
    flags = {"site": {"noop": Slots(is_born=jnp.zeros(P, bool), learns=jnp.ones(P, bool))}}
    updates, _ = optimizer.update((HOST, {"site": {"noop": {}}}), state, params, slots=flags)
    assert updates[1] == {"site": {"noop": {}}}
