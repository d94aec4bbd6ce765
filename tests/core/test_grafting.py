"""The six strategies: each rule alone, and all six side by side in the same driven run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import calm_track, limits, place, reading, rig, silent, strict
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.commands import set_graft
from esper_fn.errors import UnknownNameError
from esper_fn.grafting import ROUNDING, Evidence, names, ramp, start_memory
from esper_fn.lifecycle import Gate, Stage

NAMES = ("linear", "drift_controlled", "momentum", "adaptive", "stability", "grad_norm_gated")
MONOTONE = ("linear", "drift_controlled", "momentum", "grad_norm_gated")
NUM_STEPS = 50
LARGEST = dict.fromkeys(NAMES, 1 / NUM_STEPS) | dict.fromkeys(
    ("momentum", "adaptive"), 3 / NUM_STEPS
)


# --- each rule alone -----------------------------------------------------------------------------


def evidence(size: int = 1, **told: Any) -> Evidence:
    usual = {
        "is_spike": False,
        "loss_trend": 0.0,
        "drift": 0.0,
        "gradient_ratio": 1.0,
        "stability": 1.0,
        **told,
    }
    return Evidence(**{name: jnp.full((size,), value) for name, value in usual.items()})


def run(graft: Any, steps: list[dict[str, Any]], alpha: float = 0.0) -> list[float]:
    """Alphas of one seed that starts with the strategy's memory."""
    memory, now = start_memory((graft,), jnp.zeros((1,), jnp.int8)), jnp.full((1,), alpha)
    update = jax.jit(graft.update)
    told = []
    for step in steps:
        now, memory = update(graft.hyper, memory, now, evidence(**step))
        told.append(float(now[0]))
    return told


def test_names_and_get() -> None:
    assert names() == NAMES
    for name in NAMES:
        graft = ef.grafting.get(name, 7)
        assert graft.name == name
        assert float(graft.max_step) == pytest.approx(LARGEST[name] * NUM_STEPS / 7)
    with pytest.raises(UnknownNameError, match=r"'cubic'.*adaptive, drift_controlled"):
        ef.grafting.get("cubic")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 64, 100, 333, 1000])
def test_linear_ends_at_exactly_one_after_its_steps(num_steps: int) -> None:
    graft = ef.grafting.linear(num_steps)

    def adapter(carry: Any, _: Any) -> Any:
        alpha, memory = graft.update(graft.hyper, carry[1], carry[0], evidence())
        return (alpha, memory), alpha[0]

    start = (jnp.zeros((1,)), jnp.zeros((1, 4)))
    told = np.asarray(jax.lax.scan(adapter, start, length=num_steps)[1])
    assert told[-1] == 1.0
    assert (told[:-1] < 1.0).all()
    np.testing.assert_allclose(told, np.arange(1, num_steps + 1) / num_steps, atol=1e-4)


def test_drift_controlled_stands_still_while_the_adapter_drifts() -> None:
    graft = ef.grafting.drift_controlled(10, max_drift=0.5)
    told = run(graft, [{}, {"drift": 0.5}, {"drift": 0.51}, {"drift": 9.0}, {}])
    assert told == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.3])


def test_momentum_speeds_up_while_the_loss_falls() -> None:
    graft = ef.grafting.momentum(100, gain=1.0, max_speed=3.0)
    falls, rises = {"loss_trend": -0.1}, {"loss_trend": 0.1}
    told = run(
        graft, [falls, falls, falls, rises, rises, falls, {"is_spike": True, **falls}, falls]
    )
    # Speeds 2, 3 (capped), 3, 1.5, 1, 2, 1 (spike), 2.
    assert np.diff([0.0, *told]) * 100 == pytest.approx([2, 3, 3, 1.5, 1, 2, 1, 2], rel=1e-4)


def test_stability_slows_steps_back_holds_and_goes_on() -> None:
    graft = ef.grafting.stability(10, hold_steps=2, back_steps=3)
    steps = [{}, {"stability": 0.5}, {"stability": 0.0}, {}, {"is_spike": True}, *[{}] * 6]
    told = run(graft, steps, alpha=0.1)
    expected = [0.2, 0.25, 0.26, 0.36, 0.26, 0.16, 0.06, 0.06, 0.06, 0.16, 0.26]
    assert told == pytest.approx(expected, abs=1e-6)


def test_grad_norm_gated_pauses_outside_its_band() -> None:
    graft = ef.grafting.grad_norm_gated(10, low=0.5, high=2.0)
    ratios = [1.0, 0.5, 0.49, 2.0, 2.1, 100.0, 1.0]
    told = run(graft, [{"gradient_ratio": ratio} for ratio in ratios])
    assert told == pytest.approx([0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.4])


def test_adaptive_switches_on_evidence() -> None:
    graft = ef.grafting.adaptive(100, max_drift=0.5, gain=1.0, max_speed=3.0, calm_steps=20)
    falls = {"loss_trend": -0.1}
    told = run(graft, [falls, falls, {"drift": 1.0}, *[{**falls, "is_spike": True}], *[falls] * 20])
    moves = np.diff([0.0, *told]) * 100
    assert moves[:3] == pytest.approx([2, 3, 0], rel=1e-4)
    # The spike hands over to `stability`: 5 steps back, 10 steps of rest, 5 on at its pace...
    assert moves[3:8] == pytest.approx([-1] * 5, rel=1e-3)
    assert moves[8:18] == pytest.approx([0] * 10)
    assert moves[18:23] == pytest.approx([1] * 5, rel=1e-3)
    # ...and 20 calm steps later `momentum` is back.
    assert moves[23] == pytest.approx(3, rel=1e-3)


ANY = st.floats(-10, 10, width=32)
EVIDENCE = st.fixed_dictionaries(
    {
        "is_spike": st.booleans(),
        "loss_trend": ANY,
        "drift": st.sampled_from([0.0, 0.01, 0.05, 0.1, 1e6]),
        "gradient_ratio": st.sampled_from([0.0, 0.1, 1.0, 3.0, 1e30]),
        "stability": st.floats(0, 1, width=32),
    }
)
_UPDATES = {name: ef.grafting.get(name, NUM_STEPS) for name in NAMES}
_JITTED = {name: jax.jit(graft.update) for name, graft in _UPDATES.items()}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(EVIDENCE, min_size=1, max_size=12),
    st.sampled_from([0.0, 1.0, 0.5, 0.99, 0.015]),
)
def test_alpha_stays_in_range_and_within_the_stated_step(
    name: str, steps: list[dict[str, Any]], alpha: float
) -> None:
    graft = _UPDATES[name]
    memory, now = start_memory((graft,), jnp.zeros((1,), jnp.int8)), jnp.full((1,), alpha)
    for step in steps:
        new, memory = _JITTED[name](graft.hyper, memory, now, evidence(**step))
        assert 0.0 <= float(new[0]) <= 1.0
        assert abs(float(new[0] - now[0])) <= float(graft.max_step) + ROUNDING
        if name in MONOTONE:
            assert float(new[0]) >= float(now[0])
        assert memory.shape == (1, 4)
        now = new


def test_ramp_moves_each_seed_by_its_own_strategy_and_the_others_not_at_all() -> None:
    grafts = (ef.grafting.linear(10), ef.grafting.momentum(10, gain=1.0))
    alpha, memory = ramp(
        grafts,
        tuple(graft.hyper for graft in grafts),
        evidence(4, loss_trend=-1.0),
        chosen=jnp.asarray([0, 1, 1, 5], jnp.int8),
        memory=jnp.ones((4, 4)) * 1.5,
        alpha=jnp.full((4,), 0.25),
        is_moving=jnp.asarray([True, True, False, True]),
    )
    assert alpha.tolist() == pytest.approx([0.35, 0.55, 0.25, 0.25])
    assert memory[:, 0].tolist() == [1.5, 3.0, 1.5, 1.5]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ef.grafting.linear(0),
        lambda: ef.grafting.linear(True),
        lambda: ef.grafting.linear(2.0),  # type: ignore[arg-type]
        lambda: ef.grafting.linear(10**6),
        lambda: ef.grafting.drift_controlled(5, max_drift=0.0),
        lambda: ef.grafting.momentum(5, gain=-1.0),
        lambda: ef.grafting.momentum(5, max_speed=0.5),
        lambda: ef.grafting.stability(5, hold_steps=-1),
        lambda: ef.grafting.grad_norm_gated(5, low=0.0),
        lambda: ef.grafting.grad_norm_gated(5, low=2.0, high=1.0),
        lambda: ef.grafting.adaptive(5, calm_steps=0),
    ],
)
def test_wrong_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"got|negative"):
        wrong()


def test_a_graft_longer_than_its_stage_is_refused() -> None:
    layout = make_layout(
        sites=[ef.site("a", features=2)], blueprints={"b": ef.blueprints.noop()}, capacity=1
    )
    with pytest.raises(ValueError, match=r"'linear' needs 601 steps.*GRAFTING\] = 600"):
        ef.Growth(**layout.arguments, graft=ef.grafting.linear(601))
    longer = ef.lifecycle.settings(max_steps={Stage.GRAFTING: 601})
    ef.Growth(**layout.arguments, graft=ef.grafting.linear(601), settings=longer)
    ef.Growth(**layout.arguments, graft=ef.grafting.momentum(601))


# --- all six in one driven run -------------------------------------------------------------------

LENGTH = 400
LONGEST = 300
NOISE = 0.01


class Driven(NamedTuple):
    alpha: np.ndarray
    """[T + 1, 6], the start included."""
    stage: np.ndarray
    is_spike: np.ndarray


class Plan(NamedTuple):
    """What each step of a run shows; [T]."""

    loss: np.ndarray
    gradient: np.ndarray
    drift: np.ndarray


def plan() -> Plan:
    """Calm: a loss that falls slowly with some noise, usual gradients, small drift."""
    t = np.arange(LENGTH)
    noise = NOISE * np.sin(2.4 * t)
    return Plan(
        loss=np.exp(-t / 1000) + noise,
        gradient=np.ones(LENGTH),
        drift=np.full(LENGTH, 0.01),
    )


def plant(at: int, **values: float) -> Plan:
    told = plan()
    for name, value in values.items():
        getattr(told, name)[at] = value
    return told


@pytest.fixture(scope="module")
def drive_all() -> Any:
    """A function from a plan to what the six seeds, one a strategy, made of it."""
    layout = make_layout(
        sites=[ef.site("six", features=12, chunks=6)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=6,
    )
    with strict():
        grafts = tuple(ef.grafting.get(name, NUM_STEPS) for name in NAMES)
        made = rig(layout, rows=1, graft=grafts)
        state = place(
            made.growth,
            made.fresh(),
            np.full(6, Stage.GRAFTING),
            alpha=0.0,
            graft=np.arange(6),
            graft_memory=np.asarray([graft.start for graft in grafts]),
            gradient_norm=1.0,
            num_steps=100,
        )
        state = limits(state, max_steps={Stage.STABILIZATION: 2 * LENGTH, Stage.GRAFTING: LONGEST})
        state = limits(state, min_steps={Stage.STABILIZATION: 2 * LENGTH})
        # Drift is measured on the parameters: |change| / |adapter|.
        state = state._replace(
            adapters=jax.tree.map(jnp.ones_like, state.adapters),
            loss=calm_track(loss=1.0, deviation=NOISE),
        )
        commands = made.growth.commands([], 1)

        @jax.jit
        def scan(told: Plan) -> Any:
            def one(state: Any, now: Plan) -> Any:
                adapters = jax.tree.map(lambda leaf: leaf * (1 + now.drift), state.adapters)
                shown = reading(6, live=1.0)._replace(
                    gradient_square=jnp.full((6,), jnp.square(now.gradient))
                )
                _, is_spike = ef.lifecycle.track_loss(state.loss, now.loss)
                state, info = made.growth.update(state, adapters, shown, now.loss, commands)
                return state, (info.alpha, info.stage, is_spike)

            return jax.lax.scan(one, state, told)[1]

    def drive(told: Plan) -> Driven:
        alpha, stage, is_spike = scan(Plan(*(jnp.asarray(row, jnp.float32) for row in told)))
        alpha = np.concatenate([np.zeros((1, 6)), np.asarray(alpha)])
        return Driven(alpha, np.asarray(stage), np.asarray(is_spike))

    return drive


AT = 15
SPIKES = {
    "calm": plan(),
    "loss": plant(AT, loss=5.0),
    "loss_nan": plant(AT, loss=np.nan),
    "gradient": plant(AT, gradient=1e3),
    "gradient_huge": plant(AT, gradient=1e15),
    "gradient_gone": plant(AT, gradient=0.0),
    "drift": plant(AT, drift=5.0),
}


@pytest.fixture(scope="module")
def driven(drive_all: Any) -> dict[str, Driven]:
    with strict():
        return {name: drive_all(told) for name, told in SPIKES.items()}


def end(told: Driven, name: str) -> int:
    """Updates until alpha is 1."""
    full = told.alpha[:, NAMES.index(name)] == 1.0
    assert full.any()
    return int(np.argmax(full))


@pytest.mark.parametrize("planted", SPIKES)
@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_in_every_run(driven: dict[str, Driven], planted: str, name: str) -> None:
    column = NAMES.index(name)
    alpha = driven[planted].alpha[:, column]
    assert alpha[0] == 0.0
    assert ((alpha >= 0) & (alpha <= 1)).all()
    moves = np.diff(alpha)
    assert np.abs(moves).max() <= LARGEST[name] + ROUNDING
    if name in MONOTONE:
        assert moves.min() >= 0
    until = end(driven[planted], name)
    # Full alpha ends the stage in the same step and is kept.
    assert driven[planted].stage[until - 1, column] == Stage.STABILIZATION
    assert (alpha[until:] == 1.0).all()


def test_calm_runs_end_in_time(driven: dict[str, Driven]) -> None:
    assert not driven["calm"].is_spike[: NUM_STEPS + 1].any()
    told = {name: end(driven["calm"], name) for name in NAMES}
    for name in ("linear", "drift_controlled", "stability", "grad_norm_gated"):
        assert told[name] == NUM_STEPS
    for name in ("momentum", "adaptive"):
        assert NUM_STEPS / 3 <= told[name] < NUM_STEPS


# The most updates that one spike may cost: what the strategy's docstring says.
COST = {
    ("drift", "drift_controlled"): 1,
    ("drift", "adaptive"): 1,
    ("gradient", "grad_norm_gated"): 1,
    ("gradient_huge", "grad_norm_gated"): 1,
    ("gradient_gone", "grad_norm_gated"): 1,
    ("loss", "momentum"): 8,
    ("loss_nan", "momentum"): 8,
    # 5 back, 10 of rest, 5 to regain, and a pace that averages the spike away.
    ("loss", "stability"): 22,
    ("loss_nan", "stability"): 22,
    ("loss", "adaptive"): 22,
    ("loss_nan", "adaptive"): 22,
}


@pytest.mark.parametrize("planted", [name for name in SPIKES if name != "calm"])
@pytest.mark.parametrize("name", NAMES)
def test_one_spike_costs_a_bounded_time(driven: dict[str, Driven], planted: str, name: str) -> None:
    assert driven[planted].is_spike[AT] == planted.startswith("loss")
    lost = end(driven[planted], name) - end(driven["calm"], name)
    most = COST.get((planted, name), 0)
    assert (0 < lost <= most) if most else lost == 0


def test_strategies_differ_measurably(drive_all: Any) -> None:
    told = plan()
    told.loss[12] = 5.0
    told.gradient[6:9] = 10.0
    told.drift[3:6] = 0.2
    with strict():
        alpha = drive_all(told).alpha
    for i, first in enumerate(NAMES):
        for j, second in enumerate(NAMES[:i]):
            gap = np.abs(alpha[:, i] - alpha[:, j]).max()
            assert gap > 0.02, (first, second, gap)


def test_persistent_trouble_ends_with_the_dwell_limit(drive_all: Any) -> None:
    told = plan()
    told.drift[:] = 0.06
    with strict():
        run = drive_all(told)
    column = NAMES.index("drift_controlled")
    assert (run.alpha[:, column] == 0).all()
    assert (run.stage[:LONGEST, column] == Stage.GRAFTING).all()
    assert run.stage[LONGEST, column] == Stage.CULLED


# --- changing the strategy on the way ------------------------------------------------------------


@pytest.mark.parametrize("second", NAMES)
def test_a_strategy_changed_on_the_way_leaves_alpha_continuous(changing: Any, second: str) -> None:
    state = place(
        changing.growth,
        changing.fresh(),
        [Stage.GRAFTING, Stage.GRAFTING],
        alpha=[0.42, 0.42],
        graft=NAMES.index("momentum"),
        graft_memory=2.5,
    )
    shown = silent(2)
    before, _ = changing.step(state, reading=shown)
    changed, info = changing.step(before, [set_graft(0, second)], reading=shown)
    assert int(changed.seeds.graft[0]) == NAMES.index(second)
    # The step of the command itself is still the old strategy's.
    assert float(changed.seeds.alpha[0]) == float(changed.seeds.alpha[1])
    start = changing.growth.grafts[NAMES.index(second)].start
    if second != "momentum":
        assert changed.seeds.graft_memory[0].tolist() == list(start)
    assert changed.seeds.graft_memory[1, 1] == 2.5
    alpha = [float(changed.seeds.alpha[0])]
    after = changed
    for _ in range(5):
        after, info = changing.step(after, reading=shown)
        alpha.append(float(after.seeds.alpha[0]))
    assert np.abs(np.diff(alpha)).max() <= LARGEST[second] + ROUNDING
    assert alpha[-1] > alpha[0]
    assert int(info.waiting_for[0]) == Gate.ALPHA_FULL


@pytest.fixture(scope="module")
def changing() -> Any:
    layout = make_layout(
        sites=[ef.site("two", features=2, chunks=2)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=2,
    )
    with strict():
        grafts = tuple(ef.grafting.get(name, NUM_STEPS) for name in NAMES)
        return rig(layout, rows=1, graft=grafts)


def test_a_graft_begins_at_zero_with_its_own_memory(changing: Any) -> None:
    from esper_fn.commands import transition

    state = place(
        changing.growth,
        changing.fresh(),
        [Stage.TRAINING, 0],
        graft=NAMES.index("adaptive"),
        graft_memory=9.0,
    )
    state, _ = changing.step(state, [transition(0, Stage.GRAFTING)])
    assert float(state.seeds.alpha[0]) == 0.0
    assert state.seeds.graft_memory[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    state, _ = changing.step(state)
    assert 0 < float(state.seeds.alpha[0]) <= LARGEST["adaptive"]
