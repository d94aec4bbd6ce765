"""The guard outside every policy: alone, and through `Growth.update`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import NONE, calm_track, place, rig, silent, small_layout, state_faults, strict

from esper_fn import governors
from esper_fn.commands import Code, germinate, release
from esper_fn.governors import Alarm, Observation, check, disabled, standard
from esper_fn.lifecycle import FAST_STEPS, Cause, Stage
from esper_fn.lifecycle._loss import loss_track, track_loss
from esper_fn.lifecycle._state import seed_state

S = Stage
PATIENCE = 5
VETO = 4


@pytest.fixture(scope="module")
def guarded() -> Any:
    """A rig under the standard governor."""
    with strict():
        return rig(
            small_layout(),
            rows=2,
            governor=standard(patience=PATIENCE, veto_steps=VETO, max_drift=2.0),
        )


STAGES = [S.GRAFTING, S.DORMANT, S.DORMANT, S.FINE_TUNING, S.FOSSILIZED, S.TRAINING, S.GRAFTING]


def start(guarded: Any, **columns: Any) -> Any:
    """Seed 6 grafts, but its alpha is still 0."""
    alpha = [0.5, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    state = place(guarded.growth, guarded.fresh(), STAGES, alpha=alpha, **columns)
    return state._replace(adapters=jax.tree.map(jnp.ones_like, state.adapters))


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_non_finite_loss_rolls_back_who_acts_on_trial_in_the_same_step(
    guarded: Any, loss: float
) -> None:
    after, info = guarded.step(start(guarded), loss=loss)
    assert int(info.verdict.alarm) == Alarm.NON_FINITE_LOSS
    assert bool(info.verdict.should_roll_back)
    # Seeds that do not act yet and fossils are not suspects. Seed 6 has just taken its first step.
    assert np.asarray(info.verdict.is_quarantined).tolist() == [
        True,
        *[False] * 2,
        True,
        *[False] * 3,
    ]
    assert np.asarray(after.seeds.stage).tolist() == [10, 0, 0, 10, 7, 2, 3]
    assert np.asarray(info.cause)[[0, 3]].tolist() == [Cause.GOVERNOR] * 2
    assert np.asarray(after.seeds.alpha)[[0, 3]].tolist() == [0.0, 0.0]
    assert np.asarray(after.seeds.slot)[[0, 3]].tolist() == [NONE, NONE]
    assert not state_faults(guarded.growth, after)


def test_the_first_step_of_a_run_may_be_the_bad_one(guarded: Any) -> None:
    state = start(guarded)._replace(loss=loss_track())
    after, info = guarded.step(state, loss=np.nan)
    assert int(info.verdict.alarm) == Alarm.NON_FINITE_LOSS
    assert int(after.loss.num_steps) == 0
    after, info = guarded.step(after, loss=3.0)
    assert int(info.verdict.alarm) == Alarm.CALM
    assert float(after.loss.slow) == 3.0


def test_an_explicit_release_ends_a_quarantine_at_once(guarded: Any) -> None:
    state, _ = guarded.step(start(guarded), loss=np.nan)
    for _ in range(30):
        state, info = guarded.step(state)
    assert int(state.seeds.stage[0]) == S.ROLLED_BACK
    state, info = guarded.step(state, [germinate(0, "scale")])
    assert int(info.outcomes.code[0]) == Code.ILLEGAL_TRANSITION
    state, info = guarded.step(state, [release(0)])
    assert int(state.seeds.stage[0]) == S.DORMANT
    state, info = guarded.step(state, [germinate(0, "scale")])
    assert int(info.outcomes.code[0]) == Code.DONE


def test_the_veto_lasts_its_steps(guarded: Any) -> None:
    state = start(guarded)
    codes = []
    for loss in [1.0, np.nan, *[1.0] * (VETO + 1)]:
        _, info = guarded.step(state, [germinate(1, "scale")], loss=loss)
        codes.append(Code(int(info.outcomes.code[0])))
        state, info = guarded.step(state, loss=loss)
    assert codes == [Code.DONE, *[Code.VETOED] * VETO, Code.DONE, Code.DONE]


def test_a_second_alarm_starts_the_veto_anew(guarded: Any) -> None:
    state = start(guarded)
    vetoes = []
    for loss in [np.nan, 1.0, np.nan, *[1.0] * VETO]:
        state, info = guarded.step(state, loss=loss)
        vetoes.append(bool(info.verdict.forbids_germination))
    assert vetoes == [*[True] * (2 + VETO), False]


def test_divergence_rolls_back_after_patience(guarded: Any) -> None:
    state = start(guarded)
    alarms = []
    for loss in [1.0] * 3 + [100.0] * 120:
        state, info = guarded.step(state, loss=loss)
        alarms.append(int(info.verdict.alarm))
        if alarms[-1] != Alarm.CALM:
            break
    assert alarms[-1] == Alarm.DIVERGENCE
    assert 3 + PATIENCE <= len(alarms) < 80
    assert np.asarray(state.seeds.stage)[[0, 3]].tolist() == [S.ROLLED_BACK] * 2
    assert bool(info.verdict.should_roll_back)
    # One alarm, not one a step: counting starts again.
    _, info = guarded.step(state, loss=100.0)
    assert int(info.verdict.alarm) == Alarm.CALM


def test_it_is_elevated_before_the_alarm_and_calm_before_that(guarded: Any) -> None:
    state = start(guarded)
    elevated = []
    for loss in [1.0] * 10 + [100.0] * 120:
        state, info = guarded.step(state, loss=loss)
        elevated.append(bool(info.verdict.is_elevated))
        if int(info.verdict.alarm) != Alarm.CALM:
            break
    assert int(info.verdict.alarm) == Alarm.DIVERGENCE
    assert elevated == [False] * (len(elevated) - PATIENCE) + [True] * PATIENCE


def jumped(state: Any, seed: int) -> Any:
    """Adapters of which that seed's, in the bank of "sequence", is ten times as large."""
    row = int(state.seeds.slot[seed]) - 2
    bank = jax.tree.map(
        lambda leaf: leaf.at[row].multiply(10.0), state.adapters["sequence"]["scale"]
    )
    return {**state.adapters, "sequence": {**state.adapters["sequence"], "scale": bank}}


def test_an_adapter_that_jumps_is_quarantined_alone(guarded: Any) -> None:
    state = start(guarded, num_live_steps=FAST_STEPS + 1)
    after, info = guarded.step(state, adapters=jumped(state, 3))
    assert int(info.verdict.alarm) == Alarm.DRIFT
    assert not bool(info.verdict.should_roll_back)
    assert np.flatnonzero(np.asarray(info.verdict.is_quarantined)).tolist() == [3]
    assert int(after.seeds.stage[3]) == S.ROLLED_BACK
    assert int(after.seeds.stage[0]) == S.GRAFTING
    assert bool(info.verdict.forbids_germination)


def test_the_first_steps_of_an_adapter_that_acts_are_no_jump(guarded: Any) -> None:
    state = start(guarded, num_live_steps=FAST_STEPS)
    _, info = guarded.step(state, adapters=jumped(state, 3))
    assert int(info.verdict.alarm) == Alarm.CALM


def test_an_adapter_of_zero_does_not_jump(guarded: Any) -> None:
    state = start(guarded, num_live_steps=100)
    zero = state._replace(adapters=jax.tree.map(jnp.zeros_like, state.adapters))
    after, info = guarded.step(zero, adapters=state.adapters)
    assert int(info.verdict.alarm) == Alarm.CALM
    assert not (np.asarray(after.seeds.stage) == S.ROLLED_BACK).any()


def test_a_newborn_may_change_as_much_as_it_likes(guarded: Any) -> None:
    state = start(guarded)
    # Seeds 5 and 6 learn but do not act yet; 4 is a fossil.
    adapters = jax.tree.map(jnp.copy, state.adapters)
    for seed in (4, 5, 6):
        slot = int(state.seeds.slot[seed])
        site, first = ("vector", 0) if slot < 2 else ("sequence", 2)
        bank = jax.tree.map(
            lambda leaf, i=slot - first: leaf.at[i].set(1e6), adapters[site]["scale"]
        )
        adapters = {**adapters, site: {**adapters[site], "scale": bank}}
    after, info = guarded.step(state, adapters=adapters)
    assert int(info.verdict.alarm) == Alarm.CALM
    assert not np.isin(np.asarray(after.seeds.stage), [S.ROLLED_BACK]).any()


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_a_broken_adapter_is_rolled_back_and_its_parameters_never_stand(
    guarded: Any, broken: float
) -> None:
    state = start(guarded)
    adapters = jax.tree.map(lambda leaf: jnp.full_like(leaf, broken), state.adapters)
    after, info = guarded.step(state, adapters=adapters)
    # Those that learn: 0 and 6 graft, 5 trains, 3 is fine-tuned, and 4, a fossil, stays one.
    assert np.asarray(after.seeds.stage).tolist() == [10, 0, 0, 10, 7, 10, 10]
    assert np.asarray(info.cause)[[0, 3, 5, 6]].tolist() == [Cause.NON_FINITE] * 4
    assert np.asarray(after.seeds.error_count).tolist() == [1, 0, 0, 1, 1, 1, 1]
    for a, b in zip(jax.tree.leaves(after.adapters), jax.tree.leaves(state.adapters), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert not state_faults(guarded.growth, after)


# --- the judgement alone -------------------------------------------------------------------------


def judge(governor: Any, losses: Any, *, restored: Any = None, state: Any = None) -> list[Alarm]:
    """Alarms over a run; `restored` is the loss track that a roll-back brings back."""
    seeds = seed_state(2)

    def step(carry: Any, loss: Any) -> Any:
        state, track = carry
        track, _ = track_loss(track, loss)
        observation = Observation(seeds=seeds, loss=loss, track=track, drift=jnp.zeros((2,)))
        state, verdict = governor.update(state, observation)
        if restored is not None:
            track = jax.tree.map(
                lambda old, new: jnp.where(verdict.should_roll_back, old, new), restored, track
            )
        return (state, track), verdict.alarm

    start = (governor.init(2) if state is None else state, loss_track())
    _, alarms = jax.jit(lambda losses: jax.lax.scan(step, start, losses))(jnp.asarray(losses))
    return [Alarm(alarm) for alarm in np.asarray(alarms).tolist()]


def noisy(level: Any, deviation: float, length: int = 2000) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=length).astype(np.float32)
    return (level + deviation * noise).astype(np.float32)


FALLS = np.linspace(1.0, 0.0, 2000, dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("usual", noisy(0.2 + 2.0 * np.exp(-np.arange(2000) / 200), 0.05)),
        ("negative", noisy(-5.0, 0.3)),
        ("falling through zero", noisy(4 * FALLS - 2, 0.2)),
        ("around zero", noisy(0.0, 0.1)),
        ("to zero", np.exp(-np.arange(2000, dtype=np.float32) / 20)),
        ("to almost zero, with noise", np.abs(noisy(np.exp(-np.arange(2000) / 50), 1e-4))),
        ("constant", np.full(2000, 0.7, np.float32)),
        ("large", noisy(1e6, 1e5)),
    ],
)
def test_no_false_alarm(name: str, losses: np.ndarray) -> None:
    assert set(judge(standard(), losses)) == {Alarm.CALM}, name


@pytest.mark.parametrize(
    ("before", "after"), [(1.0, 10.0), (-5.0, 20.0), (-0.01, 1.0), (0.0, 1.0), (1e-6, 1e-3)]
)
def test_divergence_is_seen_at_every_level(before: float, after: float) -> None:
    deviation = max(abs(before), 1e-3) * 0.02 if abs(before) > 1e-3 else 1e-5
    losses = np.concatenate([noisy(before, deviation, 300), noisy(after, deviation, 300)])
    alarms = judge(standard(), losses)
    assert set(alarms[:300]) == {Alarm.CALM}
    assert Alarm.DIVERGENCE in alarms[300:]
    assert 300 + 20 <= alarms.index(Alarm.DIVERGENCE) < 450


@pytest.mark.parametrize("is_restored", [False, True], ids=["unguarded", "rolled back"])
def test_data_that_changed_for_good_raise_one_alarm_and_a_new_level_is_learned(
    is_restored: bool,
) -> None:
    losses = np.concatenate([noisy(1.0, 0.02, 300), noisy(10.0, 0.02, 1500), noisy(100, 1, 300)])
    # `rollback.update` restores the loss averages too.
    restored = calm_track() if is_restored else None
    alarms = judge(standard(veto_steps=200), losses, restored=restored)
    steps = np.flatnonzero(np.asarray(alarms) == Alarm.DIVERGENCE)
    assert len(steps) == 2
    assert 300 < steps[0] < 450
    assert 1800 < steps[1] < 1950


def test_a_short_rise_is_forgiven() -> None:
    losses = noisy(1.0, 0.02, 400)
    losses[200:210] = 50.0
    assert set(judge(standard(), losses)) == {Alarm.CALM}


def test_disabled_never_interferes() -> None:
    losses = np.asarray([1.0, np.nan, np.inf, 1e30, *[1e9] * 200], np.float32)
    assert set(judge(disabled(), losses)) == {Alarm.CALM}
    made = rig(small_layout(), rows=1, governor=disabled())
    state = start(made)
    after, info = made.step(state, [germinate(1, "scale")], loss=np.nan, reading=silent(7))
    assert int(info.outcomes.code[0]) == Code.DONE
    assert not np.isin(np.asarray(after.seeds.stage), [S.ROLLED_BACK]).any()
    assert not bool(info.verdict.should_roll_back)


def test_thresholds_are_state() -> None:
    governor = standard(max_ratio=3.0)
    wide = governor.init(2)._replace(max_ratio=jnp.float32(1000.0))
    losses = np.concatenate([noisy(1.0, 0.02, 300), noisy(10.0, 0.02, 300)])
    assert set(judge(governor, losses, state=wide)) == {Alarm.CALM}


@pytest.mark.parametrize(
    "wrong",
    [{"max_ratio": 1.0}, {"patience": 0}, {"max_drift": 0.0}, {"veto_steps": -1}],
)
def test_wrong_thresholds_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="max_ratio > 1, patience >= 1"):
        standard(**wrong)


def test_calm_track_is_what_the_rigs_say() -> None:
    track, is_spike = track_loss(calm_track(), jnp.float32(1.0))
    assert not bool(is_spike)
    assert float(track.slow) == 1.0


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in governors.__all__ if n.islower() and n != "check"])
def test_every_governor_keeps_the_contract(name: str) -> None:
    check(getattr(governors, name)())


def test_check_finds_what_breaks_the_contract() -> None:
    plain = disabled()

    def loud(state: Any, observation: Observation) -> Any:
        state, verdict = plain.update(state, observation)
        return state, verdict._replace(alarm=jnp.int8(9))

    def wide(state: Any, observation: Observation) -> Any:
        state, verdict = plain.update(state, observation)
        return state, verdict._replace(is_quarantined=jnp.zeros((), bool))

    def growing(state: Any, observation: Observation) -> Any:
        return (state,), plain.update((), observation)[1]

    for wrong, message in (
        (plain._replace(update=loud), "must be an Alarm, got 9"),
        (plain._replace(update=wide), r"is_quarantined must be bool\[5\], got bool\[\]"),
        (plain._replace(update=growing), "update turns a state"),
        (plain._replace(update=lambda state, seen: (state, 3)), r"must return \(state, Verdict\)"),
        (plain._replace(init=lambda num_seeds: 3.0), "must be a JAX array, got 3.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check(wrong)
    with pytest.raises(TypeError, match="must be a Governor, got the function standard"):
        check(standard)  # type: ignore[arg-type]


def watch(losses: list[float], references: list[float]) -> tuple[list[int], Any]:
    """The alarms of `standard` alone, and its state afterwards."""
    governor = standard(patience=PATIENCE, veto_steps=VETO)
    update = jax.jit(governor.update)
    state, track, alarms = governor.init(2), loss_track(), []
    for loss, reference in zip(losses, references, strict=True):
        track, _ = track_loss(track, jnp.float32(loss))
        observation = Observation(
            seeds=seed_state(2),
            loss=jnp.float32(loss),
            track=track,
            drift=jnp.zeros((2,)),
            reference_loss=jnp.float32(reference),
        )
        state, verdict = update(state, observation)
        assert bool(verdict.should_roll_back) == (int(verdict.alarm) == Alarm.DIVERGENCE)
        alarms.append(int(verdict.alarm))
    return alarms, state


HIGH = [1.0] * 20 + [50.0] * 300


@pytest.mark.parametrize("reference", [np.nan, 1.0, 20.0], ids=["unknown", "good", "better"])
def test_a_high_loss_is_a_divergence_where_the_last_good_parameters_do_better(
    reference: float,
) -> None:
    alarms, _ = watch(HIGH, [reference] * len(HIGH))
    assert Alarm.DIVERGENCE in alarms
    assert Alarm.DATA_CHANGED not in alarms


@pytest.mark.parametrize("reference", [40.0, 50.0, 90.0, np.inf])
def test_it_is_the_data_where_the_last_good_parameters_do_no_better(reference: float) -> None:
    alarms, state = watch(HIGH, [np.nan] * 20 + [reference] * (len(HIGH) - 20))
    assert Alarm.DIVERGENCE not in alarms
    assert alarms.count(Alarm.DATA_CHANGED) >= 1
    # From then on the high loss is the measure.
    assert set(alarms[-100:]) == {Alarm.CALM}
    assert float(state.best) > 30


def test_after_the_data_changed_a_divergence_is_one_again() -> None:
    losses = [*HIGH, *[5000.0] * 300]
    references = [np.nan] * 20 + [50.0] * (len(losses) - 20)
    alarms, _ = watch(losses, references)
    assert Alarm.DIVERGENCE not in alarms[: len(HIGH)]
    assert Alarm.DIVERGENCE in alarms[len(HIGH) :]
