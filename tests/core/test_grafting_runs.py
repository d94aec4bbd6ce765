"""All six alpha schedules side by side in the same driven run, and a change on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import calm_track, limits, place, reading, rig, silent, strict
from schedules import LARGEST, MONOTONE, NAMES, NUM_STEPS, SCHEDULES

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.commands import set_graft
from esper_fn.grafting._select import ROUNDING
from esper_fn.lifecycle import Gate, Stage
from esper_fn.lifecycle._loss import track_loss

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


def plant(step: int, **values: float) -> Plan:
    planted = plan()
    for name, value in values.items():
        getattr(planted, name)[step] = value
    return planted


@pytest.fixture(scope="module")
def drive_all() -> Any:
    """A function from a plan to what the six seeds, each with its own schedule, made of it."""
    layout = make_layout(
        sites=[ef.site("six", features=12, chunks=6)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=6,
    )
    with strict():
        made = rig(layout, rows=1, graft=tuple(SCHEDULES.values()))
        state = place(
            made.growth,
            made.fresh(),
            np.full(6, Stage.GRAFTING),
            alpha=0.0,
            graft=np.arange(6),
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
        def scan(plan: Plan) -> Any:
            def step(state: Any, now: Plan) -> Any:
                adapters = jax.tree.map(lambda leaf: leaf * (1 + now.drift), state.adapters)
                shown = reading(6, live=1.0)._replace(
                    gradient_square=jnp.full((6,), jnp.square(now.gradient))
                )
                _, is_spike = track_loss(state.loss, now.loss)
                state, info = made.growth.update(state, adapters, shown, now.loss, commands)
                return state, (info.alpha, info.stage, is_spike)

            return jax.lax.scan(step, state, plan)[1]

    def drive(plan: Plan) -> Driven:
        alpha, stage, is_spike = scan(Plan(*(jnp.asarray(row, jnp.float32) for row in plan)))
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
        return {name: drive_all(plan) for name, plan in SPIKES.items()}


def end(run: Driven, name: str) -> int:
    """Updates until alpha is 1."""
    full = run.alpha[:, NAMES.index(name)] == 1.0
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
    ends = {name: end(driven["calm"], name) for name in NAMES}
    for name in ("linear", "drift_controlled", "stability", "grad_norm_gated"):
        assert ends[name] == NUM_STEPS
    for name in ("momentum", "adaptive"):
        assert NUM_STEPS / 3 <= ends[name] < NUM_STEPS


# The most updates that one spike may cost: what the schedule's docstring says.
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


def test_schedules_differ_measurably(drive_all: Any) -> None:
    planted = plan()
    planted.loss[12] = 5.0
    planted.gradient[6:9] = 10.0
    planted.drift[3:6] = 0.2
    with strict():
        alpha = drive_all(planted).alpha
    for i, first in enumerate(NAMES):
        for j, second in enumerate(NAMES[:i]):
            gap = np.abs(alpha[:, i] - alpha[:, j]).max()
            assert gap > 0.02, (first, second, gap)


def test_persistent_trouble_ends_with_the_dwell_limit(drive_all: Any) -> None:
    planted = plan()
    planted.drift[:] = 0.06
    with strict():
        run = drive_all(planted)
    column = NAMES.index("drift_controlled")
    assert (run.alpha[:, column] == 0).all()
    assert (run.stage[:LONGEST, column] == Stage.GRAFTING).all()
    assert run.stage[LONGEST, column] == Stage.CULLED


# --- changing the schedule on the way ------------------------------------------------------------


@pytest.mark.parametrize("second", NAMES)
def test_a_schedule_changed_on_the_way_leaves_alpha_continuous(changing: Any, second: str) -> None:
    state = place(
        changing.growth,
        changing.fresh(),
        [Stage.GRAFTING, Stage.GRAFTING],
        alpha=[0.42, 0.42],
        graft=NAMES.index("momentum"),
    )
    state = with_rows(state, "momentum", speed=2.5)
    state = with_rows(state, second, **({"countdown": 9.0} if second == "stability" else {}))
    shown = silent(2)
    before, _ = changing.step(state, reading=shown)
    changed, info = changing.step(before, [set_graft(0, second)], reading=shown)
    assert int(changed.seeds.graft[0]) == NAMES.index(second)
    # The step of the command itself is still the old schedule's.
    assert float(changed.seeds.alpha[0]) == float(changed.seeds.alpha[1])
    speed = changed.grafts[NAMES.index("momentum")].speed
    assert speed.tolist() == pytest.approx([2.5 / 1.1**2] * 2)
    if second == "stability":
        assert changed.grafts[NAMES.index(second)].countdown.tolist() == [0.0, 9.0]
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
        return rig(layout, rows=1, graft=tuple(SCHEDULES.values()))


def with_rows(state: Any, name: str, **rows: float) -> Any:
    """`state` with other rows of one schedule's state."""
    index = NAMES.index(name)
    own = state.grafts[index]
    own = own._replace(**{row: jnp.full_like(getattr(own, row), rows[row]) for row in rows})
    return state._replace(grafts=(*state.grafts[:index], own, *state.grafts[index + 1 :]))


def test_a_graft_begins_at_zero_with_its_own_rows(changing: Any) -> None:
    from esper_fn.commands import transition

    state = place(
        changing.growth,
        changing.fresh(),
        [Stage.TRAINING, 0],
        graft=NAMES.index("adaptive"),
    )
    state = with_rows(state, "adaptive", countdown=9.0)
    state, _ = changing.step(state, [transition(0, Stage.GRAFTING)])
    assert float(state.seeds.alpha[0]) == 0.0
    assert state.grafts[NAMES.index("adaptive")].countdown.tolist() == [0.0, 9.0]
    state, _ = changing.step(state)
    assert 0 < float(state.seeds.alpha[0]) <= LARGEST["adaptive"]
