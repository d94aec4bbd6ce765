"""One optimiser an adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import QUICK, make_step, same_bits, standard

import esper_fn as ef
from esper_fn.lifecycle import Stage
from esper_fn.optim import Slots

SLOTS = 3


def _decayed_matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


WARM_UP = optax.linear_schedule(0.0, 0.1, 10)
KINDS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(WARM_UP, weight_decay=0.1, mask=_decayed_matrices),
    "lion": lambda: optax.lion(0.1, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lamb": lambda: optax.lamb(0.1, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(0.1)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=WARM_UP),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, 7), optax.sgd(0.1)),
    "accumulating": lambda: optax.MultiSteps(
        optax.adam(0.1), every_k_schedule=2
    ).gradient_transformation(),
}


def _random(seed: int) -> Any:
    """Adapters of one bank, or gradients of them: a matrix and a vector a slot."""
    rng = np.random.default_rng(seed)
    return {
        "matrix": jnp.asarray(rng.standard_normal((SLOTS, 4, 3)), jnp.float32),
        "vector": jnp.asarray(rng.standard_normal((SLOTS, 3)), jnp.float32),
    }


def _host(seed: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], _random(1000 + seed))


def _banks(bank: Any) -> Any:
    return {"site": {"adapter": bank, "empty": {}}}


def _flags(*is_set: bool) -> jax.Array:
    return jnp.asarray(is_set)


@cache
def _made(kind: str, schedule: Any = "run") -> Any:
    optimizer = ef.optim.per_adapter(standard(KINDS[kind]()), schedule=schedule)

    @partial(jax.jit, compiler_options=QUICK)
    def update(grads: Any, state: Any, params: Any, births: jax.Array, learns: jax.Array) -> Any:
        slots = Slots(generation=births, learns=learns)
        return optimizer.update(
            grads, state, params, slots={"site": {"adapter": slots, "empty": slots}}
        )

    return optimizer, update


NOBODY, ALL = jnp.zeros((3,), jnp.int32), _flags(True, True, True)
ONE_MORE = jnp.asarray([0, 1, 0], jnp.int32)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [*((kind, "run") for kind in KINDS), *((kind, "age") for kind in ("adamw", "injected"))],
)
def test_an_adapter_born_late_is_updated_as_one_born_at_the_start(kind: str, schedule: str) -> None:
    """But for its schedules, which are the run's unless they follow its age."""
    optimizer, update = _made(kind, schedule)
    host, bank = _host(0), _random(0)
    state = optimizer.init((host, _banks(bank)))
    # A long past: every count at 10,000, every moment full of somebody else's gradients.
    aged = state._replace(
        adapters=jax.tree.map(
            lambda leaf: (
                jnp.full_like(leaf, 10_000)
                if jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype != jnp.uint32
                else leaf
            ),
            state.adapters,
        )
    )
    _, aged = update((_host(1), _banks(_random(9))), aged, (host, _banks(bank)), NOBODY, ALL)
    assert not same_bits(aged.adapters, state.adapters)
    young = aged._replace(adapters=state.adapters) if schedule == "run" else state
    for turn in range(4):
        grads, params = (_host(turn), _banks(_random(turn))), (host, _banks(bank))
        (_, late), aged = update(grads, aged, params, ONE_MORE, ALL)
        (_, early), young = update(grads, young, params, NOBODY, ALL)
        rows = [
            jax.tree.map(lambda leaf: leaf[1], updates["site"]["adapter"])
            for updates in (late, early)
        ]
        assert same_bits(*rows)
    own = [jax.tree.map(lambda leaf: leaf[1], state.adapters) for state in (aged, young)]
    assert same_bits(*own)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_frozen_adapter_stands_still_and_keeps_its_optimiser_state(kind: str) -> None:
    optimizer, update = _made(kind)
    host, bank = _host(0), _random(0)
    params = (host, _banks(bank))
    state = optimizer.init(params)
    for turn in range(2):
        _, state = update((_host(turn), _banks(_random(turn))), state, params, NOBODY, ALL)
    learns = _flags(True, False, True)
    after = state
    for turn in (5, 6):  # the run's clock goes on
        grads = (_host(turn), _banks(_random(turn)))
        (_, updates), after = update(grads, after, params, NOBODY, learns)
    for leaf in jax.tree.leaves(updates):
        assert not np.any(leaf[1])  # weight decay included
        if kind != "accumulating":
            assert np.all(np.any(leaf[0]))
    frozen = [jax.tree.map(lambda leaf: leaf[1], s.adapters) for s in (state, after)]
    assert same_bits(*frozen)
    awake = [jax.tree.map(lambda leaf: leaf[0], s.adapters) for s in (state, after)]
    assert not same_bits(*awake)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_host_and_each_adapter_get_what_optax_gives_them_alone(kind: str) -> None:
    optimizer, update = _made(kind)
    plain = standard(KINDS[kind]())
    host, bank = _host(0), _random(0)
    state = optimizer.init((host, _banks(bank)))
    alone = plain.init(host)
    adapter = jax.tree.map(lambda leaf: leaf[2], bank)
    adapter_state = plain.init(adapter)
    step = jax.jit(plain.update, compiler_options=QUICK)
    for turn in range(3):
        grads = (_host(turn), _banks(_random(turn)))
        updates, state = update(grads, state, (host, _banks(bank)), NOBODY, ALL)
        host_update, alone = step(grads[0], alone, host)
        gradient = jax.tree.map(lambda leaf: leaf[2], _random(turn))
        adapter_update, adapter_state = step(gradient, adapter_state, adapter)
        row = jax.tree.map(lambda leaf: leaf[2], updates[1]["site"]["adapter"])
        for got, other in zip(
            jax.tree.leaves((updates[0], row)),
            jax.tree.leaves((host_update, adapter_update)),
            strict=True,
        ):
            np.testing.assert_allclose(got, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["run", "age"])
def test_a_schedule_counts_the_steps_of_the_run_or_those_that_an_adapter_learned(
    schedule: Any,
) -> None:
    optimizer = ef.optim.per_adapter(
        standard(optax.sgd(0.0)), standard(optax.sgd(WARM_UP)), schedule=schedule
    )
    bank = _random(0)
    params = (_host(0), _banks(bank))
    state = optimizer.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    rates = []
    for turn in range(5):
        slots = Slots(
            generation=ONE_MORE if turn >= 3 else NOBODY,
            learns=_flags(True, True, turn % 2 == 0),
        )
        (_, updates), state = optimizer.update(
            ones, state, params, slots={"site": {"adapter": slots, "empty": slots}}
        )
        rates.append([-float(row[0]) for row in updates["site"]["adapter"]["vector"]])
    ages = np.asarray([[0, 0, 0], [1, 1, 0], [2, 2, 1], [3, 0, 0], [4, 1, 2]])
    if schedule == "run":
        ages = np.broadcast_to(np.arange(5).reshape(5, 1), (5, 3))
    learned = np.asarray([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(rates, 0.01 * ages * learned, rtol=1e-5)


def test_a_norm_is_clipped_adapter_by_adapter() -> None:
    clip = standard(optax.chain(optax.clip_by_global_norm(1.0), optax.scale(1.0)))
    optimizer = ef.optim.per_adapter(clip)
    params = (_host(0), _banks(_random(0)))
    size = jnp.asarray([1e-3, 1.0, 1e3]).reshape(-1, 1)
    grads = {
        "matrix": jnp.ones((SLOTS, 4, 3)) * size[..., None],
        "vector": jnp.ones((SLOTS, 3)) * size,
    }
    slots = Slots(generation=NOBODY, learns=ALL)
    (_, updates), _ = optimizer.update(
        (_host(1), _banks(grads)),
        optimizer.init(params),
        params,
        slots={"site": {"adapter": slots, "empty": slots}},
    )
    norms = [
        np.sqrt(sum(np.sum(np.square(leaf[slot])) for leaf in jax.tree.leaves(updates)))
        for slot in range(SLOTS)
    ]
    np.testing.assert_allclose(norms, [1e-3 * 15**0.5, 1.0, 1.0], rtol=1e-5)


def test_extra_arguments_reach_host_and_adapters() -> None:
    def init(params: Any) -> Any:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, *, value: jax.Array, **_: Any) -> Any:
        del params
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), updates), state

    optimizer = ef.optim.per_adapter(optax.GradientTransformationExtraArgs(init, update))
    params = (_host(0), _banks(_random(0)))
    slots = Slots(generation=NOBODY, learns=ALL)
    updates, _ = optimizer.update(
        params,
        optimizer.init(params),
        params,
        slots={"site": {"adapter": slots, "empty": slots}},
        value=jnp.float32(2.5),
    )
    assert all(np.all(np.asarray(leaf) == 2.5) for leaf in jax.tree.leaves(updates))


def test_in_the_real_loop_a_newborn_starts_afresh_and_waits() -> None:
    growth = ef.Growth(
        sites=[ef.site("h", features=6, chunks=2)],
        blueprints={"noop": ef.blueprints.noop(), "low_rank": ef.blueprints.low_rank(2)},
        capacity=1,
        adapters_at_once=None,
        policy=ef.policies.never(),
        settings=ef.lifecycle.settings(
            min_steps={Stage.GERMINATED: 2},
            max_steps={Stage.TRAINING: 30},
            embargo_steps=1,
            train_first=True,
        ),
    )
    optimizer = ef.optim.per_adapter(standard(optax.adamw(0.01)))

    def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(seeds.grow("h", x @ params) - 1))

    step = make_step(growth, loss_fn, optimizer)
    params, x = jnp.eye(6), jnp.ones((3, 6)) * jnp.arange(6.0).reshape(1, 6)
    state = growth.init(jax.random.key(0))
    opt_state = optimizer.init((params, state.adapters))
    assert opt_state.adapters["h"].keys() == {"low_rank"}

    def count() -> int:
        return int(opt_state.adapters["h"]["low_rank"][0].count[0])

    counts, stages = [], []
    orders = {0: ef.commands.germinate(0, "low_rank"), 7: ef.commands.cull(0)}
    orders[8] = ef.commands.germinate(1, "low_rank")
    for turn in range(14):
        commands = growth.commands([orders[turn]] if turn in orders else [], size=1)
        params, state, opt_state, info = step(params, state, opt_state, x, commands)
        counts.append(count())
        stages.append([Stage(int(s)).name for s in info.stage])
    # Born in step 0, waiting in 1 and 2, learning from 4 on; the second one alike from step 8 on.
    assert stages[0][0] == "GERMINATED"
    first = next(i for i, row in enumerate(stages) if row[0] == "TRAINING")
    second = next(i for i, row in enumerate(stages) if row[1] == "TRAINING")
    assert stages[8][1] == "GERMINATED"
    assert counts[: first + 1] == [0] * (first + 1)
    assert counts[first + 1 : 8] == list(range(1, 8 - first))
    assert counts[9 : second + 1] == [0] * (second + 1 - 9)
    assert counts[second + 1 :] == list(range(1, 14 - second))


def test_a_birth_is_noticed_however_many_updates_were_left_out() -> None:
    """As with gradients summed up by hand, or steps that are skipped where a loss overflows."""
    growth = ef.Growth(
        sites=[ef.site("h", features=6, chunks=2)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=1,
        adapters_at_once=None,
        policy=ef.policies.never(),
        settings=ef.lifecycle.settings(
            train_first=True,
            min_steps={Stage.TRAINING: 50},
            max_steps={Stage.TRAINING: 50},
        ),
    )
    optimizer = ef.optim.per_adapter(standard(optax.adam(0.01)))

    def loss_fn(params: Any, seeds: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(seeds.grow("h", x @ params) - 1))

    @partial(jax.jit, compiler_options=QUICK)
    def step(params: Any, state: Any, opt_state: Any, x: Any, commands: Any, learns: Any) -> Any:
        loss, grads, statistics = growth.value_and_grad(loss_fn)(params, state, x)
        pair = (params, state.adapters)

        def update(_: Any) -> Any:
            updates, after = optimizer.update(grads, opt_state, pair, slots=growth.slots(state))
            return optax.apply_updates(pair, updates), after

        (params, adapters), opt_state = jax.lax.cond(
            learns, update, lambda _: (pair, opt_state), None
        )
        state, _ = growth.update(state, adapters, statistics, loss, commands)
        return params, state, opt_state

    params, x = jnp.eye(6), jnp.ones((3, 6)) * jnp.arange(6.0).reshape(1, 6)
    state = growth.init(jax.random.key(0))
    opt_state = optimizer.init((params, state.adapters))
    orders = {
        0: ef.commands.germinate(0, "low_rank"),
        20: ef.commands.cull(0),
        21: ef.commands.germinate(1, "low_rank"),
    }
    counts = []
    for turn in range(35):
        commands = growth.commands([orders[turn]] if turn in orders else [], size=1)
        learns = jnp.bool_(turn < 20 or turn >= 30)
        params, state, opt_state = step(params, state, opt_state, x, commands, learns)
        counts.append(int(opt_state.adapters["h"]["low_rank"][0].count[0]))
    assert counts[19] > 10
    assert counts[30:] == [1, 2, 3, 4, 5]


def test_the_optimiser_state_keeps_its_dtypes() -> None:
    """Moments in bfloat16 and gradients in float32: Optax alone would promote in the first step."""
    optimizer = ef.optim.per_adapter(standard(optax.adam(0.1)))
    banks = _banks(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _random(1)))
    params = (_host(1), banks)
    state = optimizer.init(params)
    slots = {"site": {name: Slots(generation=NOBODY, learns=ALL) for name in ("adapter", "empty")}}
    _, after = optimizer.update((_host(2), _banks(_random(2))), state, params, slots=slots)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    assert not same_bits(after.adapters, state.adapters)


def test_a_state_that_holds_the_parameters_has_its_own_copy() -> None:
    """So that one step may donate both."""
    keeper = optax.GradientTransformation(lambda params: params, lambda g, state, _: (g, state))
    optimizer = ef.optim.per_adapter(keeper)
    params = (_host(1), _banks(_random(1)))
    state = optimizer.init(params)
    donated = jax.jit(lambda params, state: (params, state), donate_argnums=(0, 1))(params, state)
    assert same_bits(donated[1].adapters["site"]["adapter"], donated[0][1]["site"]["adapter"])


def test_init_wants_the_pair() -> None:
    with pytest.raises(TypeError, match=r"init\(\(params, state.adapters\)\)`, got dict"):
        ef.optim.per_adapter(optax.sgd(0.1)).init(_host(1))
