"""Directed and paired births in a real loop: what they are worth, and what they may not disturb."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drive import silent
from support import QUICK, mean_square, same_bits, standard

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn import rollback
from esper_fn._layout import make_layout
from esper_fn.blueprints import AdapterSpec
from esper_fn.governors import Alarm, Verdict
from esper_fn.lifecycle import Stage
from esper_fn.runtime import count_compilations

FEATURES, OUTPUTS, ROWS = 24, 6, 256

# --- the planted task --------------------------------------------------------------------------


@cache
def planted() -> Any:
    """A host without the one direction in 24 that matters; many draws of an adapter for it.

    Returns, for directed and default births: gradient norms of `up` at birth `[runs]`, losses after
    training `[runs]`, and the cosine of the planted direction with the closest column of `down`.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ROWS, FEATURES)), jnp.float32)
    direction = rng.standard_normal(FEATURES)
    direction /= np.linalg.norm(direction)
    missing = jnp.asarray(direction[:, None] * rng.standard_normal(OUTPUTS), jnp.float32)
    host = jnp.asarray(rng.standard_normal((FEATURES, OUTPUTS)) * 0.3, jnp.float32)
    noise = jnp.asarray(rng.standard_normal((ROWS, OUTPUTS)) * 0.1, jnp.float32)
    batch = x, x @ host + jnp.sin(x @ missing) + noise
    layout = make_layout(
        sites=[ef.site("here", source_features=FEATURES, features=OUTPUTS)],
        blueprints={
            "low_rank": ef.blueprints.low_rank(4),
            "bottleneck": ef.blueprints.bottleneck(4),
            "gated": ef.blueprints.gated(4),
        },
        capacity=1,
    )

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        return mean_square(seeds.grow("here", batch[0] @ params, source=batch[0]), batch[1])

    optimizer = standard(optax.sgd(0.3))

    def born(growth: Any, name: str, key: jax.Array) -> Any:
        state, _ = growth.survey(loss_fn)(host, growth.init(key), batch)
        order = growth.commands([cmd.germinate(0, name)])
        state, info = growth.update(state, state.adapters, silent(1), jnp.float32(1.0), order)
        assert info.num_directed.shape == ()
        stage = jnp.full_like(state.seeds.stage, Stage.FINE_TUNING)
        return state._replace(
            seeds=state.seeds._replace(stage=stage, alpha=jnp.ones_like(state.seeds.alpha))
        ), info.num_directed

    def live(growth: Any, name: str, key: jax.Array) -> Any:
        state, count = born(growth, name, key)

        def step(carry: Any, _: Any) -> Any:
            adapters, opt_state = carry
            measured = growth.value_and_grad(loss_fn)
            loss, (_, slopes), _ = measured(host, state._replace(adapters=adapters), batch)
            slopes = dict(slopes)  # one adapter from birth to end, so plain SGD may have it
            updates, opt_state = optimizer.update(slopes, opt_state)
            return (optax.apply_updates(adapters, updates), opt_state), (loss, slopes)

        carry = state.adapters, optimizer.init(state.adapters)
        _, (losses, slopes) = jax.lax.scan(step, carry, None, length=40)
        first = jnp.linalg.norm(slopes["here"][name]["up"][0, 0])
        down = state.adapters["here"][name]["down"][0]
        cosine = direction @ (down / jnp.linalg.norm(down, axis=0, keepdims=True))
        return count, first, losses[0], losses[-1], jnp.max(jnp.abs(cosine))

    keys = jax.random.split(jax.random.key(1), 24)
    out: dict[str, Any] = {"bare": float(loss_fn(host, ef.NoSeeds(), batch))}
    for name in layout.names:
        for directed in (0, 1):
            growth = ef.Growth(
                **layout.arguments,
                policy=ef.policies.never(),
                adapters_at_once=None,
                directed_births=directed,
            )
            run = jax.jit(jax.vmap(partial(live, growth, name)), compiler_options=QUICK)
            out[f"{name} {directed}"] = tuple(np.asarray(leaf) for leaf in run(keys))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_rank", "bottleneck", "gated"])
def test_directed_births_see_more_and_learn_faster(name: str) -> None:
    count, slope, first, last, cosine = planted()[f"{name} 1"]
    none, default_slope, default_first, default_last, default_cosine = planted()[f"{name} 0"]
    assert count.tolist() == [1] * 24
    assert none.tolist() == [0] * 24
    # The identity at birth either way, under `vmap` over states.
    np.testing.assert_allclose(first, planted()["bare"], rtol=1e-6)
    np.testing.assert_allclose(default_first, planted()["bare"], rtol=1e-6)
    assert cosine.min() > 0.97 > default_cosine.max()
    if name == "gated":  # the drawn gate scales what the direction finds: better on the average
        assert slope.mean() > 1.2 * default_slope.mean()
        assert last.mean() < default_last.mean()
        return
    assert slope.min() > default_slope.max()
    assert last.mean() < 0.9 * default_last.mean()
    assert np.mean(last < default_last) > 0.9


# --- inside one program ------------------------------------------------------------------------

X = jax.random.normal(jax.random.key(0), (32, 8))
Y = jnp.sin(3 * X[:, :3])


def loss_fn(params: jax.Array, seeds: Any, batch: Any) -> jax.Array:
    return mean_square(jnp.tanh(seeds.grow("a", batch[0])) @ params, batch[1])


def _quick(directed: int, every: int = 3) -> Any:
    return ef.Growth(
        sites=[ef.site("a", features=8, chunks=4)],
        blueprints={
            "low_rank": ef.blueprints.low_rank(2),
            "paired": ef.blueprints.bottleneck(4, birth="paired"),
        },
        capacity=2,
        policy=ef.policies.periodic(every=every),
        directed_births=directed,
        graft=ef.grafting.linear(2),
        governor=ef.governors.disabled(),
        settings=ef.lifecycle.settings(
            min_steps={Stage.TRAINING: 1, Stage.STABILIZATION: 0, Stage.FINE_TUNING: 1},
            max_steps={Stage.TRAINING: 3, Stage.STABILIZATION: 2, Stage.FINE_TUNING: 4},
            min_contribution=1e3,  # nobody stays: slots and seeds are used again
            embargo_steps=1,
        ),
    )


def test_births_compile_nothing_donate_and_repeat() -> None:
    growth = _quick(2)
    optimizer = ef.optim.per_adapter(standard(optax.adam(1e-2)))
    step = ef.runtime.make_step(growth, loss_fn, optimizer, survey_every=5)
    batches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (10, *leaf.shape)), (X, Y))
    segment = jax.jit(ef.runtime.scan_steps(step), donate_argnums=0)

    def run() -> Any:
        params = jnp.ones((8, 3)) * 0.1
        state = ef.runtime.init(optimizer, params, growth.init(jax.random.key(1)), snapshot_every=7)
        counts = []
        for index in range(8):
            given = state
            state, info = segment(state, batches, (X, Y), None)
            if index:
                assert all(
                    leaf.is_deleted() for leaf in jax.tree.leaves(given.growth_state.directions)
                )
            counts.append(info)
        return state, counts

    first = run()
    with count_compilations() as count:
        second = run()
    assert count.num_compiled == 0
    assert same_bits(first, second)
    directed = sum(int(info.num_directed.sum()) for info in first[1])
    births = sum(
        int(((info.before == Stage.DORMANT) & (info.stage == Stage.GERMINATED)).sum())
        for info in first[1]
    )
    assert 2 < directed <= births


def test_without_directed_births_nothing_is_there() -> None:
    layout = _quick(0).layout
    for directed in (0, 3):
        state = jax.eval_shape(_quick(directed).init, jax.random.key(0))
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.directions))
        # N seeds of F U numbers and their names: whatever the number of chunks.
        assert kept == 4 * directed * (1 + 2 * 2)
        assert (state.directions is None) == (directed == 0)
    many = make_layout(
        sites=[ef.site("a", features=40_000, chunks=20_000)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=4,
    )
    state = jax.eval_shape(ef.Growth(**many.arguments, directed_births=8).init, jax.random.key(0))
    kept = jax.tree.leaves((state.seeds, state.directions))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) < 200 * many.num_seeds
    with pytest.raises(ValueError, match="directed_births must be an int, at least 0, got -1"):
        ef.Growth(**layout.arguments, directed_births=-1)
    with pytest.raises(ValueError, match=r"none of the blueprints \['scale'\] can be born along"):
        ef.Growth(
            sites=[ef.site("a", features=8)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=1,
            directed_births=1,
        )


def test_a_roll_back_forgets() -> None:
    growth = _quick(2)
    params, state = jnp.ones((8, 3)) * 0.1, growth.init(jax.random.key(1))
    state, _ = jax.jit(growth.survey(loss_fn), compiler_options=QUICK)(params, state, (X, Y))
    assert np.all(np.asarray(state.directions[0].seed) >= 0)
    for should in (False, True):
        verdict = Verdict(
            alarm=jnp.int8(Alarm.CALM),
            forbids_germination=jnp.zeros((), bool),
            should_roll_back=jnp.asarray(should),
            is_quarantined=jnp.zeros((4,), bool),
        )
        ring = rollback.init(params, (), state)
        _, _, after, _, _ = rollback.update(growth, ring, params, (), state, verdict)
        assert np.all((np.asarray(after.directions[0].seed) < 0) == should)


# --- neuron pairing ----------------------------------------------------------------------------

ACTIVATIONS: tuple[Literal["relu", "gelu", "silu"], ...] = ("relu", "gelu", "silu")
WIDTHS = [
    (1, 1, 2),
    (130, 33, 34),
    *(pytest.param(of, marks=pytest.mark.slow) for of in [(5, 3, 2), (17, 9, 6), (64, 64, 16)]),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_twins_cancel_to_the_bit(widths: Any, dtype: str) -> None:
    inputs, outputs, width = widths
    spec, mask = AdapterSpec(inputs, outputs, "vector"), jnp.ones((inputs,), bool)
    for activation in ACTIVATIONS:
        blueprint = ef.blueprints.bottleneck(width, activation, birth="paired")
        init = partial(blueprint.init, spec=spec, dtype=jnp.dtype(dtype))
        apply = partial(blueprint.apply, spec=spec, mask=mask)
        params = jax.vmap(init)(jax.random.split(jax.random.key(width), 3))
        x = jnp.asarray(3 * np.random.default_rng(0).standard_normal((3, 7, inputs)), dtype)
        assert np.any(np.asarray(params["up"]) != 0)
        assert same_bits(params["up"][:, : width // 2], -params["up"][:, width // 2 :])
        one = jax.tree.map(lambda leaf: leaf[1], params)
        assert not np.any(jax.jit(jax.vmap(apply))(params, x))
        assert not np.any(jax.jit(apply)(one, x[1]))
        assert not np.any(apply(one, x[1, 0]))


def test_paired_adapters_compute_what_bottlenecks_compute_and_learn_at_once() -> None:
    spec, mask = AdapterSpec(6, 5, "vector"), jnp.ones((6,), bool)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, 6)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((40, 5)), jnp.float32)
    for activation in ACTIVATIONS:
        plain, paired = (
            ef.blueprints.bottleneck(8, activation, birth=birth)
            for birth in ("zero", "paired")  # type: ignore[arg-type]
        )
        newborn = paired.init(jax.random.key(0), spec, jnp.float32)

        def both(of: Any, params: Any) -> Any:
            return jax.vjp(lambda p, x: of.apply(p, x, spec, mask), params, x)

        # The same function and the same derivatives, at birth and anywhere else.
        noise = jax.tree.map(
            lambda leaf: leaf + jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), newborn
        )
        for params in (newborn, noise):
            (r, pull), (want, pull_plain) = both(paired, params), both(plain, params)
            np.testing.assert_allclose(r, want, atol=1e-5)
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), pull(dy), pull_plain(dy)
            )
        # All four parts of the gradient at birth: both twins' `down` and bias, both twins' `up`.
        slopes = both(paired, newborn)[1](dy)[0]
        halves = {
            name: [np.linalg.norm(part) for part in jnp.split(slopes[name], 2, axis=axis)]
            for name, axis in (("down", 1), ("bias", 0), ("up", 0))
        }
        assert min(min(pair) for pair in halves.values()) > 0.1, halves
        np.testing.assert_allclose(slopes["down"][:, :4], -slopes["down"][:, 4:], rtol=1e-4)
        still = plain.init(jax.random.key(0), spec, jnp.float32)
        slopes = both(plain, still)[1](dy)[0]
        assert not np.any(slopes["down"])
        assert not np.any(slopes["bias"])
    ef.blueprints.check(ef.blueprints.bottleneck(width=6, birth="paired"))
    counted = ef.blueprints.bottleneck(4, birth="paired").cost(AdapterSpec(8, 6, "vector"), 1)
    assert counted.parameters == 4 * 8 + 4 + 4 * 6


def test_pairing_needs_an_even_width_and_a_known_name() -> None:
    with pytest.raises(ValueError, match="width must be even for birth='paired', got 5; take 6"):
        ef.blueprints.bottleneck(5, birth="paired")
    with pytest.raises(ValueError, match=r"birth must be one of \('zero', 'paired'\), got 'twin'"):
        ef.blueprints.bottleneck(4, birth="twin")  # type: ignore[arg-type]
