"""Segments of steps with one survey each decide as the conditional in each step does."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import policies as P  # noqa: N812 -- short in tables
from esper_fn import runtime
from esper_fn.lifecycle import Stage

EVERY, STEPS, MEMBERS = 4, 12, 3
COUNTED: list[int] = []
QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}
# Adapters are on trial before the last survey, where one of them is taken out.
SHORT = ef.lifecycle.settings(
    min_steps={Stage.STABILIZATION: 1, Stage.EVALUATING: 1}, max_steps={Stage.STABILIZATION: 1}
)
OPTIMIZER = ef.optim.per_adapter(optax.sgd(0.05))


def counted(params: Any, seeds: Any, batch: Any) -> jax.Array:
    # `params` makes it one call for each member under `vmap`.
    jax.debug.callback(lambda flag, _: COUNTED.append(int(flag)), batch[1], params[0, 0])
    return loss_fn(params, seeds, batch)


def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
    x, _ = batch
    h = seeds.grow("h", jnp.tanh(x @ params))
    return jnp.mean(jnp.square(h - jnp.sin(3 * x)))


@cache
def growth() -> ef.Growth:
    # Nothing is asked for before it is surveyed.
    policy = P.chain(P.periodic(every=3, start=1), P.max_total(2))
    return ef.Growth(
        sites=[ef.site("h", features=6, chunks=3)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=3,
        policy=policy,
        settings=SHORT,
        adapters_at_once=None,
        max_ablations=1,
    )


def batches(first: int, count: int) -> Any:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5, 6)).astype(np.float32)
    return x[first : first + count], np.zeros((count,), np.int32)


HELD_OUT = (batches(63, 1)[0][0], np.int32(1))
PARAMS = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)


def start(member: int = 0) -> runtime.TrainState:
    grown = growth().init(jax.random.key(member))
    return runtime.init(OPTIMIZER, (1 + member) * jnp.asarray(PARAMS), grown, snapshot_every=None)


def conditional(loss: Any = loss_fn) -> Any:
    return runtime.scan_steps(runtime.make_step(growth(), loss, OPTIMIZER, survey_every=EVERY))


def segmented(loss: Any = loss_fn) -> Any:
    return runtime.scan_steps(
        runtime.make_step(growth(), loss, OPTIMIZER, survey_every=None),
        survey=runtime.make_survey(growth(), loss),
        survey_every=EVERY,
    )


@cache
def expected() -> Any:
    """The conditional form's infos: two segments and a part of a third, a command at first."""
    run = jax.jit(conditional(), compiler_options=QUICK)
    return run(start(), batches(0, STEPS - 1), HELD_OUT, command())[1]


def command() -> Any:
    return growth().commands([ef.commands.germinate(2, "scale")])


def same(infos: Any, others: Any) -> None:
    np.testing.assert_array_equal(infos.stage, others.stage)
    np.testing.assert_array_equal(infos.request_code, others.request_code)
    np.testing.assert_allclose(infos.loss, others.loss, rtol=1e-5)
    np.testing.assert_allclose(infos.evidence, others.evidence, rtol=1e-3, atol=1e-5)


def test_decisions_are_those_of_the_conditional_form() -> None:
    run = jax.jit(segmented(), compiler_options=QUICK)
    after, infos = run(start(), batches(0, STEPS - 1), HELD_OUT, command())
    same(infos, expected())
    np.testing.assert_array_equal(infos.outcomes.code, expected().outcomes.code)
    assert int(after.growth_state.step) == STEPS - 1
    assert (np.asarray(infos.stage[-1]) > 0).all()  # two by the policy, one by the command


def evaluations(run: Any) -> tuple[Any, int]:
    """What a population's run tells, and how often a member's loss on held-out data was taken."""
    members = jax.tree.map(lambda *rows: jnp.stack(rows), *map(start, range(MEMBERS)))
    population = jax.jit(jax.vmap(run, in_axes=(0, None, None)), compiler_options=QUICK)
    inputs = batches(0, STEPS)
    COUNTED.clear()
    _, infos = jax.block_until_ready(population(members, inputs, HELD_OUT))
    jax.effects_barrier()
    return infos, sum(COUNTED)


def test_under_vmap_a_survey_runs_once_a_segment() -> None:
    infos, num_segmented = evaluations(segmented(counted))
    others, num_conditional = evaluations(conditional(counted))
    same(infos, others)
    # One with the probes and, as long as one of the members has an adapter on trial, one ablation.
    on_trial = np.isin(infos.stage, [Stage.EVALUATING, Stage.FINE_TUNING]).any((0, 2))
    before = np.concatenate([[False], on_trial[:-1]])
    assert 0 < before[::EVERY].sum() < before.sum() < STEPS - 1
    assert num_segmented == MEMBERS * (STEPS // EVERY + before[::EVERY].sum())
    assert num_conditional == MEMBERS * (STEPS + before.sum())


@pytest.mark.slow
def test_fit_decides_the_same_however_long_its_segments_are() -> None:
    runs = []
    for length in (STEPS, 6):  # 6 is no multiple: there the survey stays a conditional
        done = runtime.fit(
            growth(),
            loss_fn,
            OPTIMIZER,
            jnp.asarray(PARAMS),
            batches,
            num_steps=STEPS,
            key=jax.random.key(0),
            survey_batch=HELD_OUT,
            options=runtime.FitOptions(
                survey_every=EVERY, segment_steps=length, snapshot_every=None
            ),
        )
        assert done.num_compiled == 0
        runs.append(done)
    first, second = runs
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-5)
    moves = [[(e["step"], e["seed"], e["to"]) for e in done.events] for done in runs]
    assert moves[0] == moves[1] != []
    assert (first.num_passes, first.survey_flops) == (second.num_passes, second.survey_flops)


def test_a_state_between_two_surveys_keeps_their_steps() -> None:
    """A run that goes on at step 3 is surveyed at steps 4 and 8, in a segment of eight too."""
    run = runtime.compile_fit(growth(), loss_fn, OPTIMIZER, survey_every=EVERY)
    state, _ = run(start(), batches(0, 3), HELD_OUT, command())
    _, infos = run(state, batches(3, 8), HELD_OUT, growth().commands())
    same(infos, jax.tree.map(lambda leaf: leaf[3:], expected()))


def test_a_survey_needs_to_know_how_often() -> None:
    step = runtime.make_step(growth(), loss_fn, OPTIMIZER, survey_every=None)
    survey = runtime.make_survey(growth(), loss_fn)
    for wrong in ({"survey": survey}, {"survey_every": 4}):
        with pytest.raises(ValueError, match=r"survey=.*survey_every="):
            runtime.scan_steps(step, **wrong)  # type: ignore[arg-type]
    for every in (0, True, 2.5):
        with pytest.raises(ValueError, match="survey_every must be an int, at least 1"):
            runtime.scan_steps(step, survey=survey, survey_every=every)  # type: ignore[arg-type]
