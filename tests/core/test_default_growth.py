"""Growth as it comes: adapters born and acting at once, judged by surveys, never too loud."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drive import strict
from support import QUICK, mean_square, same_bits, standard

import esper_fn as ef
from esper_fn import runtime
from esper_fn.lifecycle import Cause, Stage

WIDTH, CHUNKS = 8, 2

# --- a default run -------------------------------------------------------------------------------


def batch() -> tuple[jax.Array, jax.Array]:
    """What a host with an adapter in both chunks could compute."""
    rng = np.random.default_rng(0)
    x, first, last, inner = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((64, 5), (5, WIDTH), (WIDTH, 3), (WIDTH, WIDTH))
    )
    h = jnp.tanh(x @ first)
    half = WIDTH // CHUNKS
    inner = inner.at[:half, half:].set(0.0).at[half:, :half].set(0.0)
    return x, (h + jnp.sin(2 * h @ inner)) @ last


def host_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {
        "first": jnp.asarray(rng.standard_normal((5, WIDTH)) * 0.5, jnp.float32),
        "last": jnp.asarray(rng.standard_normal((WIDTH, 3)) * 0.3, jnp.float32),
    }


def host_loss(params: Any, seeds: Any, data: Any) -> jax.Array:
    x, y = data
    return mean_square(seeds.grow("h", jnp.tanh(x @ params["first"])) @ params["last"], y)


class Run(NamedTuple):
    """A run by `make_step`, nothing set but what a layout needs."""

    growth: ef.Growth
    first: Any
    run: Any


@cache
def default(survey_every: int | None) -> Run:
    with strict():
        growth = ef.Growth(
            sites=[ef.site("h", features=WIDTH, chunks=CHUNKS)],
            blueprints={"bottleneck": ef.blueprints.bottleneck(4)},
            capacity=CHUNKS,
        )
        optimizer = ef.optim.per_adapter(standard(optax.adam(1e-2)))
        first = runtime.init(optimizer, host_params(), growth.init(jax.random.key(0)))
        step = runtime.make_step(growth, host_loss, optimizer, survey_every=survey_every)

        @partial(jax.jit, static_argnums=1, compiler_options=QUICK)
        def run(state: Any, num_steps: int) -> Any:
            batches = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (num_steps, *leaf.shape)), batch()
            )
            return runtime.scan_steps(step)(state, batches, batch())

    return Run(growth, first, run)


def stages_of(infos: Any, seed: int) -> list[tuple[Stage, Cause, int]]:
    """`(stage entered, cause, step)` of one seed."""
    stage, cause = np.asarray(infos.stage)[:, seed], np.asarray(infos.cause)[:, seed]
    changed = np.flatnonzero(stage != np.asarray(infos.before)[:, seed])
    return [(Stage(stage[t]), Cause(cause[t]), int(t)) for t in changed]


WAY = [
    Stage.GERMINATED,
    Stage.GRAFTING,
    Stage.STABILIZATION,
    Stage.EVALUATING,
    Stage.FINE_TUNING,
    Stage.FOSSILIZED,
]


def test_with_nothing_set_adapters_are_born_at_once_and_kept_by_what_surveys_say() -> None:
    made = default(survey_every=25)
    _, infos = made.run(made.first, 400)
    assert np.asarray(infos.stage)[0].tolist() == [Stage.GERMINATED] * CHUNKS
    for seed in range(CHUNKS):
        told = stages_of(infos, seed)
        assert [stage for stage, _, _ in told] == WAY
        causes = {stage: cause for stage, cause, _ in told}
        assert causes[Stage.GERMINATED] == Cause.POLICY
        for stage in (Stage.GRAFTING, Stage.STABILIZATION, Stage.FINE_TUNING, Stage.FOSSILIZED):
            assert causes[stage] == Cause.GATE, stage
        # What the surveys measured was there when the gate opened.
        kept = told[-1][-1]
        assert bool(np.asarray(infos.is_measured)[kept, seed])
        assert np.asarray(infos.evidence)[kept, seed] > 0
    alpha, stage = np.asarray(infos.alpha), np.asarray(infos.stage)
    # Never a step in which an adapter acts in part, and none in which it learns without acting.
    assert set(np.unique(alpha[stage >= Stage.GRAFTING])) == {1.0}
    assert not (stage == Stage.TRAINING).any()
    losses = np.asarray(infos.loss)
    assert losses[-1] < 0.15 * losses[0]


def test_what_no_survey_measures_is_kept() -> None:
    made = default(survey_every=None)
    after, infos = made.run(made.first, 1200)
    for seed in range(CHUNKS):
        told = stages_of(infos, seed)
        assert [stage for stage, _, _ in told] == WAY
        causes = {stage: cause for stage, cause, _ in told}
        assert causes[Stage.FINE_TUNING] == causes[Stage.FOSSILIZED] == Cause.DWELL_LIMIT
        assert made.growth.seed(after.growth_state, seed).contribution is None
        assert made.growth.seed(after.growth_state, seed).potential is None


def test_an_adapter_acts_from_the_first_step_in_which_it_learns_and_is_the_identity_there() -> None:
    made = default(survey_every=25)
    growth = made.growth
    grads = jax.jit(growth.value_and_grad(host_loss))
    fresh, state, params = made.first.growth_state, made.first, host_params()
    stages = []
    while not stages or Stage.GRAFTING not in stages[-1]:
        assert len(stages) < 4
        state, infos = made.run(state, 1)
        stages.append(np.asarray(infos.stage)[0].tolist())
        learns = np.asarray(growth.slots(state.growth_state)["h"]["bottleneck"].learns)
        assert (np.asarray(state.growth_state.seeds.alpha) == 1).tolist() == learns.tolist()
    assert stages == [[Stage.GERMINATED] * CHUNKS] * (len(stages) - 1) + [[Stage.GRAFTING] * CHUNKS]
    # The same host without and with its newborn adapters, in one program.
    loss, (d_params, d_adapters), statistics = grads(params, state.growth_state, batch())
    bare, (d_bare, _), _ = grads(params, fresh, batch())
    assert same_bits(loss, bare)
    for name in params:
        np.testing.assert_array_equal(d_params[name], d_bare[name])
    assert np.asarray(statistics.num_live).tolist() == [1.0] * CHUNKS
    assert not np.any(statistics.output_square)
    assert np.any(np.asarray(d_adapters["h"]["bottleneck"]["up"]), axis=(1, 2)).all()
    after, _ = made.run(state, 1)
    up, newborn = (
        np.asarray(of.growth_state.adapters["h"]["bottleneck"]["up"]) for of in (after, state)
    )
    assert not newborn.any()
    assert up.any(axis=(1, 2)).all()


# --- damping -------------------------------------------------------------------------------------

ROWS, FEATURES = 64, 12
TRUST = 0.1


def linear_task() -> Any:
    """A frozen linear host that misses as much as it knows."""
    rng = np.random.default_rng(2)
    x, known, missing = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((ROWS, FEATURES), (FEATURES, 4), (FEATURES, 4))
    )
    return known, (x, x @ (known + missing))


class Overshoot(NamedTuple):
    share: np.ndarray
    """Of each adapter's output in its chunk, in the last step behind the host."""
    before: float
    """The loss there."""
    after: float
    """The loss of the first step in which all act."""


@cache
def trained_first(chunks: int) -> Any:
    with strict():
        growth = ef.Growth(
            sites=[ef.site("x", features=FEATURES, chunks=chunks)],
            blueprints={"low_rank": ef.blueprints.low_rank(2)},
            capacity=chunks,
            graft=ef.grafting.linear(1),
            governor=ef.governors.disabled(),
            settings=ef.lifecycle.settings(
                train_first=True, min_steps={Stage.TRAINING: 100}, trust=TRUST
            ),
        )
        optimizer = ef.optim.per_adapter(standard(optax.sgd(0.0)), standard(optax.adam(0.05)))
        known, data = linear_task()

        def loss_fn(params: Any, seeds: Any, data: Any) -> jax.Array:
            return mean_square(seeds.grow("x", data[0]) @ params, data[1])

        grads = growth.value_and_grad(loss_fn)

        @partial(jax.jit, compiler_options=QUICK)
        def run(state: Any) -> Any:
            def step(carry: Any, _: Any) -> Any:
                state, opt_state = carry
                loss, gradients, statistics = grads(known, state, data)
                updates, opt_state = optimizer.update(
                    gradients, opt_state, (known, state.adapters), slots=growth.slots(state)
                )
                _, adapters = optax.apply_updates((known, state.adapters), updates)
                share = jnp.sqrt(statistics.output_square / statistics.square)
                state, info = growth.update(state, adapters, statistics, loss)
                return (state, opt_state), (loss, info.before, share)

            opt_state = optimizer.init((known, state.adapters))
            return jax.lax.scan(step, (state, opt_state), None, length=200)[1]

        state = growth.init(jax.random.key(0))
    return state, run


def overshoot(chunks: int, trust: float) -> Overshoot:
    state, run = trained_first(chunks)
    with strict():
        state = state._replace(settings=state.settings._replace(trust=jnp.float32(trust)))
        losses, stage, share = (np.asarray(leaf) for leaf in run(state))
    trains, acts = stage == Stage.TRAINING, (stage >= Stage.GRAFTING) & (stage <= 7)
    assert trains.any(axis=0).all()
    assert acts.any(axis=0).all()
    last = int(np.flatnonzero(trains.any(axis=1))[-1])
    assert same_bits(losses[: last + 1], np.full((last + 1,), losses[0]))  # the host is unmoved
    assert acts[last + 1].all()
    return Overshoot(share[last], float(losses[last]), float(losses[last + 1]))


@pytest.mark.parametrize("chunks", [1, 4])
def test_an_adapter_that_learns_behind_the_host_does_not_overshoot(chunks: int) -> None:
    damped = overshoot(chunks, TRUST)
    assert (damped.share < 1.25 * TRUST).all()
    assert (damped.share > 0.25 * TRUST).all()  # yet it learned
    assert damped.after < damped.before
    # A host that does not move tells nothing of the size to stop at.
    loose = overshoot(chunks, 1e9)
    assert (loose.share > 10 * TRUST).all()
    assert loose.after > 3 * loose.before


SITES = (
    ef.site("here", features=6, chunks=3),
    ef.site("across", source_features=6, features=5, chunks=3),
)
RATES = np.asarray([0.7, 0.0, 2.5, 0.4, 1.3, 0.0], np.float32)
"""`telemetry.gradient_scale` of each seed; 0 is unknown."""


@cache
def weighed(at_once: int | None) -> Any:
    with strict():
        growth = ef.Growth(
            sites=list(SITES),
            blueprints={"silu": ef.blueprints.bottleneck(3, activation="silu")},
            capacity=3,
            adapters_at_once=at_once,
            settings=ef.lifecycle.settings(train_first=True, trust=0.2),
        )

        def loss_fn(inputs: Any, seeds: Any, weights: Any) -> Any:
            x, v = inputs
            y = seeds.grow("here", x)
            z = seeds.grow("across", v, source=x)
            return jnp.sum(y * weights[0]) + jnp.sum(z * weights[1]), (y, z)

        run = jax.jit(growth.value_and_grad(loss_fn, has_aux=True), compiler_options=QUICK)
        rng = np.random.default_rng(4)
        x, v, wx, wv = (
            jnp.asarray(rng.standard_normal((7, width)), jnp.float32) for width in (6, 5, 6, 5)
        )
        state = growth.init(jax.random.key(1))
        noise = np.random.default_rng(5)
        adapters = jax.tree.map(
            lambda leaf: jnp.asarray(noise.standard_normal(leaf.shape) * 0.5, leaf.dtype),
            state.adapters,
        )
        state = state._replace(adapters=adapters, owner=jnp.arange(6, dtype=jnp.int32))
    return growth, state, run, ((x, v), (wx, wv))


def in_stage(state: Any, stage: Stage, alpha: float) -> Any:
    full = jnp.full((6,), stage, jnp.int8)
    telemetry = state.seeds.telemetry._replace(gradient_scale=jnp.asarray(RATES))
    return state._replace(
        seeds=state.seeds._replace(
            stage=full,
            alpha=jnp.full((6,), alpha, jnp.float32),
            slot=jnp.arange(6, dtype=jnp.int32),
            blueprint=jnp.zeros((6,), jnp.int8),
            telemetry=telemetry,
        )
    )


def silu_adapter(params: dict[str, np.ndarray], u: np.ndarray, slope: Any) -> Any:
    """`r`, and `(dr/dtheta)^T slope(r)` by hand in float64."""
    hidden = u @ params["down"] + params["bias"]
    gate = 1 / (1 + np.exp(-hidden))
    active = hidden * gate
    r = active @ params["up"]
    dr = slope(r)
    d_hidden = (dr @ params["up"].T) * (gate * (1 + hidden * (1 - gate)))
    return r, {"down": u.T @ d_hidden, "bias": d_hidden.sum(axis=0), "up": active.T @ dr}


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.GRAFTING, Stage.FOSSILIZED])
def test_the_gradient_of_a_damped_adapter(stage: Stage, at_once: int | None) -> None:
    """`(dr/dtheta)^T (dy + damping r)` with `damping = scale / trust`, where it does not act."""
    _, state, run, ((x, v), weights) = weighed(at_once)
    state = in_stage(state, stage, 0.0 if stage == Stage.TRAINING else 0.5)
    ((_, (y, z)), (d_inputs, d_adapters), statistics) = run((x, v), state, weights)
    if stage == Stage.TRAINING:  # behind the host, to the bit
        assert same_bits((y, z), (x, v))
        assert same_bits(d_inputs, weights)
    seed = 0
    for place, written, dy in zip(SITES, (6, 5), weights, strict=True):
        edges = np.cumsum([0, *place.target.sizes])
        assert edges[-1] == written
        for chunk in range(place.chunks):
            read = slice(2 * chunk, 2 * chunk + 2)
            wrote = slice(edges[chunk], edges[chunk + 1])
            width = wrote.stop - wrote.start
            bank = state.adapters[place.name]["silu"]
            adapter = {name: np.asarray(leaf[chunk], np.float64) for name, leaf in bank.items()}
            adapter["up"] = adapter["up"][:, :width]
            damping = RATES[seed] / 0.2 if stage == Stage.TRAINING else 0.0
            u, slope = np.asarray(x, np.float64)[:, read], np.asarray(dy, np.float64)[:, wrote]
            r, want = silu_adapter(adapter, u, lambda r, d=damping, s=slope: s + d * r)
            for name, leaf in want.items():
                got = np.asarray(d_adapters[place.name]["silu"][name][chunk])
                got = got[:, :width] if name == "up" else got
                np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-4, err_msg=name)
            # What is measured is the adapter's worth to the host, which no damping changes.
            np.testing.assert_allclose(statistics.utility[seed], -np.sum(slope * r), rtol=1e-4)
            seed += 1


def test_the_scale_of_damping_is_measured() -> None:
    growth, _, run, ((x, v), weights) = weighed(None)
    fresh = growth.init(jax.random.key(2))
    ((loss, _), _, statistics) = run((x, v), fresh, weights)
    after, _ = jax.jit(growth.update, compiler_options=QUICK)(
        fresh, fresh.adapters, statistics, loss
    )
    edges = {"here": [0, 2, 4, 6], "across": [0, 2, 4, 5]}
    want = [
        np.linalg.norm(dy[:, first:last]) / np.linalg.norm(base[:, first:last])
        for name, base, dy in (("here", x, weights[0]), ("across", v, weights[1]))
        for first, last in zip(edges[name][:-1], edges[name][1:], strict=True)
    ]
    np.testing.assert_allclose(after.seeds.telemetry.gradient_scale, want, rtol=1e-5)


# --- the clock of the adapters
# ---------------------------------------------------------------------

COSINE = optax.cosine_decay_schedule(0.1, 10)
BANKS = {"site": {"adapter": {"w": jnp.zeros((2, 3))}}}
HOST = {"w": jnp.zeros((3,))}
ONES = jax.tree.map(jnp.ones_like, (HOST, BANKS))
BIRTH = 6


def rates(
    optimizer: Any, *, change: Any = None, values: Any = None, params: Any = (HOST, BANKS)
) -> np.ndarray:
    """`[steps, 3]`: what host, old adapter and one born in step `BIRTH` subtract of a gradient
    1."""
    state = optimizer.init(params)
    told = []
    update = jax.jit(optimizer.update, compiler_options=QUICK)
    for turn in range(10):
        slots = ef.optim.Slots(
            generation=jnp.asarray([1, int(turn >= BIRTH)], jnp.int32),
            learns=jnp.asarray([True, turn >= BIRTH]),
        )
        if change is not None:
            state = change(turn, state)
        extra = {} if values is None else {"value": jnp.float32(values[turn])}
        (host, banks), state = update(
            ONES, state, params, slots={"site": {"adapter": slots}}, **extra
        )
        row = banks["site"]["adapter"]["w"][:, 0]
        told.append([-float(host["w"][0]), *(-float(one) for one in row)])
    return np.asarray(told)


LATE = np.arange(10) >= BIRTH
RUN_CLOCK = np.asarray([float(COSINE(turn)) for turn in range(10)])


def test_an_adapter_born_late_learns_at_the_rate_of_the_run() -> None:
    told = rates(ef.optim.per_adapter(standard(optax.sgd(COSINE))))
    np.testing.assert_allclose(told.T, [RUN_CLOCK, RUN_CLOCK, RUN_CLOCK * LATE], rtol=1e-5)


def test_or_at_the_rate_of_its_age() -> None:
    told = rates(ef.optim.per_adapter(standard(optax.sgd(COSINE)), schedule="age"))
    own = np.concatenate([np.zeros(BIRTH), RUN_CLOCK[: 10 - BIRTH]])
    np.testing.assert_allclose(told.T, [RUN_CLOCK, RUN_CLOCK, own], rtol=1e-5)


def test_adapters_with_their_own_transformation_follow_the_run_too() -> None:
    told = rates(ef.optim.per_adapter(standard(optax.sgd(0.01)), standard(optax.sgd(COSINE))))
    np.testing.assert_allclose(told.T, [[0.01] * 10, RUN_CLOCK, RUN_CLOCK * LATE], rtol=1e-5)


def test_schedules_inside_injected_transformations_and_of_weight_decay_follow_the_run() -> None:
    def made(scale: float) -> Any:
        return optax.chain(
            optax.add_decayed_weights(COSINE), optax.sgd(lambda count: scale * COSINE(count))
        )

    plain = rates(ef.optim.per_adapter(standard(optax.sgd(COSINE))))
    optimizer = ef.optim.per_adapter(standard(optax.inject_hyperparams(made)(scale=1.0)))
    inside = rates(optimizer, params=ONES)
    np.testing.assert_allclose(inside[BIRTH:, 2], inside[BIRTH:, 1], rtol=1e-5)
    assert (inside[BIRTH:, 2] != plain[BIRTH:, 2]).any()  # the weights do decay


def test_adapters_take_over_what_is_injected_into_the_host() -> None:
    def change(turn: int, state: Any) -> Any:
        if turn not in (3, 7):
            return state
        rate = jnp.float32(0.5 if turn == 3 else 0.25)
        hyper = {**state.host.hyperparams, "learning_rate": rate}
        return state._replace(host=state.host._replace(hyperparams=hyper))

    made = standard(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    want = np.asarray([0.1] * 3 + [0.5] * 4 + [0.25] * 3)
    told = rates(ef.optim.per_adapter(made), change=change)
    np.testing.assert_allclose(told.T, [want, want, want * LATE], rtol=1e-5)
    told = rates(ef.optim.per_adapter(made, schedule="age"), change=change)
    np.testing.assert_allclose(told.T, [want, [0.1] * 10, 0.1 * LATE], rtol=1e-5)


def test_adapters_follow_the_reduction_on_a_plateau() -> None:
    made = standard(
        optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, cooldown=0)
        )
    )
    told = rates(ef.optim.per_adapter(made), values=[1.0] * 10)
    assert told[0, 0] > 1.9 * told[BIRTH, 0] > 0  # it was reduced before the late one was born
    np.testing.assert_allclose(told[:, 1], told[:, 0], rtol=1e-5)
    np.testing.assert_allclose(told[:, 2], told[:, 0] * LATE, rtol=1e-5)
