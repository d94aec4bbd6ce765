"""`per_adapter` inside Optax's own wrappers: the same numbers, and a newborn starts afresh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import QUICK, same_bits

import esper_fn as ef
from esper_fn import runtime
from esper_fn.optim import AdapterGradients, Slots, per_adapter, plain_gradients

SLOTS = 3
RATE = 0.1


@pytest.fixture(autouse=True)
def standard_promotion() -> Any:
    """Optax's own arithmetic relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def random_bank(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "matrix": jnp.asarray(rng.standard_normal((SLOTS, 4, 3)), jnp.float32),
        "vector": jnp.asarray(rng.standard_normal((SLOTS, 3)), jnp.float32),
    }


def pair(seed: int) -> Any:
    """Parameters of host and adapters, or gradients of them."""
    host = jax.tree.map(lambda leaf: leaf[0], random_bank(1000 + seed))
    return host, {"site": {"adapter": random_bank(seed), "empty": {}}}


def slots(births: Any = (0, 0, 0), learns: Any = (True, True, True)) -> Any:
    bank_slots = Slots(generation=jnp.asarray(births, jnp.int32), learns=jnp.asarray(learns))
    return {"site": {"adapter": bank_slots, "empty": bank_slots}}


def plain() -> Any:
    return per_adapter(optax.adam(RATE))


WRAPPERS: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.identity(), plain()),
    "multi_steps": lambda: optax.MultiSteps(plain(), every_k_schedule=1),
    "multi_steps_as_transformation": lambda: optax.MultiSteps(
        plain(), every_k_schedule=1
    ).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate: per_adapter(optax.adam(learning_rate))
    )(learning_rate=RATE),
    "apply_if_finite": lambda: optax.apply_if_finite(plain(), 3),
    "all": lambda: optax.MultiSteps(
        optax.apply_if_finite(optax.chain(optax.identity(), plain()), 3), every_k_schedule=1
    ),
}


def updater(optimizer: Any) -> Any:
    @partial(jax.jit, compiler_options=QUICK)
    def update(gradients: Any, state: Any, params: Any, slots: Any) -> Any:
        return optimizer.update(gradients, state, params, slots=slots)

    return update


def test_it_is_an_optax_transformation_with_extra_arguments() -> None:
    assert isinstance(plain(), optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("name", WRAPPERS)
def test_nested_it_gives_the_same_updates_and_a_newborn_starts_afresh(name: str) -> None:
    inner, outer = plain(), WRAPPERS[name]()
    update, update_nested = updater(inner), updater(outer)
    params = pair(0)
    state, nested = inner.init(params), outer.init(params)
    # The last adapter does not learn in steps 2 and 3, the middle one is another from step 4 on.
    for step in range(7):
        now = slots((0, int(step >= 4), 0), (True, True, step not in (2, 3)))
        updates, state = update(pair(step + 1), state, params, now)
        nested_updates, nested = update_nested(pair(step + 1), nested, params, now)
        for own, other in zip(
            jax.tree.leaves(updates), jax.tree.leaves(nested_updates), strict=True
        ):
            np.testing.assert_allclose(own, other, rtol=1e-6, atol=1e-7)
        if step == 4:
            size = np.abs(np.asarray(nested_updates[1]["site"]["adapter"]["vector"][1]))
            np.testing.assert_allclose(size, RATE, rtol=1e-3)  # Adam's first step


def test_multi_steps_sum_up_and_a_birth_within_the_window_is_noticed() -> None:
    inner, outer = plain(), optax.MultiSteps(plain(), every_k_schedule=3)
    update, update_nested = updater(inner), updater(outer)
    params = pair(0)
    state, nested = inner.init(params), outer.init(params)
    _, state = update(pair(8), state, params, slots())
    for _ in range(3):
        _, nested = update_nested(pair(8), nested, params, slots())
    # The middle slot is free, so its gradient is zero, until a birth before the last two steps.
    gradients = []
    for step in range(3):
        host, banks = pair(step)
        bank = jax.tree.map(
            lambda leaf, s=step: leaf.at[1].multiply(s > 0), banks["site"]["adapter"]
        )
        gradients.append((host, {"site": {"adapter": bank, "empty": {}}}))
        now = slots((0, int(step > 0), 0), (True, step > 0, True))
        nested_updates, nested = update_nested(gradients[-1], nested, params, now)
        if step < 2:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(nested_updates))
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *gradients)
    updates, state = update(mean, state, params, slots((0, 1, 0)))
    for own, other in zip(jax.tree.leaves(updates), jax.tree.leaves(nested_updates), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)


def test_apply_if_finite_skips_a_step_and_keeps_the_state() -> None:
    optimizer = optax.apply_if_finite(plain(), 3)
    update = updater(optimizer)
    params = pair(0)
    _, state = update(pair(1), optimizer.init(params), params, slots())
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, pair(2))
    updates, after = update(broken, state, params, slots((0, 1, 0)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert same_bits(after.inner_state, state.inner_state)
    # The birth of the skipped step is noticed in the next one.
    updates, _ = update(pair(3), after, params, slots((0, 1, 0)))
    size = np.abs(np.asarray(updates[1]["site"]["adapter"]["vector"][1]))
    np.testing.assert_allclose(size, RATE, rtol=1e-3)


def test_injected_numbers_are_state() -> None:
    optimizer = WRAPPERS["inject_hyperparams"]()
    update = updater(optimizer)
    params = pair(0)
    state = optimizer.init(params)
    updates, _ = update(pair(1), state, params, slots())
    state.hyperparams["learning_rate"] = jnp.float32(2 * RATE)
    twice, _ = update(pair(1), state, params, slots())
    assert update._cache_size() == 1
    for own, other in zip(jax.tree.leaves(updates), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(2 * own, other, rtol=1e-6)


def test_transformations_before_and_after_act_on_host_and_adapters_alike() -> None:
    optimizer = optax.chain(optax.scale(3.0), per_adapter(optax.sgd(1.0)), optax.scale(0.5))
    params = pair(0)
    updates, _ = optimizer.update(pair(1), optimizer.init(params), params, slots=slots())
    expected = jax.tree.map(lambda leaf: -1.5 * leaf, pair(1))
    for own, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", *WRAPPERS])
def test_without_slots_it_says_what_is_missing(name: str) -> None:
    optimizer = plain() if name == "plain" else WRAPPERS[name]()
    params = pair(0)
    with pytest.raises(TypeError, match=r"in `slots=`: the call is `optimizer\.update\("):
        optimizer.update(pair(1), optimizer.init(params), params)


@pytest.mark.parametrize("name", ["multi_steps", "apply_if_finite"])
def test_wrappers_that_keep_gradients_want_plain_ones_and_say_so(name: str) -> None:
    optimizer = WRAPPERS[name]()
    params, (d_host, d_adapters) = pair(0), pair(1)
    gradients = (d_host, AdapterGradients(d_adapters))
    state = optimizer.init(params)
    with pytest.raises((TypeError, ValueError), match=r"ef\.optim\.plain_gradients\(gradients\)"):
        optimizer.update(gradients, state, params, slots=slots())
    optimizer.update(plain_gradients(gradients), state, params, slots=slots())


# --- in the loops of the library -----------------------------------------------------------------

X = jnp.ones((3, 6)) * jnp.arange(6.0)


def loss_fn(params: Any, seeds: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(seeds.grow("h", x @ params) - 1))


@pytest.fixture(scope="module")
def growth() -> Any:
    return ef.Growth(
        sites=[ef.site("h", features=6, chunks=2)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=1,
        adapters_at_once=None,
        policy=ef.policies.periodic(every=1, score="even"),
    )


def trained(growth: Any, optimizer: Any, num_steps: int = 6) -> Any:
    state = runtime.init(optimizer, jnp.eye(6), growth.init(jax.random.key(0)), snapshot_every=None)
    step = jax.jit(
        runtime.make_step(growth, loss_fn, optimizer, survey_every=None), compiler_options=QUICK
    )
    for _ in range(num_steps):
        state, _ = step(state, X, None, growth.commands())
    return state


def test_the_ready_step_takes_every_wrapper(growth: Any) -> None:
    alone = trained(growth, per_adapter(optax.adam(RATE)))
    nested = trained(growth, WRAPPERS["all"]())
    assert np.any(alone.growth_state.owner >= 0)
    for own, other in zip(
        jax.tree.leaves((alone.params, alone.growth_state.adapters)),
        jax.tree.leaves((nested.params, nested.growth_state.adapters)),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: optax.adam(RATE), "got an Optax transformation, under which a newborn"),
        (lambda: optax.chain(optax.clip(1.0), optax.adam(RATE)), "got an Optax transformation"),
        (lambda: optax.MultiSteps(optax.adam(RATE), 2), "got an Optax transformation"),
        (lambda: optax.chain(optax.trace(0.9), plain()), "keeps moments of the adapters itself"),
        (
            lambda: optax.MultiSteps(optax.chain(optax.trace(0.9), plain()), 2),
            "keeps moments of the adapters itself",
        ),
    ],
)
def test_an_optimiser_whose_moments_outlive_an_adapter_is_refused(
    growth: Any, wrong: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        runtime.init(wrong(), jnp.eye(6), growth.init(jax.random.key(0)))


def test_a_nested_optimiser_is_enlarged_with_its_growth(growth: Any) -> None:
    larger = growth.replace(capacity=2, sites=[*growth.layout.sites, ef.site("i", features=4)])
    for make in (WRAPPERS["inject_hyperparams"], lambda: optax.MultiSteps(plain(), 2)):
        optimizer = make()
        state = trained(growth, optimizer)
        result = runtime.enlarge(state, larger, optimizer, key=jax.random.key(1), before=growth)
        before, after = (
            jax.tree.leaves(s.opt_state, is_leaf=lambda node: hasattr(node, "num_updates"))
            for s in (state, result.state)
        )
        before, after = (
            next(node for node in nodes if hasattr(node, "num_updates"))
            for nodes in (before, after)
        )
        assert same_bits(before.host, after.host)
        assert set(after.adapters) == {"h", "i"}
        is_new = isinstance(optimizer, optax.MultiSteps)
        assert ("opt_state: what is around `per_adapter` begins anew" in result.changes) == is_new
