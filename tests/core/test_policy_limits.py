"""Rules that limit, against tables computed by hand; nesting and the decision log."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from drive import NONE, place, rig, strict
from policy_player import (
    ALL,
    BORN,
    Player,
    layout,
    observe,
    requested,
    wish,
)

from esper_fn.commands import Code, Kind, cull, germinate
from esper_fn.lifecycle import Cause
from esper_fn.policies import (
    Requests,
    budget,
    chain,
    cooldown,
    max_concurrent,
    max_total,
    never,
    periodic,
    plateau,
    refuse,
    rule,
    scripted,
    stop_after,
)


def test_max_concurrent_counts_every_stage_on_its_way() -> None:
    player = Player(max_concurrent(2))
    for stage in range(11):
        observation = observe(stage=(stage, 0, 0, 0, 0, 0))
        room = 1 if 1 <= stage <= 6 else 2
        assert len(requested(player.ask(observation, wish(1, 2, 3)))) == room, stage
    full = observe(stage=(2, 3, 6, 0, 0, 0))
    assert requested(player.ask(full, wish(3, 4, 5))) == []


def test_max_concurrent_keeps_the_most_urgent() -> None:
    player = Player(max_concurrent(2))
    assert requested(player.ask(observe(), wish(0, 2, 4, 5, priority=(0.1, 0.9, 0.5, 0.5)))) == [
        2,
        4,
    ]
    assert requested(player.ask(observe(), wish(0, 1, 5, priority=(-3.0, -2.0, -1.0)))) == [1, 5]


def test_limits_let_other_requests_pass() -> None:
    other = wish(0, 1)
    other = other._replace(kind=other.kind.at[1].set(jnp.int8(Kind.TRANSITION)))
    for policy in (max_concurrent(1), budget(0), cooldown(5), max_total(0), stop_after(0)):
        player = Player(policy)
        player.ask(observe(0), wish(3))
        busy = observe(1, stage=(0, 2, 2, 0, 0, 0), owner=[*[NONE] * 4, 3, *[NONE] * 6])
        result = player.ask(busy, other)
        assert result.kind.tolist() == [0, Kind.TRANSITION, 0, 0, 0, 0], policy.rules


@pytest.mark.parametrize(
    ("limit", "owner", "wished", "expected"),
    [
        # Prices: scale 4 in `a`, 8 in `b`; rank 8 in `a`, 16 in `b`; conv 8 in `c`.
        (0, {}, wish(0), []),
        (4, {}, wish(0), [0]),
        (11, {}, wish(0, 3), [0]),
        (12, {}, wish(0, 3), [0, 3]),
        (8, {}, wish(0, 3, priority=(0.0, 1.0)), [3]),
        (24, {}, wish(1, 4, blueprint=1), [1, 4]),
        (23, {}, wish(1, 4, blueprint=1), [1]),
        (8, {}, wish(5, blueprint=2), [5]),
        # Living adapters count: slot 6 holds a rank in `b` (16), slot 0 a scale in `a` (4).
        (23, {6: 3, 0: 0}, wish(1), []),
        (24, {6: 3, 0: 0}, wish(1), [1]),
        # One that is too dear is passed over.
        (4, {}, wish(0, 3, priority=(0.0, 1.0)), [0]),
    ],
)
def test_budget_counts_parameters(
    limit: int, owner: dict[int, int], wished: Requests, expected: list[int]
) -> None:
    owners = [owner.get(slot, NONE) for slot in range(11)]
    assert requested(Player(budget(limit)).ask(observe(owner=owners), wished)) == expected


def test_cooldown_table() -> None:
    player = Player(cooldown(3))
    wishes = [True, True, True, True, False, False, False, True, True]
    result: list[int] = []
    for step, is_wished in enumerate(wishes):
        owners = BORN if result and result[-1] else [NONE] * 11
        requests = wish(0, 1) if is_wished else None
        result.append(len(requested(player.ask(observe(step, owner=owners), requests))))
    # All that is asked in one step passes together.
    assert result == [2, 0, 0, 2, 0, 0, 0, 2, 0]


def test_a_cooldown_of_nothing_lets_all_pass() -> None:
    player = Player(cooldown(0))
    assert [len(requested(player.ask(observe(step), wish(0)))) for step in range(3)] == [1, 1, 1]


def test_max_total_counts_what_passes_and_takes_place() -> None:
    player = Player(max_total(3))
    result = []
    owners = [NONE] * 11
    for step, wished in enumerate([wish(0, 1), None, wish(2, 3, priority=(0.1, 0.2)), wish(4)]):
        result.append(requested(player.ask(observe(step, owner=owners), wished)))
        for seed in result[-1]:
            owners[{0: 0, 1: 1, 3: 4}[seed]] = seed
    assert result == [[0, 1], [], [3], []]
    assert int(player.state.left) == 0


def test_stop_after_ends_germination() -> None:
    player = Player(stop_after(2))
    assert [requested(player.ask(observe(step), wish(0))) for step in range(4)] == [
        [0],
        [0],
        [],
        [],
    ]


def test_numbers_of_rules_are_state() -> None:
    player = Player(max_concurrent(1))
    player.state = player.state._replace(limit=jnp.int32(4))
    assert len(requested(player.ask(observe(), wish(0, 1, 2)))) == 3
    assert player.decide._cache_size() == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: periodic(every=0),
        lambda: periodic(every=1, count=0),
        lambda: periodic(every=1, score="luck"),  # type: ignore[arg-type]
        lambda: plateau(patience=0),
        lambda: max_concurrent(0),
        lambda: budget(-1),
        lambda: cooldown(-1),
        lambda: max_total(-1),
        lambda: chain(*[never()] * 128),
    ],
)
def test_wrong_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"got|must"):
        wrong()


def test_chain_notes_who_asked_and_who_refused() -> None:
    policy = chain(periodic(every=2, count=3), max_concurrent(2), cooldown(3))
    assert policy.rules == ("periodic", "max_concurrent", "cooldown")
    player = Player(policy)
    first = player.ask(observe(0, potential=ALL))
    assert requested(first) == [1, 3]
    assert first.requested_by.tolist() == [NONE, 0, NONE, 0, NONE, 0]
    assert first.vetoed_by.tolist() == [NONE, NONE, NONE, NONE, NONE, 1]
    owners = [1, *[NONE] * 3, 3, *[NONE] * 6]
    second = player.ask(observe(2, potential=ALL, owner=owners))
    assert requested(second) == []
    assert second.requested_by.tolist() == [NONE, 0, NONE, 0, NONE, 0]
    assert second.vetoed_by.tolist() == [NONE, 2, NONE, 2, NONE, 1]


def test_nesting_changes_neither_decision_nor_log() -> None:
    def rules() -> list[Any]:
        return [
            scripted([(0, cull(2)), (1, germinate(2, "rank"))]),
            periodic(every=1, count=4),
            max_concurrent(3),
            cooldown(2),
            periodic(every=2, count=1, name="again"),
            stop_after(3),
        ]

    a, b, c, d, e, f = rules()
    arrangements = [
        chain(*rules()),
        chain(chain(a, b), chain(c, d), chain(e, f)),
        chain(a, chain(chain(chain(b), c), chain(d, chain(e, chain(f))))),
    ]
    logs = []
    for policy in arrangements:
        assert policy.rules == arrangements[0].rules
        player = Player(policy)
        logs.append([player.ask(observe(step, potential=ALL)) for step in range(5)])
    for log in logs[1:]:
        for first, other in zip(logs[0], log, strict=True):
            for name, column in first._asdict().items():
                np.testing.assert_array_equal(column, getattr(other, name), name)
    assert any((np.asarray(result.vetoed_by) >= 2).any() for result in logs[0])


def test_a_later_rule_that_asks_anew_lifts_the_veto() -> None:
    policy = chain(
        periodic(every=1), max_total(0), periodic(every=1, blueprint="rank", name="again")
    )
    result = Player(policy).ask(observe(potential=ALL))
    assert requested(result) == [1]
    assert (int(result.requested_by[1]), int(result.vetoed_by[1])) == (2, NONE)
    assert int(result.blueprint[1]) == 1


def test_a_rule_that_overwrites_a_request_has_asked_it() -> None:
    policy = chain(periodic(every=1), scripted([(0, germinate(1, "rank"))]))
    result = Player(policy).ask(observe(potential=ALL))
    assert (int(result.requested_by[1]), int(result.blueprint[1])) == (1, 1)


def test_what_was_struck_leaves_nothing_behind() -> None:
    policy = chain(
        scripted([(0, germinate(1, "rank", "slow"))], grafts=("fast", "slow")),
        max_total(0),
        periodic(every=1),
    )
    result = Player(policy).ask(observe(potential=ALL))
    assert (int(result.blueprint[1]), int(result.graft[1])) == (0, NONE)


def test_an_own_rule_nests_like_the_others() -> None:
    def decide(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        del layout, observation, key
        odd = jnp.arange(6) % 2 == 1
        return state + 1, refuse(requests, odd)

    policy = chain(periodic(every=1, count=6), rule("even", lambda layout: jnp.int32(0), decide))
    player = Player(policy)
    result = player.ask(observe(potential=ALL))
    assert requested(result) == [2, 4]
    assert result.vetoed_by.tolist() == [NONE, 1, NONE, 1, NONE, 1]
    assert int(player.state[1]) == 1


def test_an_empty_chain_is_never() -> None:
    result = Player(chain()).ask(observe(potential=ALL), wish(1))
    assert requested(result) == [1]


def test_a_decision_in_a_run_can_be_explained() -> None:
    policy = chain(
        chain(periodic(every=1, count=2), max_concurrent(3)), scripted([(1, cull(5))]), cooldown(3)
    )
    with strict():
        made = rig(layout(), rows=1, policy=policy)
    state = place(made.growth, made.fresh(), [0] * 6, potential=ALL, num_potentials=1)
    names = made.growth.policy.rules
    assert names == ("periodic", "max_concurrent", "scripted", "cooldown")
    result = []
    for _ in range(3):
        state, info = made.step(state)
        columns = (info.requested_by, info.vetoed_by, info.request_code, info.cause)
        result.append(
            {
                seed: (names[asker], names[refuser] if refuser >= 0 else None, code, cause)
                for seed, (asker, refuser, code, cause) in enumerate(
                    zip(*(np.asarray(column).tolist() for column in columns), strict=True)
                )
                if asker >= 0
            }
        )
    done, silence = (Code.DONE, Cause.POLICY), (Code.NOT_ASKED, Cause.NONE)
    assert result == [
        {1: ("periodic", None, *done), 3: ("periodic", None, *done)},
        # Two are on their way, so one of the next two is too many; a script overwrites the other.
        {
            5: ("scripted", None, Code.ILLEGAL_TRANSITION, Cause.NONE),
            2: ("periodic", "max_concurrent", *silence),
        },
        {5: ("periodic", "cooldown", *silence), 2: ("periodic", "max_concurrent", *silence)},
    ]
