"""A quarantine ends by itself, so that a stream whose task changes does not run out of places."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drive import NONE, place, rig, small_layout, strict
from support import QUICK, standard

import esper_fn as ef
from esper_fn.commands import Code, germinate, release, roll_back
from esper_fn.governors import Alarm
from esper_fn.lifecycle import Cause, Gate, Stage

S = Stage


@pytest.fixture(scope="module")
def calm() -> Any:
    """A rig whose only edge out of ROLLED_BACK is time: three steps of it."""
    with strict():
        return rig(small_layout(), rows=2, settings=ef.lifecycle.settings(quarantine_steps=3))


def test_it_ends_after_its_steps(calm: Any) -> None:
    state = place(calm.growth, calm.fresh(), [S.GRAFTING, *[0] * 6])
    state, _ = calm.step(state, [roll_back(0)])
    stages, causes, gates = [], [], []
    for _ in range(5):
        state, info = calm.step(state)
        stages.append(int(state.seeds.stage[0]))
        causes.append(int(info.cause[0]))
        gates.append(int(info.waiting_for[0]))
    assert stages == [S.ROLLED_BACK] * 3 + [S.DORMANT] * 2
    assert causes == [Cause.NONE] * 3 + [Cause.DWELL_LIMIT, Cause.NONE]
    assert gates[0] == Gate.MAX_STEPS
    assert int(state.seeds.slot[0]) == NONE
    state, info = calm.step(state, [germinate(0, "scale")])
    assert int(info.outcomes.code[0]) == Code.DONE


def test_a_release_ends_it_at_once_and_nothing_else_does(calm: Any) -> None:
    state = place(calm.growth, calm.fresh(), [S.ROLLED_BACK] * 2 + [0] * 5)
    state, info = calm.step(state, [release(0), germinate(1, "scale")])
    assert np.asarray(info.outcomes.code).tolist() == [Code.DONE, Code.ILLEGAL_TRANSITION]
    assert np.asarray(state.seeds.stage)[:2].tolist() == [S.DORMANT, S.ROLLED_BACK]


def test_its_length_is_state_and_may_be_for_ever(calm: Any) -> None:
    forever = ef.lifecycle.settings(quarantine_steps=None)
    state = place(
        calm.growth, calm.fresh(), [S.ROLLED_BACK, *[0] * 6], steps_in_stage=100_000
    )._replace(settings=forever)
    compiled = calm.update._cache_size()
    state, _ = calm.step(state)
    assert int(state.seeds.stage[0]) == S.ROLLED_BACK
    state, _ = calm.step(state._replace(settings=calm.growth.settings))
    assert int(state.seeds.stage[0]) == S.DORMANT
    assert calm.update._cache_size() == max(compiled, 1)


PHASE, PHASES = 1000, 3


def test_adapters_come_back_in_a_stream_whose_task_changes() -> None:
    """Each change is taken for a divergence at first, and each time growth goes on."""
    growth = ef.Growth(
        sites=[ef.site("h", features=4, chunks=4)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=4,
        policy=ef.policies.periodic(every=5, score="gradient", count=4),
        graft=ef.grafting.linear(20),
        # Nothing is surveyed, so that an adapter goes on acting until its task is gone.
        settings=ef.lifecycle.settings(max_steps={S.EVALUATING: 10_000}),
        adapters_at_once=None,
    )

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        x, level = batch
        return level + 1e-3 * jnp.mean(jnp.square(seeds.grow("h", x) - params))

    optimizer = ef.optim.per_adapter(standard(optax.sgd(0.1)))
    step = ef.runtime.make_step(growth, loss_fn, optimizer, survey_every=None)
    run = jax.jit(ef.runtime.scan_steps(step), compiler_options=QUICK)
    steps = np.arange(PHASE * PHASES)
    x = np.random.default_rng(0).standard_normal((steps.size, 16, 4)).astype(np.float32)
    level = (10.0 ** (steps // PHASE)).astype(np.float32)
    grown = growth.init(jax.random.key(0))
    state = ef.runtime.init(optimizer, jnp.float32(0.5), grown, snapshot_every=None)
    state, infos = run(state, (x, level), None)

    alarms = np.flatnonzero(np.asarray(infos.verdict.alarm) == Alarm.DIVERGENCE)
    assert (alarms // PHASE).tolist() == [1, 2]
    stage = np.asarray(infos.stage)
    for alarm in alarms:
        out = np.flatnonzero(stage[alarm] == S.ROLLED_BACK)
        assert out.size
        # Default settings: 500 steps later they may grow again, and do.
        assert (stage[alarm : alarm + 500, out] == S.ROLLED_BACK).all()
        again = stage[alarm + 501 : alarm + 520, out]
        assert not (again == S.ROLLED_BACK).any()
        assert (again == S.GERMINATED).any(axis=0).all()
    assert int(infos.num_live[-1]) == 4
