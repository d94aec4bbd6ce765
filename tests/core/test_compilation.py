"""No stage change, birth, removal, command or new threshold compiles anything."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import make_step, mean_square, standard

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn.lifecycle import Stage
from esper_fn.runtime import count_compilations
from esper_fn.types import Seeds

X = jax.random.normal(jax.random.key(0), (16, 6))
Y = jnp.sin(3 * X[:, :3])


def loss_fn(params: jax.Array, seeds: Seeds, batch: Any) -> jax.Array:
    x, y = batch
    return mean_square(seeds.grow("a", x) @ params, y)


def test_a_run_with_every_kind_of_command_compiles_nothing_after_the_first_step() -> None:
    growth = ef.Growth(
        sites=[ef.site("a", features=6, chunks=6)],
        blueprints={
            "low_rank": ef.blueprints.low_rank(1),
            "scale": ef.blueprints.scale_shift(),
        },
        capacity=6,
        policy=ef.policies.chain(ef.policies.periodic(every=7), ef.policies.max_concurrent(2)),
        graft=(ef.grafting.linear(3), ef.grafting.adaptive(3)),
        governor=ef.governors.disabled(),
        settings=ef.lifecycle.settings(
            min_steps={Stage.TRAINING: 2, Stage.STABILIZATION: 0, Stage.FINE_TUNING: 2},
            max_steps={Stage.TRAINING: 4, Stage.STABILIZATION: 2, Stage.FINE_TUNING: 9},
            embargo_steps=2,
            train_first=True,
        ),
    )
    optimizer = ef.optim.per_adapter(standard(optax.adamw(1e-2)))
    params = jnp.ones((6, 3)) * 0.1
    state = growth.init(jax.random.key(1))
    opt_state = optimizer.init((params, state.adapters))
    step = make_step(growth, loss_fn, optimizer)
    survey = jax.jit(growth.survey(loss_fn))

    script: dict[int, list[cmd.Command]] = {
        2: [cmd.germinate(5, "low_rank", "adaptive"), cmd.germinate(4, "scale")],
        3: [cmd.cancel(4)],
        4: [cmd.pause_seed(5), cmd.set_graft(5, "linear")],
        6: [cmd.resume_seed(5)],
        7: [cmd.transition(5, Stage.GRAFTING)],
        8: [cmd.roll_back(5), cmd.cull(3)],
        9: [cmd.release(5), cmd.germinate(0, "scale"), cmd.germinate(1, "scale")],
        12: [cmd.cull(0)],
    }
    asked = {kind for batch in script.values() for kind in (command.kind for command in batch)}
    assert asked == set(cmd.Kind) - {cmd.Kind.NONE}

    def one(index: int) -> set[int]:
        nonlocal params, state, opt_state
        commands = growth.commands(script.get(index, ()))
        params, state, opt_state, info = step(params, state, opt_state, (X, Y), commands)
        if index % 3 == 0:
            state, _ = survey(params, state, (X, Y))
        return set(np.asarray(info.stage).tolist())

    seen = one(0)
    with count_compilations() as count:
        for index in range(1, 60):
            seen |= one(index)
    reached = {stage.name for stage in Stage} - {Stage(value).name for value in seen}
    assert reached == set(), f"the run never reached {reached}"
    assert count.num_compiled == 0


def test_the_counter_counts() -> None:
    with count_compilations() as count:
        jax.jit(lambda x: x * 2 + 17)(np.ones(5, np.float32))
    assert count.num_compiled >= 1
    with count_compilations() as none:
        pass
    assert none.num_compiled == 0


def test_new_thresholds_and_numbers_compile_nothing() -> None:
    growth = ef.Growth(
        sites=[ef.site("a", features=6, chunks=2)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=1,
        policy=ef.policies.periodic(every=5),
        adapters_at_once=None,
    )
    optimizer = ef.optim.per_adapter(standard(optax.sgd(1e-2)))
    params = jnp.ones((6, 3)) * 0.1
    state = growth.init(jax.random.key(1))
    opt_state = optimizer.init((params, state.adapters))
    step = make_step(growth, loss_fn, optimizer)
    none = growth.commands()
    other = ef.lifecycle.settings(max_training=1, min_contribution=0.5)
    tuned = (ef.grafting.linear(7).init(growth.layout.num_seeds),)
    rival = ef.policies.periodic(every=9, score="random").init(growth.layout)
    params, state, opt_state, _ = step(params, state, opt_state, (X, Y), none)
    with count_compilations() as count:
        state = state._replace(settings=other, grafts=tuned, policy=rival)
        step(params, state, opt_state, (X, Y), none)
    assert count.num_compiled == 0


def test_temporaries_follow_the_live_adapters_and_not_the_capacity() -> None:
    """Promise 7; computing every slot at once is what the loop is held against."""

    def temporaries(capacity: int, at_once: int | None) -> int:
        growth = ef.Growth(
            sites=[ef.site("hidden", features=64, chunks=64)],
            blueprints={"bottleneck": ef.blueprints.bottleneck(width=8)},
            capacity=capacity,
            adapters_at_once=at_once,
        )

        def loss_fn(params: Any, seeds: Any, x: Any) -> Any:
            return jnp.mean(jnp.square(seeds.grow("hidden", x * params)))

        run = jax.jit(growth.value_and_grad(loss_fn))
        state = growth.init(jax.random.key(0))
        program = run.lower(jnp.ones((1, 64)), state, jnp.ones((512, 64))).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    assert temporaries(64, 1) < 1.2 * temporaries(4, 1)
    assert temporaries(64, None) > 3 * temporaries(4, None)
