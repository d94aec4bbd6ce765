"""Every rule against tables computed by hand; nesting; one conformance test over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import NONE, place, rig, strict

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.commands import Code, Kind, cull, germinate, pause_seed
from esper_fn.errors import CommandError, UnknownNameError
from esper_fn.lifecycle import Cause, Stage
from esper_fn.lifecycle._loss import loss_track
from esper_fn.lifecycle._state import seed_state
from esper_fn.policies import (
    Observation,
    Requests,
    _select,
    budget,
    chain,
    cooldown,
    grow,
    max_concurrent,
    max_total,
    never,
    no_requests,
    periodic,
    plateau,
    random,
    refuse,
    request,
    rule,
    scripted,
    stop_after,
)


@lru_cache(maxsize=1)
def layout() -> Any:
    """Seeds 0-2 of `a` (2 features each), 3-4 of `b` (4 each), 5 of the image `c`.

    Slots 0-1, 2-3 are `a`'s `scale` and `rank`, 4-5, 6-7 `b`'s, 8 `c`'s `scale`, 9 its `rank`, 10
    its `conv`. Parameters: scale 2 F, rank 4 F, conv 4 F.
    """
    return make_layout(
        sites=[
            ef.site("a", features=6, chunks=3),
            ef.site("b", features=8, chunks=2),
            ef.site("c", features=2, topology="image", positions=4),
        ],
        blueprints={
            "scale": ef.blueprints.scale_shift(),
            "rank": ef.blueprints.low_rank(rank=2),
            "conv": ef.blueprints.depthwise_conv(window=2),
        },
        capacity=2,
    )


def observe(
    step: int = 0,
    *,
    stage: Sequence[int] = (0,) * 6,
    loss: float | None = None,
    owner: Sequence[int] = (NONE,) * 11,
    potential: Sequence[float | None] = (None,) * 6,
    gradient: Sequence[float | None] = (None,) * 6,
    contribution: Sequence[float | None] = (None,) * 6,
    steps_in_stage: Sequence[int] = (9,) * 6,
    is_paused: Sequence[bool] = (False,) * 6,
) -> Observation:
    """What a policy sees; `None` is not measured."""

    def known(values: Sequence[float | None]) -> tuple[jax.Array, jax.Array]:
        value = jnp.asarray([0.0 if v is None else v for v in values], jnp.float32)
        return value, jnp.asarray([0 if v is None else 3 for v in values], jnp.int32)

    seeds = DORMANT
    surveyed, num_potentials = known(potential)
    norm, num_steps = known(gradient)
    worth, num_contributions = known(contribution)
    track = loss_track()
    if loss is not None:
        track = track._replace(slow=jnp.float32(loss), num_steps=jnp.int32(100))
    return Observation(
        step=jnp.int32(step),
        seeds=seeds._replace(
            stage=jnp.asarray(stage, jnp.int8),
            steps_in_stage=jnp.asarray(steps_in_stage, jnp.int32),
            is_paused=jnp.asarray(is_paused),
            potential=surveyed,
            num_potentials=num_potentials,
            contribution=worth,
            num_contributions=num_contributions,
            telemetry=seeds.telemetry._replace(gradient_norm=norm, num_steps=num_steps),
        ),
        owner=jnp.asarray(owner, jnp.int32),
        loss=track,
    )


@cache
def compiled(policy: Any) -> Any:
    return jax.jit(lambda *args: policy.decide(layout(), *args))


NOTHING = no_requests(6)
DORMANT = seed_state(6)


class Player:
    """A policy with its state, asked step by step."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.state = policy.init(layout())
        self.decide = compiled(policy)
        self.key = jax.random.key(0)

    def ask(self, seen: Observation, requests: Requests | None = None) -> Requests:
        self.key, key = jax.random.split(self.key)
        given = NOTHING if requests is None else requests
        self.state, told = self.decide(self.state, seen, given, key)
        return told


def asked(told: Requests) -> list[int]:
    return np.flatnonzero(np.asarray(told.kind) == Kind.GERMINATE).tolist()


def wish(
    *seeds: int, priority: Sequence[float] | None = None, blueprint: Sequence[int] | int = 0
) -> Requests:
    """Germinations that some rule before has asked."""
    told = jax.tree.map(np.array, NOTHING)
    index = list(seeds)
    told.kind[index] = Kind.GERMINATE
    told.blueprint[index] = blueprint
    told.priority[index] = 0.0 if priority is None else priority
    told.requested_by[index] = 0
    return jax.tree.map(jnp.asarray, told)


ALL = (0.1, 0.6, 0.3, 0.5, 0.2, 0.4)


EVERY_STEP = periodic(every=1)


# --- rules that ask ------------------------------------------------------------------------------


def test_the_layout_is_the_one_written_here() -> None:
    told = layout()
    assert (told.num_seeds, told.num_slots) == (6, 11)
    assert told.tables.costs.tolist() == [[4, 8, 0], [8, 16, 0], [4, 8, 8]]
    assert told.tables.slot_pool_start.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 9, 10]


def test_never_asks_nothing() -> None:
    told = Player(never()).ask(observe(potential=ALL, loss=1.0))
    assert asked(told) == []


def test_periodic_asks_when_it_is_due_and_for_the_best() -> None:
    player = Player(periodic(every=3, start=2))
    told = {step: asked(player.ask(observe(step, potential=ALL))) for step in range(9)}
    assert {step: seeds for step, seeds in told.items() if seeds} == {2: [1], 5: [1], 8: [1]}


@pytest.mark.parametrize(
    ("why", "seen", "expected"),
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
def test_periodic_chooses(why: str, seen: dict[str, Any], expected: int) -> None:
    told = Player(EVERY_STEP).ask(observe(**{"potential": ALL, **seen}))
    assert asked(told) == [expected], why
    assert int(told.blueprint[expected]) == 0
    assert int(told.graft[expected]) == NONE


def test_nothing_is_asked_where_nothing_is_measured() -> None:
    for policy in (EVERY_STEP, periodic(every=1, score="gradient")):
        assert asked(Player(policy).ask(observe())) == []


def test_periodic_by_gradient() -> None:
    gradient = (None, 0.1, 0.2, None, 0.9, None)
    player = Player(periodic(every=1, score="gradient", count=2))
    assert asked(player.ask(observe(gradient=gradient, potential=ALL))) == [2, 4]


def test_periodic_by_blueprint() -> None:
    told = Player(periodic(every=1, blueprint="conv", count=6)).ask(observe(potential=ALL))
    assert asked(told) == [5]
    assert int(told.blueprint[5]) == 2
    with pytest.raises(UnknownNameError, match="'rope'"):
        Player(periodic(every=1, blueprint="rope")).ask(observe(potential=ALL))


def test_of_each_pool_no_more_is_asked_than_it_has_room_for() -> None:
    player = Player(periodic(every=1, count=6))
    # `a` has 2 slots for its 3 seeds: the two with the largest potential get them.
    told = player.ask(observe(potential=ALL))
    assert asked(told) == [1, 2, 3, 4, 5]
    assert told.priority.tolist() == pytest.approx([0.0, 0.6, 0.3, 0.5, 0.2, 0.4])
    one_left = observe(potential=ALL, owner=(NONE, 1, *[NONE] * 9), stage=(0, 2, 0, 0, 0, 0))
    assert asked(player.ask(one_left)) == [2, 3, 4, 5]


def test_a_rule_does_not_touch_what_is_asked_already() -> None:
    told = Player(EVERY_STEP).ask(observe(potential=ALL), wish(1, blueprint=1))
    assert asked(told) == [1, 3]
    assert told.blueprint.tolist()[:4] == [NONE, 1, NONE, 0]


def test_random_draws_every_place() -> None:
    player = Player(random(every=1))
    assert player.policy.rules == ("random",)
    drawn = [asked(player.ask(observe(step))) for step in range(200)]
    assert all(len(seeds) == 1 for seeds in drawn)
    counts = np.bincount([seeds[0] for seeds in drawn], minlength=6)
    assert counts.min() >= 15
    again = Player(random(every=1))
    assert [asked(again.ask(observe(step))) for step in range(20)] == drawn[:20]


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
        assert asked(player.ask(observe(step, loss=loss, potential=ALL))) == expected, step
    # ...until something germinates; then patience starts anew.
    born = observe(9, loss=9.0, potential=ALL, stage=(0, 1, 0, 0, 0, 0), steps_in_stage=(0,) * 6)
    later = [observe(step, loss=9.0, potential=ALL) for step in range(10, 13)]
    assert [asked(player.ask(seen)) for seen in (born, *later)] == [[], [], [], [1]]


def test_plateau_of_a_negative_loss() -> None:
    player = Player(plateau(patience=2, min_gain=0.1))
    losses = [-1.0, -1.05, -1.06, -1.2, -1.2, -1.2]
    told = [
        asked(player.ask(observe(step, loss=loss, potential=ALL)))
        for step, loss in enumerate(losses)
    ]
    assert told == [[], [], [1], [], [], [1]]


def test_plateau_without_any_loss_has_patience_too() -> None:
    player = Player(plateau(patience=2))
    told = [asked(player.ask(observe(step, potential=ALL))) for step in range(4)]
    assert told == [[], [], [1], [1]]


def test_a_paused_newborn_does_not_hold_the_plateau_up() -> None:
    player = Player(plateau(patience=2))
    seen = {
        "loss": 1.0,
        "potential": ALL,
        "stage": (1, 0, 0, 0, 0, 0),
        "steps_in_stage": (0,) * 6,
        "is_paused": (True, *[False] * 5),
    }
    told = [asked(player.ask(observe(step, **seen))) for step in range(4)]
    assert told == [[], [], [1], [1]]


def test_scripted_asks_what_is_written_when_it_is_written() -> None:
    events = [
        (1, germinate(4, "rank", "slow")),
        (1, germinate(0, "scale")),
        (3, cull(4)),
        (3, pause_seed(0)),
    ]
    player = Player(scripted(events, grafts=("fast", "slow")))
    told = [player.ask(observe(step)) for step in range(5)]
    kinds = [np.asarray(requests.kind).tolist() for requests in told]
    G, T, P = Kind.GERMINATE, Kind.TRANSITION, Kind.PAUSE
    idle = [0] * 6
    assert kinds == [idle, [G, 0, 0, 0, G, 0], idle, [P, 0, 0, 0, T, 0], idle]
    assert (int(told[1].blueprint[4]), int(told[1].graft[4])) == (1, 1)
    assert (int(told[1].blueprint[0]), int(told[1].graft[0])) == (0, NONE)
    assert int(told[3].target[4]) == Stage.CULLED
    assert told[3].requested_by.tolist() == [0, NONE, NONE, NONE, 0, NONE]
    assert asked(Player(scripted([])).ask(observe())) == []


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


# --- rules that hold back ------------------------------------------------------------------------


def test_max_concurrent_counts_every_stage_on_its_way() -> None:
    player = Player(max_concurrent(2))
    for stage in range(11):
        seen = observe(stage=(stage, 0, 0, 0, 0, 0))
        room = 1 if 1 <= stage <= 6 else 2
        assert len(asked(player.ask(seen, wish(1, 2, 3)))) == room, stage
    full = observe(stage=(2, 3, 6, 0, 0, 0))
    assert asked(player.ask(full, wish(3, 4, 5))) == []


def test_max_concurrent_keeps_the_most_urgent() -> None:
    player = Player(max_concurrent(2))
    assert asked(player.ask(observe(), wish(0, 2, 4, 5, priority=(0.1, 0.9, 0.5, 0.5)))) == [2, 4]
    assert asked(player.ask(observe(), wish(0, 1, 5, priority=(-3.0, -2.0, -1.0)))) == [1, 5]


def test_limits_let_other_requests_pass() -> None:
    other = wish(0, 1)
    other = other._replace(kind=other.kind.at[1].set(jnp.int8(Kind.TRANSITION)))
    for policy in (max_concurrent(1), budget(0), cooldown(5), max_total(0), stop_after(0)):
        player = Player(policy)
        player.ask(observe(0), wish(3))
        busy = observe(1, stage=(0, 2, 2, 0, 0, 0), owner=[*[NONE] * 4, 3, *[NONE] * 6])
        told = player.ask(busy, other)
        assert told.kind.tolist() == [0, Kind.TRANSITION, 0, 0, 0, 0], policy.rules


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
    held = [owner.get(slot, NONE) for slot in range(11)]
    assert asked(Player(budget(limit)).ask(observe(owner=held), wished)) == expected


BORN = [0, 1, *[NONE] * 9]
"""Owners once seeds 0 and 1 have adapters."""


def test_cooldown_table() -> None:
    player = Player(cooldown(3))
    wishes = [True, True, True, True, False, False, False, True, True]
    told: list[int] = []
    for step, is_wished in enumerate(wishes):
        held = BORN if told and told[-1] else [NONE] * 11
        requests = wish(0, 1) if is_wished else None
        told.append(len(asked(player.ask(observe(step, owner=held), requests))))
    # All that is asked in one step passes together.
    assert told == [2, 0, 0, 2, 0, 0, 0, 2, 0]


def test_a_cooldown_of_nothing_lets_all_pass() -> None:
    player = Player(cooldown(0))
    assert [len(asked(player.ask(observe(step), wish(0)))) for step in range(3)] == [1, 1, 1]


def test_max_total_counts_what_passes_and_takes_place() -> None:
    player = Player(max_total(3))
    told = []
    held = [NONE] * 11
    for step, wished in enumerate([wish(0, 1), None, wish(2, 3, priority=(0.1, 0.2)), wish(4)]):
        told.append(asked(player.ask(observe(step, owner=held), wished)))
        for seed in told[-1]:
            held[{0: 0, 1: 1, 3: 4}[seed]] = seed
    assert told == [[0, 1], [], [3], []]
    assert int(player.state.left) == 0


def test_until_ends_germination() -> None:
    player = Player(stop_after(2))
    assert [asked(player.ask(observe(step), wish(0))) for step in range(4)] == [[0], [0], [], []]


def test_numbers_of_rules_are_state() -> None:
    player = Player(max_concurrent(1))
    player.state = player.state._replace(limit=jnp.int32(4))
    assert len(asked(player.ask(observe(), wish(0, 1, 2)))) == 3
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


# --- nesting and the decision log ----------------------------------------------------------------


def test_chain_notes_who_asked_and_who_refused() -> None:
    policy = chain(periodic(every=2, count=3), max_concurrent(2), cooldown(3))
    assert policy.rules == ("periodic", "max_concurrent", "cooldown")
    player = Player(policy)
    first = player.ask(observe(0, potential=ALL))
    assert asked(first) == [1, 3]
    assert first.requested_by.tolist() == [NONE, 0, NONE, 0, NONE, 0]
    assert first.vetoed_by.tolist() == [NONE, NONE, NONE, NONE, NONE, 1]
    held = [1, *[NONE] * 3, 3, *[NONE] * 6]
    second = player.ask(observe(2, potential=ALL, owner=held))
    assert asked(second) == []
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
        for one, other in zip(logs[0], log, strict=True):
            for name, column in one._asdict().items():
                np.testing.assert_array_equal(column, getattr(other, name), name)
    assert any((np.asarray(told.vetoed_by) >= 2).any() for told in logs[0])


def test_a_later_rule_that_asks_anew_lifts_the_veto() -> None:
    policy = chain(
        periodic(every=1), max_total(0), periodic(every=1, blueprint="rank", name="again")
    )
    told = Player(policy).ask(observe(potential=ALL))
    assert asked(told) == [1]
    assert (int(told.requested_by[1]), int(told.vetoed_by[1])) == (2, NONE)
    assert int(told.blueprint[1]) == 1


def test_a_rule_that_overwrites_a_request_has_asked_it() -> None:
    policy = chain(periodic(every=1), scripted([(0, germinate(1, "rank"))]))
    told = Player(policy).ask(observe(potential=ALL))
    assert (int(told.requested_by[1]), int(told.blueprint[1])) == (1, 1)


def test_what_was_struck_leaves_nothing_behind() -> None:
    policy = chain(
        scripted([(0, germinate(1, "rank", "slow"))], grafts=("fast", "slow")),
        max_total(0),
        periodic(every=1),
    )
    told = Player(policy).ask(observe(potential=ALL))
    assert (int(told.blueprint[1]), int(told.graft[1])) == (0, NONE)


def test_an_own_rule_nests_like_the_others() -> None:
    def decide(layout: Any, state: Any, seen: Any, requests: Any, key: Any) -> Any:
        del layout, seen, key
        odd = jnp.arange(6) % 2 == 1
        return state + 1, refuse(requests, odd)

    policy = chain(periodic(every=1, count=6), rule("even", lambda layout: jnp.int32(0), decide))
    player = Player(policy)
    told = player.ask(observe(potential=ALL))
    assert asked(told) == [2, 4]
    assert told.vetoed_by.tolist() == [NONE, 1, NONE, 1, NONE, 1]
    assert int(player.state[1]) == 1


def test_an_empty_chain_is_never() -> None:
    told = Player(chain()).ask(observe(potential=ALL), wish(1))
    assert asked(told) == [1]


def test_a_decision_in_a_run_can_be_explained() -> None:
    policy = chain(
        chain(periodic(every=1, count=2), max_concurrent(3)), scripted([(1, cull(5))]), cooldown(3)
    )
    with strict():
        made = rig(layout(), rows=1, policy=policy)
    state = place(made.growth, made.fresh(), [0] * 6, potential=ALL, num_potentials=1)
    names = made.growth.policy.rules
    assert names == ("periodic", "max_concurrent", "scripted", "cooldown")
    told = []
    for _ in range(3):
        state, info = made.step(state)
        columns = (info.requested_by, info.vetoed_by, info.request_code, info.cause)
        told.append(
            {
                seed: (names[asker], names[refuser] if refuser >= 0 else None, code, cause)
                for seed, (asker, refuser, code, cause) in enumerate(
                    zip(*(np.asarray(column).tolist() for column in columns), strict=True)
                )
                if asker >= 0
            }
        )
    done, silence = (Code.DONE, Cause.POLICY), (Code.NOT_ASKED, Cause.NONE)
    assert told == [
        {1: ("periodic", None, *done), 3: ("periodic", None, *done)},
        # Two are on their way, so one of the next two is too many; a script overwrites the other.
        {
            5: ("scripted", None, Code.ILLEGAL_TRANSITION, Cause.NONE),
            2: ("periodic", "max_concurrent", *silence),
        },
        {5: ("periodic", "cooldown", *silence), 2: ("periodic", "max_concurrent", *silence)},
    ]


# --- the default rule ----------------------------------------------------------------------------

PROMISE = (0.1, 0.6, 0.3, 0.5, 0.15, 0.4)


@pytest.mark.parametrize(
    ("options", "seen", "expected"),
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
    options: dict[str, Any], seen: dict[str, Any], expected: list[int]
) -> None:
    player = Player(grow(every=4, **options))
    assert asked(player.ask(observe(0, **seen))) == expected
    assert [asked(player.ask(observe(step, **seen))) for step in (1, 2, 3)] == [[]] * 3
    assert asked(player.ask(observe(4, **seen))) == expected


def test_grow_asks_at_once_whenever_the_run_begins() -> None:
    player = Player(grow(every=10))
    assert asked(player.ask(observe(123, potential=PROMISE))) == [1, 2, 3, 5]
    assert asked(player.ask(observe(132, potential=PROMISE))) == []
    assert asked(player.ask(observe(133, potential=PROMISE))) == [1, 2, 3, 5]


def test_grow_measures_later_potentials_by_the_first_largest() -> None:
    player = Player(grow(every=1))
    player.ask(observe(0, potential=PROMISE))
    now = (0.19, 0.21, 0.05, 0.3, 0.1, 0.0)  # a third of the first largest one is 0.2
    assert asked(player.ask(observe(1, potential=now))) == [1, 3]
    assert asked(player.ask(observe(2, potential=(0.1,) * 6))) == []


def test_grow_measures_by_the_first_survey_also_where_it_comes_late() -> None:
    player = Player(grow(every=1))
    assert asked(player.ask(observe(0))) == [0, 1, 3, 4, 5]  # the first pool has two slots
    assert asked(player.ask(observe(1, potential=PROMISE))) == [1, 2, 3, 5]
    assert asked(player.ask(observe(2, potential=(0.1,) * 6))) == []


def test_grow_leaves_places_alone_whose_adapters_did_harm_unless_they_promise_more() -> None:
    player = Player(grow(every=1))
    player.ask(observe(0, potential=PROMISE))
    harm = (None, -0.1, None, None, None, None)
    assert asked(player.ask(observe(1, potential=PROMISE, contribution=harm))) == [2, 3, 5]
    now = (0.1, 0.7, 0.3, 0.5, 0.15, 0.4)
    assert asked(player.ask(observe(2, potential=now, contribution=harm))) == [1, 2, 3, 5]


def test_grow_goes_on_while_living_adapters_are_worth_something() -> None:
    ft = Stage.FINE_TUNING

    def asks(stage: Sequence[int], contribution: Sequence[float | None]) -> bool:
        player = Player(grow(every=1))
        begun = observe(0, potential=PROMISE, stage=stage, contribution=contribution)
        assert asked(player.ask(begun)) == [5]  # the first request waits for nothing
        after = observe(1, potential=PROMISE, stage=stage, contribution=contribution)
        return asked(player.ask(after)) == [5]

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
    told = [
        asked(player.ask(observe(step, potential=PROMISE, stage=stage, contribution=worth)))
        for step, worth in enumerate([(w, *[None] * 5) for w in (-1, -1, -1, -1, -1, 1, 1, 1, 1)])
    ]
    assert told == [[5], [], [], [], [], [5], [], [], [5]]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_grow_wants_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"min_share must be between 0 and 1, got"):
        grow(min_share=share)


# --- conformance ---------------------------------------------------------------------------------

POLICIES = {
    "never": never,
    "grow": lambda: grow(every=2, count=2),
    "grow_even": lambda: grow(score="even"),
    "periodic": lambda: periodic(every=2, count=2),
    "periodic_gradient": lambda: periodic(every=2, score="gradient"),
    "random": lambda: random(every=1),
    "plateau": lambda: plateau(patience=2),
    "scripted": lambda: scripted([(1, germinate(0, "scale")), (2, cull(1))]),
    "scripted_empty": lambda: scripted([]),
    "budget": lambda: budget(10),
    "max_concurrent": lambda: max_concurrent(1),
    "cooldown": lambda: cooldown(2),
    "max_total": lambda: max_total(1),
    "stop_after": lambda: stop_after(3),
    "chain_empty": chain,
    "chain": lambda: chain(random(every=1), chain(plateau(patience=1), budget(9)), cooldown(2)),
}


def test_every_policy_is_in_the_matrix() -> None:
    helpers = {"check", "no_requests", "refuse", "request", "rule", "seed_blueprints"}
    assert {name for name in ef.policies.__all__ if name.islower()} - helpers <= set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_contract(name: str) -> None:
    ef.policies.check(POLICIES[name](), layout())


def test_check_finds_what_breaks_the_contract() -> None:
    def policy(decide: Any, init: Any = lambda layout: ()) -> Any:
        return rule("planted", init, decide)

    def everywhere(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        everybody = jnp.ones((layout.num_seeds,), bool)
        return state, request(requests, everybody, jnp.int8(9))

    def by_chance(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        return state, request(requests, jnp.full((layout.num_seeds,), random_bit()), jnp.int8(0))

    def random_bit() -> Any:
        return jax.pure_callback(lambda: np.bool_(next(bits)), jax.ShapeDtypeStruct((), bool))

    bits = iter([False, True] * 100)

    def quiet(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
        return state, requests

    for wrong, message in (
        (policy(quiet, lambda layout: 1.0), "must be a JAX array, got 1.0"),
        (policy(everywhere), "requests.blueprint must be between -1 and 2, got"),
        (policy(by_chance), "the same arguments lead to different decisions"),
        (policy(lambda layout, state, seen, asks, key: ((state,), asks)), "decide turns a state"),
        (ef.policies.Policy(("bare",), lambda layout: (), everywhere_once), "lacks the rule"),
    ):
        with pytest.raises(ValueError, match=message):
            ef.policies.check(wrong, layout())
    with pytest.raises(TypeError, match="must be a Policy, got the function grow"):
        ef.policies.check(grow)  # type: ignore[arg-type]


def everywhere_once(layout: Any, state: Any, observation: Any, requests: Any, key: Any) -> Any:
    everybody = jnp.ones((layout.num_seeds,), bool)
    return state, request(requests, everybody, jnp.int8(0))


@pytest.mark.parametrize("name", POLICIES)
def test_policies_run_in_scan_and_vmap(name: str) -> None:
    policy = POLICIES[name]()
    assert isinstance(policy.rules, tuple)
    state = policy.init(layout())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    seen = observe(potential=ALL, gradient=ALL, loss=1.0)

    def one(state: Any, now: Any) -> Any:
        step, key = now
        given = wish(0, 3)
        return policy.decide(layout(), state, seen._replace(step=step), given, key)

    # `scan` refuses a state whose structure, shapes or dtypes change.
    def run(state: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(one, state, (jnp.arange(4, dtype=jnp.int32), keys))[1]

    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    keys = jax.random.split(jax.random.key(0), (2, 4))
    told = jax.jit(jax.vmap(run))(many, keys)
    shapes = jax.eval_shape(lambda: no_requests(6))
    assert jax.tree.map(lambda x: ((2, 4, *x.shape), x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), told
    )
    for index in (told.requested_by, told.vetoed_by):
        assert ((np.asarray(index) >= NONE) & (np.asarray(index) < max(len(policy.rules), 1))).all()


@pytest.mark.parametrize("name", [name for name in POLICIES if "scripted" not in name])
def test_policies_ask_only_of_seeds_that_can(name: str) -> None:
    """Nothing that a rule asks of itself is refused by the table; a script asks what is written."""
    player = Player(POLICIES[name]())
    stage = (1, 0, 2, 7, 8, 10)
    for step in range(4):
        told = player.ask(observe(step, stage=stage, potential=ALL, gradient=ALL, loss=1.0))
        assert set(asked(told)) <= {1}


@pytest.mark.parametrize(
    "policy",
    [
        plateau(blueprint="x"),
        ef.policies.chain(ef.policies.cooldown(5), periodic(every=3, blueprint="x")),
    ],
    ids=["plateau", "chain"],
)
def test_growth_refuses_a_policy_with_an_unknown_blueprint(policy):
    with pytest.raises(UnknownNameError, match="unknown blueprint 'x'; allowed: scale"):
        ef.Growth(
            sites=[ef.site("s", features=4, chunks=2)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=2,
            policy=policy,
        )


@pytest.mark.parametrize("count", [1, 4, 40])
def test_seeds_compared_in_pairs_are_those_that_sorting_finds(count: int, monkeypatch: Any) -> None:
    """Few seeds are compared in pairs, many are sorted; ties go to the first seed in both."""
    sites = [ef.site(str(size), features=size, chunks=size, layers=2) for size in (1, 3, 5, 9)]
    wide = make_layout(sites=sites, blueprints={"scale": ef.blueprints.scale_shift()}, capacity=9)
    rng = np.random.default_rng(count)
    for _ in range(20):
        worth = rng.integers(0, 6, wide.num_seeds).astype(np.float32)
        worth[rng.uniform(size=worth.size) < 0.2] = -np.inf
        room = jnp.asarray(rng.integers(0, 4, 8), jnp.int32)
        pairs = _select._is_among_best(wide, jnp.asarray(worth), room, count)
        with monkeypatch.context() as patch:
            patch.setattr(_select, "_MAX_PAIRWISE_SEEDS", 0)
            ordered = _select._is_among_best(wide, jnp.asarray(worth), room, count)
        assert pairs.tolist() == ordered.tolist()
