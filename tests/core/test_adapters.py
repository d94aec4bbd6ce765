"""Adapters: how they are born, what may change them, and that a broken one reaches nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, adapter_of, blank, place, same_bits

import esper_fn as ef
from esper_fn._layout import init_adapters, make_layout
from esper_fn.blueprints import AdapterSpec, Cost
from esper_fn.lifecycle import Cause, Stage
from esper_fn.types import Seeds

CHUNKS, WIDTH = 6, 5
BAD = 2  # the seed that is broken on purpose
LIVE = (Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING, Stage.FOSSILIZED)


def _root() -> ef.blueprints.Blueprint:
    """`r = sqrt(|x w|)`: finite where its gradient is not, at `w = 0`."""

    def init(key: Any, spec: AdapterSpec, dtype: Any) -> Any:
        del key
        return {"w": jnp.zeros((spec.inputs,), dtype)}

    def apply(params: Any, x: Any, spec: AdapterSpec, mask: Any) -> Any:
        del spec, mask
        return jnp.sqrt(jnp.abs(x * params["w"].reshape(*(1,) * (x.ndim - 1), -1).astype(x.dtype)))

    def cost(spec: AdapterSpec, positions: int) -> Cost:
        return Cost(parameters=spec.inputs, flops=3 * spec.inputs * positions)

    return ef.blueprints.Blueprint("root", init, apply, cost, ("vector",), can_span=False)


LAYOUT = make_layout(
    sites=[
        ef.site("hidden", features=CHUNKS * WIDTH, chunks=CHUNKS),
        ef.site("over", source_features=CHUNKS * WIDTH, features=9, chunks=CHUNKS),
    ],
    blueprints={"relu": ef.blueprints.bottleneck(3), "root": _root()},
    capacity=CHUNKS,
)


def loss_fn(params: Any, seeds: Seeds, x: jax.Array) -> Any:
    h = x * jnp.broadcast_to(params["scale"], x.shape)
    y = seeds.grow("hidden", h)
    out = seeds.grow("over", jnp.tanh(y) @ params["out"], source=y)
    return jnp.sum(jnp.square(out)), (y, out)


@cache
def setting(at_once: int | None = None) -> Any:
    growth = ef.Growth(
        **LAYOUT.arguments,
        adapters_at_once=at_once,
        policy=ef.policies.never(),
        graft=ef.grafting.linear(100),
        governor=ef.governors.disabled(),
    )
    run = jax.jit(growth.value_and_grad(loss_fn, has_aux=True), compiler_options=QUICK)
    update = jax.jit(growth.update, compiler_options=QUICK)
    rng = np.random.default_rng(0)
    params = {
        "scale": jnp.ones((CHUNKS * WIDTH,)),
        "out": jnp.asarray(rng.standard_normal((CHUNKS * WIDTH, 9)) * 0.3, jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((7, CHUNKS * WIDTH)), jnp.float32)
    return growth, blank(growth), run, update, params, x


def populated(growth: ef.Growth, state: Any, stage: Stage, blueprint: str = "relu") -> Any:
    """Every seed acts; the chosen one of each site is in `stage`."""
    rows = {}
    for seed in range(LAYOUT.num_seeds):
        is_bad = seed in (BAD, CHUNKS + BAD)
        alpha = 0.5 if stage != Stage.TRAINING or not is_bad else 0.0
        name = blueprint if seed == BAD else "relu"
        rows[seed] = (name, stage, alpha) if is_bad else ("relu", Stage.FINE_TUNING, 0.4)
    return place(growth, state, rows)


def with_adapter(state: Any, seed: int, change: Any) -> Any:
    """`change` applied to every parameter of one seed's adapter."""
    site, _, _ = LAYOUT.locate(seed)
    name = LAYOUT.names[int(state.seeds.blueprint[seed])]
    bank = next(
        b
        for b in LAYOUT.tables.banks
        if LAYOUT.sites[b.site].name == site.name and LAYOUT.names[b.blueprint] == name
    )
    slot = int(state.seeds.slot[seed]) - bank.start
    adapters = {site_name: dict(banks) for site_name, banks in state.adapters.items()}
    adapters[site.name][name] = jax.tree.map(
        lambda leaf: leaf.at[slot].set(change(leaf[slot])), adapters[site.name][name]
    )
    return state._replace(adapters=adapters)


def without(state: Any, seeds: tuple[int, ...]) -> Any:
    """The seeds dormant and their slots free."""
    stage = state.seeds.stage.at[jnp.asarray(seeds)].set(Stage.DORMANT)
    owner = jnp.asarray([-1 if o in seeds else o for o in state.owner.tolist()], jnp.int32)
    return state._replace(seeds=state.seeds._replace(stage=stage), owner=owner)


FAULTS = {
    "NaN parameters": ("relu", lambda leaf: jnp.full_like(leaf, jnp.nan)),
    "overflow": ("relu", lambda leaf: jnp.full_like(leaf, 3e30)),
    "infinite gradient": ("root", jnp.zeros_like),
}


@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("stage", LIVE)
def test_a_broken_adapter_reaches_nothing(stage: Stage, fault: str, at_once: int | None) -> None:
    growth, state, run, update, params, x = setting(at_once)
    blueprint, change = FAULTS[fault]
    state = populated(growth, state, stage, blueprint)
    bad = with_adapter(state, BAD, change)
    broken = (BAD,)
    if blueprint == "relu":
        bad, broken = with_adapter(bad, CHUNKS + BAD, change), (BAD, CHUNKS + BAD)

    ((loss, (y, out)), (d_params, d_adapters), statistics) = run(params, bad, x)
    ((_, (y_0, out_0)), (d_params_0, d_adapters_0), statistics_0) = run(
        params, without(bad, broken), x
    )

    if fault == "infinite gradient":  # its output is sound, and acts
        assert np.isfinite(loss)
    else:
        assert same_bits((y, out, d_params), (y_0, out_0, d_params_0))
        for seed in range(LAYOUT.num_seeds):
            if seed not in broken:
                ours = adapter_of(growth, bad, seed, d_adapters)
                assert same_bits(ours, adapter_of(growth, bad, seed, d_adapters_0))
                for now, before in zip(statistics, statistics_0, strict=True):
                    assert same_bits(now[seed], before[seed])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((d_params, d_adapters)))
    for seed in broken:
        assert not any(np.any(leaf) for leaf in adapter_of(growth, bad, seed, d_adapters).values())
    errors = [float(count) for count in statistics.num_errors]
    assert errors == [1.0 if seed in broken else 0.0 for seed in range(LAYOUT.num_seeds)]
    assert all(np.isfinite(channel).all() for channel in statistics)

    # The seed is rolled back in this very step (a fossil, which has no such edge, only counts it).
    after, info = update(bad, bad.adapters, statistics, loss)
    for seed in broken:
        if stage == Stage.FOSSILIZED:
            assert info.stage[seed] == Stage.FOSSILIZED
            assert after.seeds.error_count[seed] == 1
        else:
            assert info.stage[seed] == Stage.ROLLED_BACK
            assert info.cause[seed] == Cause.NON_FINITE
    for seed in set(range(LAYOUT.num_seeds)) - set(broken):
        assert info.stage[seed] == bad.seeds.stage[seed]
        assert after.seeds.error_count[seed] == 0


@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_outputs_that_are_not_finite_are_left_out_entry_by_entry(at_once: int | None) -> None:
    growth, state, run, _, params, x = setting(at_once)
    sound = populated(growth, state, Stage.FINE_TUNING)
    slot = int(sound.seeds.slot[BAD]) - LAYOUT.tables.banks[0].start
    adapters = {site: dict(banks) for site, banks in sound.adapters.items()}
    leaves = dict(adapters["hidden"]["relu"])
    leaves["up"] = leaves["up"].at[slot, :, 0].set(jnp.nan)
    adapters["hidden"]["relu"] = leaves
    broken = sound._replace(adapters=adapters)
    ((_, (clean, _)), _, _) = run(params, sound, x)
    ((_, (y, _)), (d_params, d_adapters), statistics) = run(params, broken, x)
    first = BAD * WIDTH
    rest = np.delete(np.arange(CHUNKS * WIDTH), first)
    assert same_bits(y[:, first], x[:, first])
    assert same_bits(y[:, rest], clean[:, rest])
    assert np.isfinite(d_params["scale"]).all()
    assert not any(np.any(leaf) for leaf in adapter_of(growth, broken, BAD, d_adapters).values())
    assert (statistics.num_errors[BAD], statistics.output_square[BAD]) == (1.0, 0.0)


def test_an_adapter_is_not_blamed_for_what_it_is_fed() -> None:
    growth, state, run, _, params, x = setting()
    state = populated(growth, state, Stage.FINE_TUNING)
    x = x.at[3, BAD * WIDTH].set(jnp.nan)
    ((_, (y, _)), (_, d_adapters), statistics) = run(params, state, x)
    assert np.isnan(y[3, BAD * WIDTH])
    assert not np.any(statistics.num_errors)
    # Its chunk alone is spoilt at the first site; there, its adapter is not taught.
    assert np.isfinite(y[:, : BAD * WIDTH]).all()
    assert np.isfinite(y[:, (BAD + 1) * WIDTH :]).all()
    leaves = adapter_of(growth, state, BAD, d_adapters).values()
    assert not any(np.any(leaf) for leaf in leaves)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(d_adapters))


def moved(state: Any, by: float) -> Any:
    """What a plain optimiser, which knows nothing of seeds, makes of the adapters."""
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(by, leaf.dtype), state.adapters)


def test_only_learning_adapters_take_an_update() -> None:
    growth, state, run, update, params, x = setting()
    stages = list(Stage)
    rows = {seed: ("relu", stages[seed % 11], 0.5) for seed in range(LAYOUT.num_seeds)}
    rows |= {0: ("relu", Stage.STABILIZATION, 0.5), 11: ("relu", Stage.FINE_TUNING, 0.5)}
    state = place(growth, state, rows)
    ((loss, _), _, statistics) = run(params, state, x)
    after, _ = update(state, moved(state, 0.01), statistics, loss)
    learning = {Stage(stage) for stage in range(Stage.TRAINING, Stage.FOSSILIZED + 1)}
    owner = np.asarray(state.owner)
    seen = set()
    for bank in LAYOUT.tables.banks:
        site, name = LAYOUT.sites[bank.site].name, LAYOUT.names[bank.blueprint]
        for slot in range(bank.num_slots):
            old, new = (
                jax.tree.map(lambda leaf, slot=slot: leaf[slot], adapters[site][name])
                for adapters in (state.adapters, after.adapters)
            )
            seed = int(owner[bank.start + slot])
            stage = Stage(rows[seed][1]) if seed >= 0 else None
            seen.add(stage)
            assert same_bits(old, new) == (stage not in learning), (site, slot, stage)
    assert seen >= {None, Stage.GERMINATED, *learning}

    # Those that stand still by the settings keep theirs, and everything else goes as before.
    is_frozen = np.isin(np.arange(11), [Stage.STABILIZATION, Stage.FOSSILIZED])
    limits = state.settings._replace(is_frozen=jnp.asarray(is_frozen))
    still = state._replace(settings=limits)
    frozen, _ = update(still, moved(state, 0.01), statistics, loss)
    for seed in np.unique(owner[owner >= 0]).tolist():
        source = state if is_frozen[rows[seed][1]] else after
        assert same_bits(
            adapter_of(growth, state, seed, frozen.adapters),
            adapter_of(growth, state, seed, source.adapters),
        )


def test_an_update_that_is_not_finite_is_refused_adapter_by_adapter() -> None:
    growth, state, run, update, params, x = setting()
    state = populated(growth, state, Stage.GRAFTING)
    ((loss, _), _, statistics) = run(params, state, x)
    proposed = with_adapter(
        state._replace(adapters=moved(state, 0.01)), BAD, lambda leaf: leaf.at[0].set(jnp.inf)
    )
    after, info = update(state, proposed.adapters, statistics, loss)
    assert info.stage[BAD] == Stage.ROLLED_BACK
    assert info.cause[BAD] == Cause.NON_FINITE
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.adapters))
    other = BAD + 1
    assert info.stage[other] == Stage.FINE_TUNING
    np.testing.assert_array_equal(
        adapter_of(growth, state, other, after.adapters)["down"],
        adapter_of(growth, state, other)["down"] + np.float32(0.01),
    )


def test_births_make_new_identity_adapters_and_leave_all_others() -> None:
    growth, state, run, _, params, x = setting()
    state = without(populated(growth, state, Stage.FINE_TUNING), (BAD,))
    ((loss, _), _, statistics) = run(params, state, x)
    commands = growth.commands([ef.commands.germinate(BAD, "relu")], size=1)
    update = jax.jit(growth.update, compiler_options=QUICK)
    after, info = update(state, state.adapters, statistics, loss, commands)
    assert info.stage[BAD] == Stage.GERMINATED
    # The same inputs and key: the same newborn and everything else, bit for bit (promise 3).
    assert same_bits((after, info), update(state, state.adapters, statistics, loss, commands))
    newborn = adapter_of(growth, after, BAD)
    assert not newborn["up"].any()
    assert newborn["down"].any()
    slot = int(after.seeds.slot[BAD])
    births = np.asarray(after.generation) - np.asarray(state.generation)
    assert births.tolist() == [s == slot for s in range(LAYOUT.num_slots)]
    for seed in range(LAYOUT.num_seeds):
        if seed != BAD:
            assert same_bits(adapter_of(growth, after, seed), adapter_of(growth, state, seed))
    # Another key, another adapter.
    other, _ = jax.jit(growth.update, compiler_options=QUICK)(
        state._replace(key=jax.random.key(99)), state.adapters, statistics, loss, commands
    )
    assert not same_bits(adapter_of(growth, other, BAD)["down"], newborn["down"])


def test_adapters_are_stacked_over_slots_and_differ() -> None:
    adapters = init_adapters(LAYOUT, jax.random.key(0))
    assert set(adapters) == {"hidden", "over"}
    assert set(adapters["over"]) == {"relu"}  # `root` cannot span
    down = np.asarray(adapters["hidden"]["relu"]["down"])
    assert down.shape == (CHUNKS, WIDTH, 3)
    assert len({row.tobytes() for row in down}) == CHUNKS
    assert not np.asarray(adapters["hidden"]["relu"]["up"]).any()
    half = make_layout(
        sites=LAYOUT.sites[:1],
        blueprints={"relu": LAYOUT.blueprints[0]},
        capacity=1,
        dtype=jnp.bfloat16,
    )
    leaves = jax.tree.leaves(
        jax.eval_shape(lambda key: init_adapters(half, key), jax.random.key(0))
    )
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
