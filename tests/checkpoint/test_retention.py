"""Retention: hand-computed tables, and what never happens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_fn.checkpoint import (
    Retention,
    best,
    every,
    everything,
    latest,
    pinned,
    within_bytes,
)
from esper_fn.checkpoint._retention import Step, decide


def history(*numbers: int, size: int = 10, **metrics: list[float]) -> list[Step]:
    return [
        Step(
            step=number,
            blobs={f"own {number}": size},
            metrics={name: row[i] for name, row in metrics.items()},
        )
        for i, number in enumerate(numbers)
    ]


def chosen(keep: Retention, steps: list[Step], **options: Any) -> list[int]:
    arguments = {"protected": {}, **options}
    return [row.step for row in decide(keep, steps, **arguments) if row.is_kept]


STEPS = history(0, 100, 200, 250, 300, 400, loss=[9, 3, 5, float("nan"), 3, 4])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (latest(2), [300, 400]),
        (latest(99), [0, 100, 200, 250, 300, 400]),
        (every(200), [0, 200, 400]),
        (best(1, "loss"), [300]),
        (best(2, "loss"), [100, 300]),
        (best(1, "loss", "max"), [0]),
        (best(3, "no such metric"), []),
        (pinned([250, 7]), [250]),
        (within_bytes(25), [300, 400]),
        (within_bytes(9), []),
        (latest(1) | every(200), [0, 200, 400]),
        (latest(3) & every(200), [400]),
        (every(200) & latest(2), [200, 400]),
        ((latest(3) | pinned([0])) & within_bytes(30), [250, 300, 400]),
        (everything(), [0, 100, 200, 250, 300, 400]),
    ],
)
def test_table(keep: Retention, expected: list[int]) -> None:
    assert chosen(keep, STEPS) == expected


def test_protected_steps_stay_and_count_first() -> None:
    assert chosen(within_bytes(20), STEPS, protected={0: "last good"}) == [0, 400]
    assert chosen(latest(1), STEPS, protected={100: "pinned"}) == [100, 400]


def test_room_is_made_for_a_step_about_to_be_written() -> None:
    assert chosen(within_bytes(30), STEPS, incoming_bytes=10) == [300, 400]
    assert chosen(latest(3) & within_bytes(30), STEPS, incoming_bytes=25) == []


def test_shared_files_count_once() -> None:
    steps = [Step(step=n, blobs={"host": 100, f"own {n}": 1}, metrics={}) for n in range(5)]
    assert chosen(within_bytes(103), steps) == [2, 3, 4]


def test_damaged_steps_go_once_a_sound_one_is_newer() -> None:
    bad = Step(step=150, blobs={}, metrics={"loss": 0.0}, is_sound=False)
    newest = Step(step=500, blobs={}, metrics={}, is_sound=False)
    decisions = {row.step: row for row in decide(everything(), [*STEPS, bad, newest], protected={})}
    assert not decisions[150].is_kept
    assert decisions[500].is_kept
    assert "no newer step is sound" in decisions[500].why
    assert 150 not in chosen(best(1, "loss"), [*STEPS, bad])


def test_every_decision_says_why() -> None:
    rows = {row.step: row.why for row in decide(latest(1) | best(1, "loss"), STEPS, protected={})}
    assert rows[400] == "among the latest 1"
    assert rows[300] == "among the 1 best by loss (3)"
    assert rows[0] == "not kept by (latest(1) | best(1, 'loss', 'min'))"


def test_the_budget_of_a_combination() -> None:
    assert (latest(3) & within_bytes(5)).max_bytes == 5
    assert (within_bytes(7) & within_bytes(5)).max_bytes == 5
    assert (within_bytes(7) | within_bytes(5)).max_bytes == 7
    assert (latest(3) | within_bytes(5)).max_bytes is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: latest(0),
        lambda: every(True),
        lambda: best(1, "loss", "lowest"),  # type: ignore[arg-type]
        lambda: within_bytes(-1),
        lambda: pinned([-1]),
    ],
)
def test_bad_numbers_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


RETENTIONS = st.recursive(
    st.builds(latest, st.integers(1, 5))
    | st.builds(every, st.integers(1, 5))
    | st.builds(best, st.integers(1, 3), st.just("loss"))
    | st.builds(within_bytes, st.integers(1, 100))
    | st.builds(pinned, st.lists(st.integers(0, 9), max_size=3)),
    lambda inner: (
        st.builds(lambda a, b: a | b, inner, inner) | st.builds(lambda a, b: a & b, inner, inner)
    ),
    max_leaves=5,
)
HISTORIES = st.lists(
    st.builds(
        Step,
        step=st.integers(0, 9),
        blobs=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 40)),
        metrics=st.dictionaries(st.just("loss"), st.floats()),
        is_sound=st.booleans(),
    ),
    unique_by=lambda row: row.step,
)


@given(RETENTIONS, HISTORIES, st.data())
def test_protected_steps_never_go_and_each_step_is_decided_once(
    keep: Retention, steps: list[Step], data: st.DataObject
) -> None:
    numbers = [row.step for row in steps]
    shielded = data.draw(st.sets(st.sampled_from(numbers))) if numbers else set()
    decisions = decide(keep, steps, protected=dict.fromkeys(shielded, "why"))
    assert [row.step for row in decisions] == sorted(numbers)
    assert all(row.is_kept for row in decisions if row.step in shielded)
    assert decisions == decide(keep, reversed(steps), protected=dict.fromkeys(shielded, "why"))


@given(st.integers(1, 100), HISTORIES, st.integers(0, 50))
def test_what_a_budget_keeps_fits_it(budget: int, steps: list[Step], incoming: int) -> None:
    sound = [row for row in steps if row.is_sound]
    decisions = decide(within_bytes(budget), sound, protected={}, incoming_bytes=incoming)
    blobs: dict[str, int] = {}
    for row in sorted(sound, key=lambda row: -row.step):
        if {d.step: d.is_kept for d in decisions}[row.step]:
            blobs |= row.blobs
    assert sum(blobs.values()) + incoming <= budget or not blobs
