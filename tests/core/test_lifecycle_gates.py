"""Every edge and every gate of it; dwells that end; embargo, training places, pauses, surveys."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import (
    NONE,
    calm_track,
    limits,
    place,
    reading,
    row,
    silent,
    small,
    state_faults,
    strict,
    wide,
)
from support import mean_square

import esper_fn as ef
from esper_fn.commands import (
    Code,
    cull,
    germinate,
    pause_seed,
    release,
    resume_seed,
    roll_back,
    set_graft,
    transition,
)
from esper_fn.lifecycle import EDGES, GUARD_EDGES, Cause, Gate, Stage
from esper_fn.lifecycle._gates import TESTS
from esper_fn.lifecycle._loss import average, loss_track, track_loss

G, S, C = Gate, Stage, Cause

# Written by hand: (source, target, gates in order, cause), in order of precedence.
GUARDS = [
    *((S(s), S.ROLLED_BACK, (G.NON_FINITE,), C.NON_FINITE) for s in range(2, 7)),
    *((S(s), S.ROLLED_BACK, (G.QUARANTINED,), C.GOVERNOR) for s in range(2, 7)),
    (S.GERMINATED, S.CANCELLED, (G.NON_FINITE,), C.NON_FINITE),
    (S.GERMINATED, S.CANCELLED, (G.QUARANTINED,), C.GOVERNOR),
]
UTILITY = (G.UTILITY_MEASURED, G.UTILITY_POSITIVE)
JUDGED = (G.MIN_STEPS, G.CONTRIBUTION_MEASURED)
WAYS = [
    (S.GERMINATED, S.GRAFTING, (G.ACTS_AT_ONCE, G.MIN_STEPS), C.GATE),
    (S.GERMINATED, S.TRAINING, (G.TRAINS_FIRST, G.MIN_STEPS, G.TRAINING_PLACE), C.GATE),
    (S.GERMINATED, S.CANCELLED, (G.MAX_STEPS,), C.DWELL_LIMIT),
    (S.TRAINING, S.GRAFTING, (G.MIN_STEPS, *UTILITY, G.UTILITY_SETTLED), C.GATE),
    (S.TRAINING, S.GRAFTING, (G.MAX_STEPS, *UTILITY), C.DWELL_LIMIT),
    (S.TRAINING, S.CULLED, (G.MAX_STEPS,), C.DWELL_LIMIT),
    (S.GRAFTING, S.STABILIZATION, (G.MIN_STEPS, G.ALPHA_FULL), C.GATE),
    (S.GRAFTING, S.CULLED, (G.MAX_STEPS,), C.DWELL_LIMIT),
    (S.STABILIZATION, S.EVALUATING, (G.MIN_STEPS, G.LOSS_SETTLED), C.GATE),
    (S.STABILIZATION, S.EVALUATING, (G.MAX_STEPS,), C.DWELL_LIMIT),
    (
        S.EVALUATING,
        S.FINE_TUNING,
        (*JUDGED, G.CONTRIBUTION_POSITIVE, G.STABILITY_HIGH),
        C.GATE,
    ),
    (S.EVALUATING, S.CULLED, (*JUDGED, G.CONTRIBUTION_NOT_POSITIVE), C.MEASURED_WORTHLESS),
    (S.EVALUATING, S.CULLED, (G.ERRORS_MANY,), C.ERRORS),
    (S.EVALUATING, S.FINE_TUNING, (G.MAX_STEPS, G.CONTRIBUTION_UNKNOWN), C.DWELL_LIMIT),
    (S.EVALUATING, S.CULLED, (G.MAX_STEPS,), C.DWELL_LIMIT),
    (S.FINE_TUNING, S.FOSSILIZED, (*JUDGED, G.CONTRIBUTION_HIGH), C.GATE),
    (S.FINE_TUNING, S.CULLED, (*JUDGED, G.CONTRIBUTION_NOT_POSITIVE), C.MEASURED_WORTHLESS),
    (S.FINE_TUNING, S.FOSSILIZED, (G.MAX_STEPS, G.CONTRIBUTION_UNKNOWN), C.DWELL_LIMIT),
    (S.FINE_TUNING, S.CULLED, (G.MAX_STEPS,), C.DWELL_LIMIT),
    (S.CULLED, S.DORMANT, (G.EMBARGO_OVER,), C.GATE),
    (S.CANCELLED, S.DORMANT, (G.EMBARGO_OVER,), C.GATE),
    (S.ROLLED_BACK, S.DORMANT, (G.MAX_STEPS,), C.DWELL_LIMIT),
]

# What a row must look like for a gate to be (open, closed).
COLUMNS: dict[Gate, tuple[dict[str, Any], dict[str, Any]]] = {
    G.UTILITY_MEASURED: ({"num_live_steps": 30}, {"num_live_steps": 0}),
    G.UTILITY_POSITIVE: ({"utility": 1.0}, {"utility": -1.0}),
    G.UTILITY_SETTLED: ({"gap": 1.0}, {"gap": 2.0}),
    G.ALPHA_FULL: ({"alpha": 1.0}, {"alpha": 0.5}),
    G.CONTRIBUTION_MEASURED: ({"num_contributions": 2}, {"num_contributions": 1}),
    G.CONTRIBUTION_POSITIVE: ({"contribution": 0.25}, {"contribution": -1.0}),
    G.CONTRIBUTION_NOT_POSITIVE: ({"contribution": -1.0}, {"contribution": 0.25}),
    G.CONTRIBUTION_HIGH: ({"contribution": 1.0}, {"contribution": 0.25}),
    G.STABILITY_HIGH: ({"stability": 1.0}, {"stability": 0.5}),
    G.ERRORS_MANY: ({"error_count": 3}, {"error_count": 2}),
    G.EMBARGO_OVER: ({"embargo_steps": 0}, {"embargo_steps": 1}),
    G.NON_FINITE: ({"is_broken": 1}, {"is_broken": 0}),
    G.QUARANTINED: ({"is_quarantined": 1}, {"is_quarantined": 0}),
    G.TRAINING_PLACE: ({"has_place": 1}, {"has_place": 0}),
    G.LOSS_SETTLED: ({"is_settled": 1}, {"is_settled": 0}),
    G.ACTS_AT_ONCE: ({"trains_first": 0}, {"trains_first": 1}),
    G.TRAINS_FIRST: ({"trains_first": 1}, {"trains_first": 0}),
    G.CONTRIBUTION_UNKNOWN: (
        {"num_contributions": 0},
        {"num_contributions": 1, "contribution": -1.0},
    ),
}
# As closed as a row can be; its one survey speaks against the seed, and is too few for a verdict.
CLOSED: dict[str, Any] = {k: v for gate in reversed(COLUMNS) for k, v in COLUMNS[gate][1].items()}
MIN, MAX = 20, 50

# A closed gate that opens another edge: (edge, gate) -> (stage, cause) it ends in instead.
ELSEWHERE = {
    (1, G.TRAINS_FIRST): (S.GRAFTING, C.GATE),
    (4, G.UTILITY_MEASURED): (S.CULLED, C.DWELL_LIMIT),
    (4, G.UTILITY_POSITIVE): (S.CULLED, C.DWELL_LIMIT),
    (10, G.CONTRIBUTION_POSITIVE): (S.CULLED, C.MEASURED_WORTHLESS),
    (13, G.CONTRIBUTION_UNKNOWN): (S.CULLED, C.DWELL_LIMIT),
    (17, G.CONTRIBUTION_UNKNOWN): (S.CULLED, C.DWELL_LIMIT),
}


class Case(NamedTuple):
    edge: int
    closed: Gate | None
    source: Stage
    steps: int
    columns: dict[str, Any]

    @property
    def name(self) -> str:
        source, target, _, cause = (WAYS + GUARDS)[self.edge]
        shut = "open" if self.closed is None else f"without_{self.closed.name}"
        return f"{source.name}-{target.name}-{cause.name}-{shut}"


def make_case(edge: int, closed: Gate | None) -> Case:
    source, _, gates, _ = (WAYS + GUARDS)[edge]
    columns = dict(CLOSED)
    for gate in gates:
        if gate in COLUMNS:
            columns.update(COLUMNS[gate][gate is closed])
    steps = 0
    if G.MIN_STEPS in gates:
        steps = MIN - (closed is G.MIN_STEPS)
    if G.MAX_STEPS in gates:
        steps = MAX - (closed is G.MAX_STEPS)
    return Case(edge, closed, source, steps, columns)


CASES = [
    make_case(edge, closed)
    for edge, (_, _, gates, _) in enumerate(WAYS + GUARDS)
    for closed in (None, *gates)
]


def globals_of(case: Case) -> tuple[int, int, int]:
    return case.columns["has_place"], case.columns["is_settled"], case.columns["trains_first"]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[Stage, Cause, Gate, Stage]]:
    """Every case in its own seed; cases that share the loss and the places share one update."""
    rig = wide()
    verdicts = {}
    for key in sorted({globals_of(case) for case in CASES}):
        cases = [case for case in CASES if globals_of(case) == key]
        assert len(cases) <= 128
        spare = 128 - len(cases)
        rows = [case.columns for case in cases] + [CLOSED] * spare

        def column(name: str, rows: Any = rows) -> np.ndarray:
            return np.asarray([columns[name] for columns in rows])

        stage = [case.source for case in cases] + [S.DORMANT] * spare
        acts = np.isin(stage, range(3, 8))
        with strict():
            state = place(
                rig.growth,
                rig.fresh(),
                stage,
                steps_in_stage=[case.steps for case in cases] + [0] * spare,
                utility_slow=column("utility") * column("gap"),
                alpha=np.where(acts, column("alpha"), 0.0),
                **{
                    name: column(name)
                    for name in (
                        "num_live_steps",
                        "utility",
                        "num_contributions",
                        "contribution",
                        "stability",
                        "error_count",
                        "embargo_steps",
                    )
                },
            )
            has_place, is_settled, trains_first = key
            state = limits(
                state,
                min_steps=dict.fromkeys(range(1, 7), MIN),
                max_steps=dict.fromkeys((*range(1, 7), 10), MAX),
                max_training=128 if has_place else 0,
                min_contribution=0.5,
                train_first=bool(trains_first),
            )
            track = calm_track()
            state = state._replace(
                loss=track if is_settled else track._replace(fast=jnp.float32(1.5)),
                governor=state.governor._replace(
                    quarantine=jnp.asarray(column("is_quarantined") > 0)
                ),
            )
        shown = silent(128)._replace(num_errors=jnp.asarray(column("is_broken"), jnp.float32))
        after, info = rig.step(state, loss=1.0, reading=shown)
        for seed, case in enumerate(cases):
            verdicts[case.name] = (
                Stage(int(after.seeds.stage[seed])),
                Cause(int(info.cause[seed])),
                Gate(int(info.waiting_for[seed])),
                Stage(int(info.before[seed])),
            )
    return verdicts


def test_edges_are_the_ones_written_here() -> None:
    assert [tuple(edge) for edge in EDGES] == WAYS
    assert [tuple(edge) for edge in GUARD_EDGES] == GUARDS
    used = {gate for edge in (*EDGES, *GUARD_EDGES) for gate in edge.gates}
    assert used == set(TESTS) == set(Gate) - {G.OPEN, G.PAUSED}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_edge_opens_exactly_with_all_of_its_gates(verdicts: Any, case: Case) -> None:
    source, target, _, cause = (WAYS + GUARDS)[case.edge]
    stage, told, waiting_for, before = verdicts[case.name]
    assert before == source
    if case.closed is None:
        assert (stage, told, waiting_for) == (target, cause, G.OPEN)
        return
    elsewhere = ELSEWHERE.get((case.edge, case.closed))
    if elsewhere is not None:
        assert (stage, told) == elsewhere
        return
    assert (stage, told) == (source, C.NONE)
    is_first = case.edge < len(WAYS) and source not in [way[0] for way in WAYS[: case.edge]]
    by_option = source == S.GERMINATED and G.MIN_STEPS in (WAYS + GUARDS)[case.edge][2]
    if (is_first or by_option) and case.closed not in {G.ACTS_AT_ONCE, G.TRAINS_FIRST}:
        assert waiting_for == case.closed


def drive(rig: Any, state: Any, num_steps: int, **step: Any) -> list[Any]:
    """States and infos of so many updates."""
    told = []
    for _ in range(num_steps):
        state, info = rig.step(state, **step)
        told.append((state, info))
    return told


# --- nothing hangs -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [1.0, np.nan])
def test_without_any_measurement_every_way_ends(loss: float) -> None:
    rig = wide()
    start = np.resize([1, 2, 3, 4, 5, 6, 8, 9], 128)
    state = place(rig.growth, rig.fresh(), start, embargo_steps=np.isin(start, (8, 9)) * 7)
    # No loss, no reading, no survey, no training place and a graft that would need 100 steps.
    state = limits(state, min_steps=1, max_steps=5, embargo_steps=7, max_training=0)
    state = state._replace(loss=loss_track())
    told = drive(rig, state, 3 * (5 + 1) + 7 + 2, loss=loss)
    final = told[-1][0]
    # What nobody measured is not removed once it acts fully.
    kept = np.isin(start, (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING))
    ends = np.where(kept, S.FOSSILIZED, S.DORMANT)
    assert np.asarray(final.seeds.stage).tolist() == ends.tolist()
    assert np.count_nonzero(np.asarray(final.owner) != NONE) == np.count_nonzero(kept)
    assert all(not state_faults(rig.growth, state) for state, _ in told)


def test_with_training_places_too() -> None:
    rig = wide()
    state = place(rig.growth, rig.fresh(), np.full(128, S.GERMINATED))
    state = limits(state, min_steps=1, max_steps=5, embargo_steps=3, max_training=200)
    told = drive(rig, state, 20)
    stages = np.stack([np.asarray(state.seeds.stage) for state, _ in told])
    assert (stages == S.TRAINING).any()
    assert (stages[-1] == S.DORMANT).all()


@pytest.mark.parametrize(
    ("stage", "kept"), [(S.EVALUATING, S.FINE_TUNING), (S.FINE_TUNING, S.FOSSILIZED)]
)
def test_too_few_surveys_remove_nothing_that_they_speak_for(stage: Stage, kept: Stage) -> None:
    rig = small()
    state = place(
        rig.growth,
        rig.fresh(),
        [stage, stage, 0, stage, stage, 0, 0],
        steps_in_stage=1000,
        num_contributions=[1, 1, 0, 0, 2, 0, 0],
        contribution=[0.9, -0.9, 0, 0, 1e-9, 0, 0],
        stability=0.0,
    )
    after, _ = rig.step(limits(state, min_contribution=0.5))
    ends = np.asarray(after.seeds.stage)[[0, 1, 3, 4]].tolist()
    assert ends == [kept, S.CULLED, kept, S.CULLED]


@pytest.mark.parametrize("stage", [S.DORMANT, S.FOSSILIZED])
def test_stages_without_a_longest_stay_keep_their_seeds(stage: Stage) -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [stage, *[0] * 6], steps_in_stage=100_000)
    after = drive(rig, state, 5)[-1][0]
    assert int(after.seeds.stage[0]) == stage
    assert int(after.seeds.steps_in_stage[0]) == 100_005


@pytest.mark.parametrize("stage", [S.ROLLED_BACK, S.FOSSILIZED])
def test_they_leave_by_an_explicit_command(stage: Stage) -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [stage, *[0] * 6], alpha=0.0, embargo_steps=9)
    after, info = rig.step(state, [release(0)])
    assert int(info.outcomes.code[0]) == Code.DONE
    assert int(after.seeds.stage[0]) == S.DORMANT
    assert int(after.seeds.slot[0]) == NONE


# --- embargo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [S.CULLED, S.CANCELLED])
@pytest.mark.parametrize("embargo", [0, 1, 3])
def test_embargo_counts_updates(end: Stage, embargo: int) -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [S.TRAINING, *[0] * 6])
    state = limits(state, embargo_steps=embargo)
    state, _ = rig.step(state, [transition(0, end)])
    assert int(state.seeds.embargo_steps[0]) == embargo
    assert int(state.seeds.stage[0]) == end
    for left in range(embargo, 0, -1):
        state, info = rig.step(state, [release(0), germinate(0, "scale")])
        assert int(info.outcomes.code[0]) == Code.EMBARGOED
        assert int(info.waiting_for[0]) == G.EMBARGO_OVER
        assert int(state.seeds.stage[0]) == end
        assert int(state.seeds.embargo_steps[0]) == left - 1
        assert int(state.seeds.steps_in_stage[0]) == embargo - left + 1
    state, info = rig.step(state)
    assert int(state.seeds.stage[0]) == S.DORMANT
    assert int(info.cause[0]) == C.GATE
    state, info = rig.step(state, [germinate(0, "scale")])
    assert int(info.outcomes.code[0]) == Code.DONE


# --- training places -----------------------------------------------------------------------------


def test_germinated_waits_for_a_training_place() -> None:
    rig = small()
    stage = [S.GERMINATED, S.TRAINING, S.DORMANT, S.GERMINATED, S.GERMINATED, S.GERMINATED, 0]
    state = place(rig.growth, rig.fresh(), stage, steps_in_stage=1)
    state = limits(state, max_training=3)
    state, info = rig.step(state)
    # One place is taken, so the first two that wait get the other two.
    assert np.asarray(state.seeds.stage).tolist() == [2, 2, 0, 2, 1, 1, 0]
    assert np.asarray(info.waiting_for)[[4, 5]].tolist() == [G.TRAINING_PLACE] * 2
    state, _ = rig.step(state, [cull(0)])
    assert np.asarray(state.seeds.stage).tolist() == [8, 2, 0, 2, 1, 1, 0]
    state, _ = rig.step(state)
    assert np.asarray(state.seeds.stage).tolist() == [8, 2, 0, 2, 2, 1, 0]


def test_a_seed_that_cannot_move_takes_no_place() -> None:
    rig = small()
    stage = [S.GERMINATED, S.GERMINATED, 0, S.GERMINATED, 0, 0, 0]
    state = place(
        rig.growth,
        rig.fresh(),
        stage,
        steps_in_stage=[9, 1, 0, 9, 0, 0, 0],
        is_paused=[True, *[False] * 6],
    )
    state = limits(state, max_training=1, min_steps={S.GERMINATED: 5})
    state, info = rig.step(state)
    assert np.asarray(state.seeds.stage).tolist() == [1, 1, 0, 2, 0, 0, 0]
    assert np.asarray(info.waiting_for)[:2].tolist() == [G.PAUSED, G.MIN_STEPS]


# --- pauses --------------------------------------------------------------------------------------


def test_pause_freezes_alpha_dwell_and_edges_and_alpha_goes_on_without_a_jump() -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [S.GRAFTING, S.GRAFTING, *[0] * 5], alpha=0.0)
    state, _ = rig.step(state)
    state, info = rig.step(state, [pause_seed(0)])
    assert int(info.outcomes.code[0]) == Code.DONE
    held = float(state.seeds.alpha[0])
    told = drive(rig, state, 20)
    for after, info in told:
        assert float(after.seeds.alpha[0]) == held == pytest.approx(0.2)
        assert int(after.seeds.steps_in_stage[0]) == 1
        assert int(after.seeds.stage[0]) == S.GRAFTING
        assert int(info.waiting_for[0]) == G.PAUSED
    assert int(told[-1][0].seeds.stage[1]) > S.GRAFTING  # its neighbour went on
    state, _ = rig.step(told[-1][0], [resume_seed(0)])
    assert float(state.seeds.alpha[0]) == held
    assert int(state.seeds.steps_in_stage[0]) == 2
    state, _ = rig.step(state)
    assert float(state.seeds.alpha[0]) == pytest.approx(held + 0.1)


@pytest.mark.parametrize("stage", [s for s in S if 1 <= s <= 6])
def test_pause_stops_every_edge_but_the_guards(stage: Stage) -> None:
    rig = small()
    open_all = {
        "steps_in_stage": 1000,
        "alpha": 1.0 if stage >= S.GRAFTING else 0.0,
        "contribution": 1.0,
        "num_contributions": 5,
        "is_paused": [True, *[False] * 6],
    }
    state = place(rig.growth, rig.fresh(), [stage, *[0] * 6], **open_all)
    state = state._replace(
        seeds=state.seeds._replace(alpha=state.seeds.alpha.at[1:].set(0.0)),
    )
    after, info = rig.step(state)
    assert int(after.seeds.stage[0]) == stage
    assert int(after.seeds.steps_in_stage[0]) == 1000
    assert int(info.cause[0]) == C.NONE
    resumed, info = rig.step(state, [resume_seed(0)])
    assert int(resumed.seeds.stage[0]) != stage
    assert int(info.cause[0]) in {C.GATE, C.DWELL_LIMIT}
    broken = silent(7)._replace(num_errors=jnp.zeros((7,)).at[0].set(1.0))
    after, info = rig.step(state, reading=broken)
    assert int(info.cause[0]) == C.NON_FINITE
    assert not bool(after.seeds.is_paused[0])


def test_a_commanded_move_keeps_the_pause_until_the_way_ends() -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [S.EVALUATING, *[0] * 6])
    state, info = rig.step(state, [pause_seed(0)])
    state, info = rig.step(state, [transition(0, S.FINE_TUNING)])
    assert int(info.outcomes.code[0]) == Code.DONE
    assert bool(state.seeds.is_paused[0])
    state, info = rig.step(state, [transition(0, S.FOSSILIZED)])
    assert int(state.seeds.stage[0]) == S.FOSSILIZED
    assert not bool(state.seeds.is_paused[0])
    assert not state_faults(rig.growth, state)


# --- what is measured, and when ------------------------------------------------------------------


def test_not_measured_is_not_zero() -> None:
    rig = small()
    stage = [S.TRAINING, S.TRAINING, 0, S.EVALUATING, S.EVALUATING, S.DORMANT, S.DORMANT]
    state = place(
        rig.growth,
        rig.fresh(),
        stage,
        steps_in_stage=40,
        num_live_steps=[0, 30, 0, 0, 0, 0, 0],
        num_contributions=[0, 0, 0, 0, 2, 0, 0],
        num_potentials=[0, 0, 0, 0, 0, 0, 1],
    )
    after, info = rig.step(state)
    assert np.asarray(info.waiting_for)[:2].tolist() == [G.UTILITY_MEASURED, G.UTILITY_POSITIVE]
    assert np.asarray(info.is_measured).tolist() == [False, True, False, False, True, False, True]
    assert np.asarray(info.evidence).tolist() == [0.0] * 7
    # A contribution measured as zero is a verdict, one not measured is none.
    assert np.asarray(after.seeds.stage)[3:5].tolist() == [S.EVALUATING, S.CULLED]
    assert int(info.waiting_for[3]) == G.CONTRIBUTION_MEASURED
    seeds = [rig.growth.seed(state, index) for index in range(7)]
    assert [seed.utility for seed in seeds[:2]] == [None, 0.0]
    assert [seed.contribution for seed in seeds[3:5]] == [None, 0.0]
    assert [seed.potential for seed in seeds[5:]] == [None, 0.0]


@pytest.mark.parametrize(("num_steps", "is_settled"), [(0, False), (9, False), (10, True)])
def test_a_loss_average_settles_only_once_it_is_known(num_steps: int, is_settled: bool) -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [S.STABILIZATION, *[0] * 6], steps_in_stage=30)
    after, info = rig.step(state._replace(loss=calm_track(num_steps)))
    assert (int(after.seeds.stage[0]) == S.EVALUATING) == is_settled
    assert int(info.waiting_for[0]) == (G.OPEN if is_settled else G.LOSS_SETTLED)


def test_utility_averages_of_one_memory_are_no_settling() -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [S.TRAINING, *[0] * 6])
    state = limits(state, min_steps={S.TRAINING: 0})
    live = reading(7, live=1.0, utility=1.0)
    for num_steps in range(1, 12):
        state, info = rig.step(state, reading=live)
        settled = int(state.seeds.stage[0]) == S.GRAFTING
        assert settled == (num_steps == 11)
        assert int(info.waiting_for[0]) == (G.OPEN if settled else G.UTILITY_SETTLED)


def test_contributions_count_from_the_entry_of_a_stage() -> None:
    rig = small()
    state = place(
        rig.growth,
        rig.fresh(),
        [S.EVALUATING, *[0] * 6],
        steps_in_stage=40,
        num_contributions=2,
        contribution=1.0,
    )
    state, _ = rig.step(state)
    assert int(state.seeds.stage[0]) == S.FINE_TUNING
    assert int(state.seeds.num_contributions[0]) == 0


def test_a_new_life_forgets_the_old_one() -> None:
    rig = small()
    state = place(
        rig.growth,
        rig.fresh(),
        [0] * 7,
        utility=1.0,
        utility_slow=2.0,
        output_share=3.0,
        num_live_steps=4,
        error_count=5,
        contribution=6.0,
        num_contributions=7,
        stability=0.25,
        potential=8.0,
        num_potentials=9,
        mean=10.0,
        num_steps=11,
    )
    state, _ = rig.step(state, [germinate(0, "scale")])
    seeds, told = state.seeds, state.seeds.telemetry
    forgotten = (
        told.utility,
        told.utility_slow,
        told.output_share,
        told.num_live_steps,
        seeds.error_count,
        seeds.contribution,
        seeds.num_contributions,
    )
    assert [float(column[0]) for column in forgotten] == [0.0] * 7
    assert float(seeds.stability[0]) == 1.0
    # What is known of the place stays.
    assert (float(seeds.potential[0]), int(seeds.num_potentials[0])) == (8.0, 9)
    assert (float(told.mean[0]), int(told.num_steps[0])) == (10.0, 11)


# --- surveys -------------------------------------------------------------------------------------


class Surveyed(NamedTuple):
    growth: Any
    survey: Any
    params: Any
    batch: Any


@pytest.fixture(scope="module")
def surveyed() -> Surveyed:

    def loss_fn(params: Any, seeds: Any, batch: Any) -> Any:
        return mean_square(seeds.grow("hidden", batch @ params), batch)

    with strict():
        growth = ef.Growth(
            sites=[ef.site("hidden", features=4, chunks=2)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=2,
            policy=ef.policies.never(),
            adapters_at_once=None,
            max_ablations=2,
        )
        key = jax.random.key(1)
        batch = jax.random.normal(key, (8, 4))
        params = jnp.eye(4) * 0.5
        return Surveyed(growth, jax.jit(growth.survey(loss_fn)), params, batch)


def test_surveys_count_no_steps(surveyed: Surveyed) -> None:
    growth, survey, params, batch = surveyed
    state = place(growth, growth.init(jax.random.key(0)), [S.EVALUATING, 0], steps_in_stage=3)
    after = state
    for _ in range(4):
        after, info = survey(params, after, batch)
    assert np.isfinite(np.asarray(info.loss))
    measured = {"potential", "num_potentials", "contribution", "num_contributions"}
    for seed in range(2):
        old, new = row(state.seeds, seed), row(after.seeds, seed)
        assert {name for name in old if old[name] != new[name]} <= measured
    assert np.asarray(after.seeds.num_contributions).tolist() == [4, 0]
    assert np.asarray(after.seeds.num_potentials).tolist() == [4, 4]
    assert int(after.step) == int(state.step)
    told, was = after._replace(seeds=None), state._replace(seeds=None)
    key, old_key = told.key, was.key
    assert jax.random.key_data(key).tolist() == jax.random.key_data(old_key).tolist()
    told, was = told._replace(key=None), was._replace(key=None)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(was), strict=True)
    )


def test_adapters_that_break_the_held_out_loss_are_errors_and_many_of_them_end_the_trial(
    surveyed: Surveyed,
) -> None:
    growth, survey, params, batch = surveyed
    state = place(growth, growth.init(jax.random.key(0)), [S.EVALUATING, 0], steps_in_stage=3)
    huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e30), state.adapters)
    state = state._replace(loss=calm_track(), adapters=huge)
    for count in range(1, 4):
        state, info = survey(params, state, batch)
        assert not np.isfinite(np.asarray(info.loss))
        assert np.asarray(state.seeds.error_count).tolist() == [count, 0]
        assert np.asarray(state.seeds.num_contributions).tolist() == [0, 0]
        assert np.asarray(info.ablated).tolist() == [NONE, NONE]
    update = jax.jit(growth.update)
    state, info = update(state, state.adapters, silent(2), jnp.float32(1.0))
    assert int(state.seeds.stage[0]) == S.CULLED
    assert int(info.cause[0]) == C.ERRORS


def test_what_may_be_rounding_is_worth_nothing(surveyed: Surveyed) -> None:
    growth, survey, params, batch = surveyed
    state = place(growth, growth.init(jax.random.key(0)), [S.EVALUATING, 0], steps_in_stage=3)
    for scale, is_worth in ((1e-8, False), (1e-2, True)):
        adapters = jax.tree.map(lambda leaf, s=scale: jnp.full_like(leaf, s), state.adapters)
        after, info = survey(params, state._replace(adapters=adapters), batch)
        assert np.asarray(info.ablated).tolist() == [0, NONE]
        assert bool(after.seeds.contribution[0] != 0) == is_worth
        assert np.asarray(after.seeds.num_contributions).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_held_out_batch_that_is_not_finite_is_no_fault_of_any_adapter(
    surveyed: Surveyed, bad: float
) -> None:
    growth, survey, params, batch = surveyed
    state = place(growth, growth.init(jax.random.key(0)), [S.EVALUATING, 0], steps_in_stage=3)
    before, _ = survey(params, state, batch)
    after, info = survey(params, before, batch * jnp.float32(bad))
    assert np.asarray(after.seeds.error_count).tolist() == [0, 0]
    assert np.asarray(info.ablated).tolist() == [NONE, NONE]
    for old, new in zip(jax.tree.leaves(before.seeds), jax.tree.leaves(after.seeds), strict=True):
        np.testing.assert_array_equal(old, new)


# --- the loss track ------------------------------------------------------------------------------


def test_average_is_a_mean_first_and_forgets_later() -> None:
    value = jnp.float32(0.0)
    for count, new in enumerate([4.0, 2.0, 6.0]):
        value = average(value, jnp.float32(new), jnp.int32(count), 3)
    assert float(value) == pytest.approx(4.0)
    assert float(average(value, jnp.float32(10.0), jnp.int32(3), 3)) == pytest.approx(6.0)


def track(losses: list[float], start: Any = None) -> tuple[Any, list[bool]]:
    state = loss_track() if start is None else start
    spikes = []
    for loss in losses:
        state, is_spike = _track(state, jnp.float32(loss))
        spikes.append(bool(is_spike))
    return state, spikes


_track = jax.jit(track_loss)


def test_spikes_are_named_and_clipped() -> None:
    state, spikes = track([1.0, 1.1, 0.9] * 10)
    assert not any(spikes)
    after, spikes = track([50.0], state)
    assert spikes == [True]
    assert float(after.fast) < 1.2
    for loss in (np.nan, np.inf, -np.inf, 1e30):
        same, spikes = track([loss], state)
        assert spikes == [True]
        assert jax.tree.map(float, same) == jax.tree.map(float, state)


@pytest.mark.parametrize("before", [0.0, 1.0, -3.0])
def test_a_lasting_rise_after_a_constant_loss_is_followed(before: float) -> None:
    state, _ = track([before] * 30)
    after, spikes = track([before + 5.0] * 500, state)
    assert spikes[0]
    assert not spikes[-1]
    assert float(after.slow) == pytest.approx(before + 5.0, rel=1e-2)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"min_steps": {S.TRAINING: -1}}, "TRAINING"),
        ({"max_steps": {S.TRAINING: 0}}, "TRAINING"),
        ({"max_steps": {S.TRAINING: 10}}, r"at least\s+min_steps\[TRAINING\] = 30"),
        ({"max_steps": {S.DORMANT: 10}}, "DORMANT"),
        ({"min_steps": {S.FOSSILIZED: 10}}, "FOSSILIZED"),
        ({"max_training": 0}, "max_training"),
        ({"embargo_steps": -1}, "embargo_steps"),
        ({"quarantine_steps": 0}, "quarantine_steps must be at least 1"),
        ({"max_steps": {S.ROLLED_BACK: 10}}, "for ROLLED_BACK set quarantine_steps"),
        ({"max_errors": 0}, "max_errors"),
        ({"min_surveys": 0}, "min_surveys"),
        ({"trust": 0.0}, "trust"),
        ({"freeze": (S.TRAINING,)}, "freeze"),
    ],
)
def test_settings_that_would_hang_or_mean_nothing_are_refused(wrong: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ef.lifecycle.settings(**wrong)


def test_every_stage_on_its_way_has_a_longest_stay() -> None:
    told = ef.lifecycle.settings()
    assert (np.asarray(told.max_steps)[1:7] > 0).all()
    assert (np.asarray(told.max_steps)[[0, 7, 8, 9]] == 0).all()
    assert int(told.max_steps[S.ROLLED_BACK]) == 500
    assert int(ef.lifecycle.settings(quarantine_steps=None).max_steps[S.ROLLED_BACK]) == 0


def test_thresholds_are_state_and_never_compiled_in() -> None:
    rig = small()
    state = place(rig.growth, rig.fresh(), [S.TRAINING, *[0] * 6], steps_in_stage=10)
    rig.step(state)
    compiled = rig.update._cache_size()
    after, _ = rig.step(limits(state, max_steps={S.TRAINING: 10}, embargo_steps=77))
    assert int(after.seeds.stage[0]) == S.CULLED
    assert int(after.seeds.embargo_steps[0]) == 77
    rig.step(state, [roll_back(0), set_graft(1, "stability")])
    assert rig.update._cache_size() == compiled
