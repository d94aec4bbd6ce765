"""Each alpha schedule alone: its mathematics, its contract, what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import LARGEST, MONOTONE, NAMES, NUM_STEPS, SCHEDULES

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.grafting import AlphaSchedule, Observation
from esper_fn.grafting._select import ROUNDING, restart, update_alpha
from esper_fn.lifecycle import Stage


def observe(size: int = 1, **values: Any) -> Observation:
    usual = {
        "is_spike": False,
        "loss_trend": 0.0,
        "drift": 0.0,
        "gradient_ratio": 1.0,
        "stability": 1.0,
        **values,
    }
    return Observation(**{name: jnp.full((size,), value) for name, value in usual.items()})


def move(schedule: AlphaSchedule, state: Any, observation: Observation, alpha: Any) -> Any:
    """One step of one seed, as a growth makes it."""
    (state,), alpha = update_alpha(
        [schedule],
        [state],
        observation,
        choice=jnp.zeros((1,), jnp.int8),
        alpha=alpha,
        is_moving=jnp.ones((1,), bool),
    )
    return state, alpha


def run(schedule: AlphaSchedule, steps: list[dict[str, Any]], alpha: float = 0.0) -> list[float]:
    """Alphas of one seed that begins to graft."""
    state, now = schedule.init(1), jnp.full((1,), alpha)
    update = jax.jit(partial(move, schedule))
    alphas = []
    for step in steps:
        state, now = update(state, observe(**step), now)
        alphas.append(float(now[0]))
    return alphas


@pytest.mark.parametrize("name", [n for n in ef.grafting.__all__ if n.islower() and n != "check"])
def test_every_schedule_keeps_the_contract(name: str) -> None:
    schedule = getattr(ef.grafting, name)(7)
    assert schedule.name == name
    ef.grafting.check(schedule)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_step_is_stated(name: str) -> None:
    schedule = getattr(ef.grafting, name)(7)
    assert schedule.max_step == pytest.approx(LARGEST[name] * NUM_STEPS / 7)


def altered(update: Any = None, init: Any = None, **fields: Any) -> AlphaSchedule:
    """`linear` with a fault."""
    plain = ef.grafting.linear(10)
    return plain._replace(init=init or plain.init, update=update or plain.update, **fields)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (altered(max_step=0.0), "max_step must be positive"),
        (altered(max_step=0.05), "alpha moves by 0.1"),
        (altered(init=lambda num_seeds: 0.1), "must be a JAX array, got 0.1"),
        (altered(init=lambda num_seeds: jnp.zeros((3,))), "one row for each of the 5 seeds"),
        (altered(lambda state, seen, alpha: alpha), r"update must return \(state, alpha\), got an"),
        (altered(lambda state, seen, alpha: (state, alpha)), "must reach 1 in calm steps"),
        (
            altered(lambda state, seen, alpha: (state, alpha.mean())),
            r"float32\[S\], got float32\[\]",
        ),
        (
            altered(lambda state, seen, alpha: (state, alpha.at[0].add(0.1))),
            "must depend on that seed's row alone",
        ),
        (
            altered(lambda state, seen, alpha: (state._replace(step=state.step / 2), alpha)),
            "must leave its numbers",
        ),
        (altered(lambda state, seen, alpha: ((state, alpha), alpha)), "update turns a state"),
    ],
)
def test_check_finds_what_breaks_the_contract(wrong: AlphaSchedule, message: str) -> None:
    with pytest.raises(ValueError, match=f"'linear'.*{message}"):
        ef.grafting.check(wrong)
    with pytest.raises(TypeError, match="must be an AlphaSchedule, got the function linear"):
        ef.grafting.check(ef.grafting.linear)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 64, 100, 333, 1000])
def test_linear_ends_at_exactly_one_after_its_steps(num_steps: int) -> None:
    schedule = ef.grafting.linear(num_steps)

    def step(carry: Any, _: Any) -> Any:
        state, alpha = move(schedule, carry[0], observe(), carry[1])
        return (state, alpha), alpha[0]

    start = (schedule.init(1), jnp.zeros((1,)))
    alphas = np.asarray(jax.lax.scan(step, start, length=num_steps)[1])
    assert alphas[-1] == 1.0
    assert (alphas[:-1] < 1.0).all()
    np.testing.assert_allclose(alphas, np.arange(1, num_steps + 1) / num_steps, atol=1e-4)


def test_drift_controlled_stands_still_while_the_adapter_drifts() -> None:
    graft = ef.grafting.drift_controlled(10, max_drift=0.5)
    alphas = run(graft, [{}, {"drift": 0.5}, {"drift": 0.51}, {"drift": 9.0}, {}])
    assert alphas == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.3])


def test_momentum_speeds_up_while_the_loss_falls() -> None:
    graft = ef.grafting.momentum(100, gain=1.0, max_speed=3.0)
    falls, rises = {"loss_trend": -0.1}, {"loss_trend": 0.1}
    alphas = run(
        graft, [falls, falls, falls, rises, rises, falls, {"is_spike": True, **falls}, falls]
    )
    # Speeds 2, 3 (capped), 3, 1.5, 1, 2, 1 (spike), 2.
    assert np.diff([0.0, *alphas]) * 100 == pytest.approx([2, 3, 3, 1.5, 1, 2, 1, 2], rel=1e-4)


def test_stability_slows_steps_back_holds_and_goes_on() -> None:
    graft = ef.grafting.stability(10, hold_steps=2, back_steps=3)
    steps = [{}, {"stability": 0.5}, {"stability": 0.0}, {}, {"is_spike": True}, *[{}] * 6]
    alphas = run(graft, steps, alpha=0.1)
    expected = [0.2, 0.25, 0.26, 0.36, 0.26, 0.16, 0.06, 0.06, 0.06, 0.16, 0.26]
    assert alphas == pytest.approx(expected, abs=1e-6)


def test_grad_norm_gated_pauses_outside_its_band() -> None:
    graft = ef.grafting.grad_norm_gated(10, low=0.5, high=2.0)
    ratios = [1.0, 0.5, 0.49, 2.0, 2.1, 100.0, 1.0]
    alphas = run(graft, [{"gradient_ratio": ratio} for ratio in ratios])
    assert alphas == pytest.approx([0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.4])


def test_adaptive_switches_on_evidence() -> None:
    graft = ef.grafting.adaptive(100, max_drift=0.5, gain=1.0, max_speed=3.0, calm_steps=20)
    falls = {"loss_trend": -0.1}
    alphas = run(
        graft, [falls, falls, {"drift": 1.0}, *[{**falls, "is_spike": True}], *[falls] * 20]
    )
    moves = np.diff([0.0, *alphas]) * 100
    assert moves[:3] == pytest.approx([2, 3, 0], rel=1e-4)
    # The spike hands over to `stability`: 5 steps back, 10 steps of rest, 5 on at its pace...
    assert moves[3:8] == pytest.approx([-1] * 5, rel=1e-3)
    assert moves[8:18] == pytest.approx([0] * 10)
    assert moves[18:23] == pytest.approx([1] * 5, rel=1e-3)
    # ...and 20 calm steps later `momentum` is back.
    assert moves[23] == pytest.approx(3, rel=1e-3)


ANY = st.floats(-10, 10, width=32)
OBSERVATIONS = st.fixed_dictionaries(
    {
        "is_spike": st.booleans(),
        "loss_trend": ANY,
        "drift": st.sampled_from([0.0, 0.01, 0.05, 0.1, 1e6]),
        "gradient_ratio": st.sampled_from([0.0, 0.1, 1.0, 3.0, 1e30]),
        "stability": st.floats(0, 1, width=32),
    }
)
_JITTED = {name: jax.jit(partial(move, schedule)) for name, schedule in SCHEDULES.items()}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(OBSERVATIONS, min_size=1, max_size=12),
    st.sampled_from([0.0, 1.0, 0.5, 0.99, 0.015]),
)
def test_alpha_stays_in_range_and_within_the_stated_step(
    name: str, steps: list[dict[str, Any]], alpha: float
) -> None:
    schedule = SCHEDULES[name]
    state, now = schedule.init(1), jnp.full((1,), alpha)
    shapes = jax.tree.map(jnp.shape, state)
    for step in steps:
        state, new = _JITTED[name](state, observe(**step), now)
        assert 0.0 <= float(new[0]) <= 1.0
        assert abs(float(new[0] - now[0])) <= schedule.max_step + ROUNDING
        if name in MONOTONE:
            assert float(new[0]) >= float(now[0])
        assert jax.tree.map(jnp.shape, state) == shapes
        now = new


def test_each_seed_moves_by_its_own_schedule_and_the_others_not_at_all() -> None:
    schedules = (ef.grafting.linear(10), ef.grafting.momentum(10, gain=1.0))
    fast = schedules[1].init(4)._replace(speed=jnp.full((4,), 1.5))
    choice = jnp.asarray([0, 1, 1, 5], jnp.int8)
    states, alpha = update_alpha(
        schedules,
        (schedules[0].init(4), fast),
        observe(4, loss_trend=-1.0),
        choice=choice,
        alpha=jnp.full((4,), 0.25),
        is_moving=jnp.asarray([True, True, False, True]),
    )
    assert alpha.tolist() == pytest.approx([0.35, 0.55, 0.25, 0.25])
    assert states[1].speed.tolist() == [1.5, 3.0, 1.5, 1.5]
    states = restart(
        schedules, states, choice=choice, begins=jnp.asarray([True, True, False, True])
    )
    assert states[1].speed.tolist() == [1.5, 1.0, 1.5, 1.5]


def test_a_state_may_be_any_tree_and_its_numbers_are_tuned_without_a_restart() -> None:
    """Rows of several axes, whole numbers, a dict; a tuned number outlives the restart."""

    def init(num_seeds: int) -> Any:
        history = jnp.zeros((num_seeds, 3), jnp.float32)
        return {"step": jnp.float32(0.1), "history": history, "n": jnp.zeros((num_seeds,), int)}

    def update(state: Any, observation: Observation, alpha: Any) -> Any:
        history = jnp.roll(state["history"], 1, axis=1).at[:, 0].set(observation.drift)
        is_calm = history.max(axis=1) < 1
        state = {**state, "history": history, "n": state["n"] + 1}
        return state, alpha + jnp.where(is_calm, state["step"], 0.0)

    schedule = AlphaSchedule("patient", init, update, max_step=0.1)
    ef.grafting.check(schedule)
    tuned = {**init(2), "step": jnp.float32(0.05), "n": jnp.asarray([7, 7])}
    choice, begins = jnp.zeros((2,), jnp.int8), jnp.asarray([True, False])
    (state,) = restart([schedule], [tuned], choice=choice, begins=begins)
    assert state["n"].tolist() == [0, 7]
    assert float(state["step"]) == pytest.approx(0.05)


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
