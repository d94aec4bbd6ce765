"""Rules that ask, against tables computed by hand; the default rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from drive import NONE
from policy_player import (
    ALL,
    EVERY_STEP,
    Player,
    layout,
    observe,
    requested,
    wish,
)

from esper_fn.commands import Kind, cull, germinate, pause_seed
from esper_fn.errors import CommandError, UnknownNameError
from esper_fn.lifecycle import Stage
from esper_fn.policies import (
    grow,
    never,
    periodic,
    plateau,
    random,
    scripted,
)


def test_the_layout_is_the_one_written_here() -> None:
    result = layout()
    assert (result.num_seeds, result.num_slots) == (6, 11)
    assert result.tables.costs.tolist() == [[4, 8, 0], [8, 16, 0], [4, 8, 8]]
    assert result.tables.slot_pool_start.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 9, 10]


def test_never_asks_nothing() -> None:
    result = Player(never()).ask(observe(potential=ALL, loss=1.0))
    assert requested(result) == []


def test_periodic_asks_when_it_is_due_and_for_the_best() -> None:
    player = Player(periodic(every=3, start=2))
    result = {step: requested(player.ask(observe(step, potential=ALL))) for step in range(9)}
    assert {step: seeds for step, seeds in result.items() if seeds} == {2: [1], 5: [1], 8: [1]}


@pytest.mark.parametrize(
    ("why", "columns", "expected"),
    [
        ("the best", {}, 1),
        ("the first of equals", {"potential": (0.5,) * 6}, 0),
        ("only measured ones", {"potential": (None, None, 0.1, None, None, None)}, 2),
        ("not a dead one", {"potential": (0.0, 0.0, 0.2, 0.0, float("nan"), 0.1)}, 2),
        ("only dormant ones", {"stage": (0, 2, 0, 8, 0, 10)}, 2),
        ("only where there is room", {"owner": (0, 2, *[NONE] * 9)}, 3),
        ("of this blueprint", {"owner": (NONE, NONE, 0, 2, *[NONE] * 7)}, 1),
    ],
)
def test_periodic_chooses(why: str, columns: dict[str, Any], expected: int) -> None:
    result = Player(EVERY_STEP).ask(observe(**{"potential": ALL, **columns}))
    assert requested(result) == [expected], why
    assert int(result.blueprint[expected]) == 0
    assert int(result.graft[expected]) == NONE


def test_nothing_is_asked_where_nothing_is_measured() -> None:
    for policy in (EVERY_STEP, periodic(every=1, score="gradient")):
        assert requested(Player(policy).ask(observe())) == []


def test_periodic_by_gradient() -> None:
    gradient = (None, 0.1, 0.2, None, 0.9, None)
    player = Player(periodic(every=1, score="gradient", count=2))
    assert requested(player.ask(observe(gradient=gradient, potential=ALL))) == [2, 4]


def test_periodic_by_blueprint() -> None:
    result = Player(periodic(every=1, blueprint="conv", count=6)).ask(observe(potential=ALL))
    assert requested(result) == [5]
    assert int(result.blueprint[5]) == 2
    with pytest.raises(UnknownNameError, match="'rope'"):
        Player(periodic(every=1, blueprint="rope")).ask(observe(potential=ALL))


def test_of_each_pool_no_more_is_asked_than_it_has_room_for() -> None:
    player = Player(periodic(every=1, count=6))
    # `a` has 2 slots for its 3 seeds: the two with the largest potential get them.
    result = player.ask(observe(potential=ALL))
    assert requested(result) == [1, 2, 3, 4, 5]
    assert result.priority.tolist() == pytest.approx([0.0, 0.6, 0.3, 0.5, 0.2, 0.4])
    one_left = observe(potential=ALL, owner=(NONE, 1, *[NONE] * 9), stage=(0, 2, 0, 0, 0, 0))
    assert requested(player.ask(one_left)) == [2, 3, 4, 5]


def test_a_rule_does_not_touch_what_is_asked_already() -> None:
    result = Player(EVERY_STEP).ask(observe(potential=ALL), wish(1, blueprint=1))
    assert requested(result) == [1, 3]
    assert result.blueprint.tolist()[:4] == [NONE, 1, NONE, 0]


def test_random_draws_every_place() -> None:
    player = Player(random(every=1))
    assert player.policy.rules == ("random",)
    drawn = [requested(player.ask(observe(step))) for step in range(200)]
    assert all(len(seeds) == 1 for seeds in drawn)
    counts = np.bincount([seeds[0] for seeds in drawn], minlength=6)
    assert counts.min() >= 15
    again = Player(random(every=1))
    assert [requested(again.ask(observe(step))) for step in range(20)] == drawn[:20]


def test_plateau_asks_after_patience() -> None:
    player = Player(plateau(patience=3, min_gain=0.1))
    # A fall counts when it is a tenth of the loss below the best.
    table = [
        (0, 10.0, []),  # the first loss is a fall
        (1, 9.5, []),
        (2, 9.4, []),
        (3, 9.2, [1]),  # three steps without a fall: 9.2 is not below 10 - 0.92
        (4, 9.0, []),  # it is now
        (5, 9.0, []),
        (6, 9.0, []),
        (7, 9.0, [1]),
        (8, 9.0, [1]),  # on every step...
    ]
    for step, loss, expected in table:
        assert requested(player.ask(observe(step, loss=loss, potential=ALL))) == expected, step
    # ...until something germinates; then patience starts anew.
    born = observe(9, loss=9.0, potential=ALL, stage=(0, 1, 0, 0, 0, 0), steps_in_stage=(0,) * 6)
    later = [observe(step, loss=9.0, potential=ALL) for step in range(10, 13)]
    assert [requested(player.ask(observation)) for observation in (born, *later)] == [
        [],
        [],
        [],
        [1],
    ]


def test_plateau_of_a_negative_loss() -> None:
    player = Player(plateau(patience=2, min_gain=0.1))
    losses = [-1.0, -1.05, -1.06, -1.2, -1.2, -1.2]
    result = [
        requested(player.ask(observe(step, loss=loss, potential=ALL)))
        for step, loss in enumerate(losses)
    ]
    assert result == [[], [], [1], [], [], [1]]


def test_plateau_without_any_loss_has_patience_too() -> None:
    player = Player(plateau(patience=2))
    result = [requested(player.ask(observe(step, potential=ALL))) for step in range(4)]
    assert result == [[], [], [1], [1]]


def test_a_paused_newborn_does_not_hold_the_plateau_up() -> None:
    player = Player(plateau(patience=2))
    columns = {
        "loss": 1.0,
        "potential": ALL,
        "stage": (1, 0, 0, 0, 0, 0),
        "steps_in_stage": (0,) * 6,
        "is_paused": (True, *[False] * 5),
    }
    result = [requested(player.ask(observe(step, **columns))) for step in range(4)]
    assert result == [[], [], [1], [1]]


def test_scripted_asks_what_is_written_when_it_is_written() -> None:
    events = [
        (1, germinate(4, "rank", "slow")),
        (1, germinate(0, "scale")),
        (3, cull(4)),
        (3, pause_seed(0)),
    ]
    player = Player(scripted(events, grafts=("fast", "slow")))
    result = [player.ask(observe(step)) for step in range(5)]
    kinds = [np.asarray(requests.kind).tolist() for requests in result]
    G, T, P = Kind.GERMINATE, Kind.TRANSITION, Kind.PAUSE
    idle = [0] * 6
    assert kinds == [idle, [G, 0, 0, 0, G, 0], idle, [P, 0, 0, 0, T, 0], idle]
    assert (int(result[1].blueprint[4]), int(result[1].graft[4])) == (1, 1)
    assert (int(result[1].blueprint[0]), int(result[1].graft[0])) == (0, NONE)
    assert int(result[3].target[4]) == Stage.CULLED
    assert result[3].requested_by.tolist() == [0, NONE, NONE, NONE, 0, NONE]
    assert requested(Player(scripted([])).ask(observe())) == []


def test_scripts_that_cannot_be_played_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[\(1, 0\)\]"):
        scripted([(1, cull(0)), (2, cull(0)), (1, pause_seed(0))])
    with pytest.raises(UnknownNameError, match="'slow'"):
        scripted([(0, germinate(0, "scale", "slow"))], grafts=("fast",)).init(layout())
    with pytest.raises(UnknownNameError, match="'rope'"):
        scripted([(0, germinate(0, "rope"))]).init(layout())
    for seed in (-1, 6):
        with pytest.raises(CommandError, match=f"seed {seed}"):
            scripted([(0, cull(seed))]).init(layout())


PROMISE = (0.1, 0.6, 0.3, 0.5, 0.15, 0.4)


@pytest.mark.parametrize(
    ("options", "columns", "expected"),
    [
        ({}, {"potential": PROMISE}, [1, 2, 3, 5]),  # at least a third of 0.6
        ({"min_share": 0.6}, {"potential": PROMISE}, [1, 3, 5]),
        ({"min_share": 1.0}, {"potential": PROMISE}, [1]),
        # As many as a pool has room for, and those the best ones.
        ({"min_share": 0.0}, {"potential": PROMISE}, [1, 2, 3, 4, 5]),
        ({"count": 2}, {"potential": PROMISE}, [1, 3]),
        ({}, {"potential": (None, None, 0.3, 0.0, 0.11, 0.09)}, [2, 4]),
        ({"blueprint": "conv"}, {"potential": PROMISE}, [5]),
        # No survey yet: all that there is room for, one of each layer in turn.
        ({}, {}, [0, 1, 3, 4, 5]),
        ({"count": 4}, {}, [0, 1, 3, 5]),
        ({"count": 3}, {"stage": (0, 0, 0, 0, 0, 7)}, [0, 1, 3]),
        ({"score": "even", "count": 3}, {"potential": PROMISE}, [0, 3, 5]),
        ({"score": "gradient"}, {"gradient": (None, 0.1, None, 0.9, None, None)}, [1, 3]),
    ],
)
def test_grow_asks_at_once(
    options: dict[str, Any], columns: dict[str, Any], expected: list[int]
) -> None:
    player = Player(grow(every=4, **options))
    assert requested(player.ask(observe(0, **columns))) == expected
    assert [requested(player.ask(observe(step, **columns))) for step in (1, 2, 3)] == [[]] * 3
    assert requested(player.ask(observe(4, **columns))) == expected


def test_grow_asks_at_once_whenever_the_run_begins() -> None:
    player = Player(grow(every=10))
    assert requested(player.ask(observe(123, potential=PROMISE))) == [1, 2, 3, 5]
    assert requested(player.ask(observe(132, potential=PROMISE))) == []
    assert requested(player.ask(observe(133, potential=PROMISE))) == [1, 2, 3, 5]


def test_grow_measures_later_potentials_by_the_first_largest() -> None:
    player = Player(grow(every=1))
    player.ask(observe(0, potential=PROMISE))
    now = (0.19, 0.21, 0.05, 0.3, 0.1, 0.0)  # a third of the first largest one is 0.2
    assert requested(player.ask(observe(1, potential=now))) == [1, 3]
    assert requested(player.ask(observe(2, potential=(0.1,) * 6))) == []


def test_grow_measures_by_the_first_survey_also_where_it_comes_late() -> None:
    player = Player(grow(every=1))
    assert requested(player.ask(observe(0))) == [0, 1, 3, 4, 5]  # the first pool has two slots
    assert requested(player.ask(observe(1, potential=PROMISE))) == [1, 2, 3, 5]
    assert requested(player.ask(observe(2, potential=(0.1,) * 6))) == []


def test_grow_leaves_places_alone_whose_adapters_did_harm_unless_they_promise_more() -> None:
    player = Player(grow(every=1))
    player.ask(observe(0, potential=PROMISE))
    harm = (None, -0.1, None, None, None, None)
    assert requested(player.ask(observe(1, potential=PROMISE, contribution=harm))) == [2, 3, 5]
    now = (0.1, 0.7, 0.3, 0.5, 0.15, 0.4)
    assert requested(player.ask(observe(2, potential=now, contribution=harm))) == [1, 2, 3, 5]


def test_grow_goes_on_while_living_adapters_are_worth_something() -> None:
    ft = Stage.FINE_TUNING

    def asks(stage: Sequence[int], contribution: Sequence[float | None]) -> bool:
        player = Player(grow(every=1))
        begun = observe(0, potential=PROMISE, stage=stage, contribution=contribution)
        assert requested(player.ask(begun)) == [5]  # the first request waits for nothing
        after = observe(1, potential=PROMISE, stage=stage, contribution=contribution)
        return requested(player.ask(after)) == [5]

    two = (ft, ft, 8, 8, 8, 0)
    assert asks(two, (None,) * 6)  # nothing measured yet
    assert asks(two, (0.3, -0.1, *[None] * 4))
    assert not asks(two, (0.1, -0.3, *[None] * 4))
    assert not asks(two, (-0.1, *[None] * 5))
    assert asks(two, (0.1, None, -5.0, -5.0, None, None))  # the dead no longer count
    assert asks((7, 7, 8, 8, 8, 0), (0.1, 0.2, *[None] * 4))
    assert not asks((7, 7, 8, 8, 8, 0), (-0.1, 0.05, *[None] * 4))


def test_grow_asks_again_once_it_pays() -> None:
    player = Player(grow(every=3))
    stage = (Stage.FINE_TUNING, 8, 8, 8, 8, 0)
    result = [
        requested(player.ask(observe(step, potential=PROMISE, stage=stage, contribution=worth)))
        for step, worth in enumerate([(w, *[None] * 5) for w in (-1, -1, -1, -1, -1, 1, 1, 1, 1)])
    ]
    assert result == [[5], [], [], [], [], [5], [], [], [5]]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_grow_wants_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"min_share must be between 0 and 1, got"):
        grow(min_share=share)
