"""One conformance test over all policies, and the check for those of users."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import NONE
from policy_player import (
    ALL,
    Player,
    layout,
    observe,
    requested,
    wish,
)

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.commands import cull, germinate
from esper_fn.errors import UnknownNameError
from esper_fn.policies import (
    _select,
    budget,
    chain,
    cooldown,
    grow,
    max_concurrent,
    max_total,
    never,
    no_requests,
    periodic,
    plateau,
    random,
    recycle,
    request,
    rule,
    scripted,
    stop_after,
)

POLICIES = {
    "never": never,
    "grow": lambda: grow(every=2, count=2),
    "grow_even": lambda: grow(score="even"),
    "periodic": lambda: periodic(every=2, count=2),
    "periodic_gradient": lambda: periodic(every=2, score="gradient"),
    "random": lambda: random(every=1),
    "recycle": lambda: recycle(every=2, threshold=1.0, patience=2),
    "plateau": lambda: plateau(patience=2),
    "scripted": lambda: scripted([(1, germinate(0, "scale")), (2, cull(1))]),
    "scripted_empty": lambda: scripted([]),
    "budget": lambda: budget(10),
    "max_concurrent": lambda: max_concurrent(1),
    "cooldown": lambda: cooldown(2),
    "max_total": lambda: max_total(1),
    "stop_after": lambda: stop_after(3),
    "chain_empty": chain,
    "chain": lambda: chain(random(every=1), chain(plateau(patience=1), budget(9)), cooldown(2)),
}


def test_every_policy_is_in_the_matrix() -> None:
    helpers = {"check", "no_requests", "refuse", "request", "rule", "seed_blueprints"}
    assert {name for name in ef.policies.__all__ if name.islower()} - helpers <= set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_contract(name: str) -> None:
    ef.policies.check(POLICIES[name](), layout())


def test_check_finds_what_breaks_the_contract() -> None:
    def policy(decide: Any, init: Any = lambda layout: ()) -> Any:
        return rule("planted", init, decide)

    def everywhere(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        everybody = jnp.ones((layout.num_seeds,), bool)
        return state, request(requests, everybody, jnp.int8(9))

    def by_chance(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        return state, request(requests, jnp.full((layout.num_seeds,), random_bit()), jnp.int8(0))

    def random_bit() -> Any:
        return jax.pure_callback(lambda: np.bool_(next(bits)), jax.ShapeDtypeStruct((), bool))

    bits = iter([False, True] * 100)

    def quiet(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        return state, requests

    for wrong, message in (
        (policy(quiet, lambda layout: 1.0), "must be a JAX array, got 1.0"),
        (policy(everywhere), "requests.blueprint must be between -1 and 2, got"),
        (policy(by_chance), "the same arguments lead to different decisions"),
        (
            policy(lambda layout, state, observation, asks, key: ((state,), asks)),
            "decide turns a state",
        ),
        (ef.policies.Policy(("bare",), lambda layout: (), everywhere_once), "lacks the rule"),
    ):
        with pytest.raises(ValueError, match=message):
            ef.policies.check(wrong, layout())
    with pytest.raises(TypeError, match="must be a Policy, got the function grow"):
        ef.policies.check(grow)  # type: ignore[arg-type]


def everywhere_once(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
    everybody = jnp.ones((layout.num_seeds,), bool)
    return state, request(requests, everybody, jnp.int8(0))


@pytest.mark.parametrize("name", POLICIES)
def test_policies_run_in_scan_and_vmap(name: str) -> None:
    policy = POLICIES[name]()
    assert isinstance(policy.rules, tuple)
    state = policy.init(layout())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    observation = observe(potential=ALL, gradient=ALL, loss=1.0)

    def step(state: Any, now: Any) -> Any:
        number, key = now
        return policy.decide(layout(), state, observation._replace(step=number), wish(0, 3), key)

    # `scan` refuses a state whose structure, shapes or dtypes change.
    def run(state: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(step, state, (jnp.arange(4, dtype=jnp.int32), keys))[1]

    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    keys = jax.random.split(jax.random.key(0), (2, 4))
    result = jax.jit(jax.vmap(run))(many, keys)
    shapes = jax.eval_shape(lambda: no_requests(6))
    assert jax.tree.map(lambda x: ((2, 4, *x.shape), x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), result
    )
    for index in (result.requested_by, result.vetoed_by):
        assert ((np.asarray(index) >= NONE) & (np.asarray(index) < max(len(policy.rules), 1))).all()


@pytest.mark.parametrize("name", [name for name in POLICIES if "scripted" not in name])
def test_policies_ask_only_of_seeds_that_can(name: str) -> None:
    """Nothing that a rule asks of itself is refused by the table; a script asks what is written."""
    player = Player(POLICIES[name]())
    stage = (1, 0, 2, 7, 8, 10)
    for step in range(4):
        result = player.ask(observe(step, stage=stage, potential=ALL, gradient=ALL, loss=1.0))
        assert set(requested(result)) <= {1}


@pytest.mark.parametrize(
    "policy",
    [
        plateau(blueprint="x"),
        ef.policies.chain(ef.policies.cooldown(5), periodic(every=3, blueprint="x")),
    ],
    ids=["plateau", "chain"],
)
def test_growth_refuses_a_policy_with_an_unknown_blueprint(policy):
    with pytest.raises(UnknownNameError, match="unknown blueprint 'x'; allowed: scale"):
        ef.Growth(
            sites=[ef.site("s", features=4, chunks=2)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=2,
            policy=policy,
        )


@pytest.mark.parametrize("count", [1, 4, 40])
def test_seeds_compared_in_pairs_are_those_that_sorting_finds(count: int, monkeypatch: Any) -> None:
    """Few seeds are compared in pairs, many are sorted; ties go to the first seed in both."""
    sites = [ef.site(str(size), features=size, chunks=size, layers=2) for size in (1, 3, 5, 9)]
    wide = make_layout(sites=sites, blueprints={"scale": ef.blueprints.scale_shift()}, capacity=9)
    rng = np.random.default_rng(count)
    for _ in range(20):
        worth = rng.integers(0, 6, wide.num_seeds).astype(np.float32)
        worth[rng.uniform(size=worth.size) < 0.2] = -np.inf
        room = jnp.asarray(rng.integers(0, 4, 8), jnp.int32)
        pairs = _select._is_among_best(wide, jnp.asarray(worth), room, count)
        with monkeypatch.context() as patch:
            patch.setattr(_select, "_MAX_PAIRWISE_SEEDS", 0)
            ordered = _select._is_among_best(wide, jnp.asarray(worth), room, count)
        assert pairs.tolist() == ordered.tolist()
