"""A limit serves whoever fits: one request that does not fit starves nobody."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.commands import Kind
from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._loss import loss_track
from esper_fn.lifecycle._state import seed_state
from esper_fn.policies import (
    Observation,
    Requests,
    budget,
    chain,
    cooldown,
    max_concurrent,
    max_total,
    no_requests,
    periodic,
    plateau,
    random,
    rule,
)

BIG, SMALL, TINY = 0, 1, 2


@lru_cache(maxsize=1)
def layout() -> Any:
    """Three places whose adapters, `scale` or `rank`, cost 512, 64 and 8 parameters."""
    return make_layout(
        sites=[
            ef.site("big", features=256),
            ef.site("small", features=32),
            ef.site("tiny", features=4),
        ],
        blueprints={"scale": ef.blueprints.scale_shift(), "rank": ef.blueprints.low_rank(rank=1)},
        capacity=1,
    )


def observe(step: int = 0, slots: tuple[int, ...] = (-1, -1, -1), **seeds: Any) -> Observation:
    """All measured, the dearest place the most promising; `slots` of the three seeds."""
    owner = np.full(layout().num_slots, -1, np.int32)
    for seed, slot in enumerate(slots):
        if slot >= 0:
            owner[slot] = seed
    stage = [Stage.TRAINING if slot >= 0 else Stage.DORMANT for slot in slots]
    columns = {
        "stage": jnp.asarray(stage, jnp.int8),
        "slot": jnp.asarray(slots, jnp.int32),
        "potential": jnp.asarray([3.0, 2.0, 1.0]),
        "num_potentials": jnp.ones((3,), jnp.int32),
        **seeds,
    }
    track = loss_track()._replace(slow=jnp.float32(1.0), num_steps=jnp.int32(99))
    return Observation(
        step=jnp.int32(step),
        seeds=seed_state(3)._replace(**columns),
        owner=jnp.asarray(owner),
        loss=track,
        step_loss=track.slow,
    )


def wish(*seeds: int, priority: tuple[float, ...] = (), blueprint: int = 0) -> Requests:
    at = jnp.asarray(seeds)
    told = no_requests(3)
    return told._replace(
        kind=told.kind.at[at].set(jnp.int8(Kind.GERMINATE)),
        blueprint=told.blueprint.at[at].set(jnp.int8(blueprint)),
        priority=told.priority.at[at].set(jnp.asarray(priority or (0.0,) * len(seeds))),
    )


def ask(policy: Any, seen: Observation, requests: Requests | None = None, state: Any = None) -> Any:
    given = no_requests(3) if requests is None else requests
    state = policy.init(layout()) if state is None else state
    state, told = policy.decide(layout(), state, seen, given, jax.random.key(0))
    return np.flatnonzero(np.asarray(told.kind) == Kind.GERMINATE).tolist(), state, told


@pytest.mark.parametrize(
    ("limit", "priority", "expected"),
    [
        (100, (3.0, 2.0, 1.0), [SMALL, TINY]),
        (71, (3.0, 2.0, 1.0), [SMALL]),
        (71, (3.0, 1.0, 2.0), [TINY]),
        (63, (3.0, 2.0, 1.0), [TINY]),
        (7, (3.0, 2.0, 1.0), []),
        (519, (3.0, 2.0, 1.0), [BIG]),
        (520, (3.0, 2.0, 1.0), [BIG, TINY]),
        (584, (3.0, 2.0, 1.0), [BIG, SMALL, TINY]),
        (583, (2.0, 3.0, 1.0), [BIG, SMALL]),
    ],
)
def test_a_budget_takes_the_next_that_fits(
    limit: int, priority: tuple[float, ...], expected: list[int]
) -> None:
    assert ask(budget(limit), observe(), wish(0, 1, 2, priority=priority))[0] == expected


def test_a_budget_is_greedy_by_order() -> None:
    """Against a loop over the requests, with more prices than one and many ties."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.repeat([2, 4, 6, 16, 40], 6))
    wide = make_layout(
        sites=[ef.site(str(i), features=int(size)) for i, size in enumerate(sizes)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=1,
    )
    num, none = len(sizes), np.full(wide.num_slots, -1, np.int32)
    seen = observe()._replace(seeds=seed_state(num), owner=jnp.asarray(none))
    policy = budget(100)
    decide = jax.jit(
        lambda state, given: policy.decide(wide, state, seen, given, jax.random.key(0))
    )
    nothing = no_requests(num)
    for limit in (0, 3, 4, 37, 100, 311, 800, 10_000):
        urgency = rng.integers(0, 5, num).astype(np.float32)
        asks = rng.random(num) < 0.8
        given = nothing._replace(
            kind=jnp.where(asks, jnp.int8(Kind.GERMINATE), nothing.kind),
            blueprint=jnp.where(asks, jnp.int8(0), nothing.blueprint),
            priority=jnp.asarray(urgency),
        )
        told = decide(policy.init(wide)._replace(limit=jnp.float32(limit)), given)[1]
        left, expected = limit, []
        for seed in np.argsort(-urgency, kind="stable"):
            if asks[seed] and 2 * sizes[seed] <= left:
                left -= 2 * sizes[seed]
                expected.append(int(seed))
        assert np.flatnonzero(np.asarray(told.kind)).tolist() == sorted(expected), limit


ASKERS = {
    "periodic": lambda: periodic(every=1),
    "plateau": lambda: plateau(patience=1),
    "random": lambda: random(every=1),
}


@pytest.mark.parametrize("arrange", ["behind", "nested", "before others", "inner"])
@pytest.mark.parametrize("asker", ASKERS)
def test_a_rule_that_asks_for_one_place_asks_for_one_that_fits(asker: str, arrange: str) -> None:
    asks = ASKERS[asker]()
    policy = {
        "behind": chain(asks, budget(70)),
        "nested": chain(chain(asks), chain(cooldown(0), budget(70))),
        "before others": chain(asks, max_concurrent(1), max_total(1), budget(70)),
        "inner": chain(chain(asks, budget(70)), max_concurrent(1)),
    }[arrange]
    state, told = None, []
    for step in range(12):
        now, state, _ = ask(policy, observe(step), state=state)
        told += now
        if told:
            break
    best = [[SMALL], [TINY]] if asker == "random" else [[SMALL]]
    assert told in best


def test_a_budget_behind_one_rule_does_not_bind_another() -> None:
    policy = chain(chain(periodic(every=1), budget(70)), periodic(every=1, name="free"))
    assert ask(policy, observe())[0] == [BIG, SMALL]


def test_a_cheaper_blueprint_of_the_place_is_asked_for() -> None:
    # A `rank` adapter costs 64 in `small`, as a `scale` does; 512 and 8 in the others.
    told = ask(chain(periodic(every=1, blueprint="rank"), budget(64)), observe())[2]
    assert (told.kind.tolist(), int(told.blueprint[SMALL])) == ([0, 1, 0], 1)
    two = make_layout(
        sites=[ef.site("only", features=32)],
        blueprints={"dear": ef.blueprints.low_rank(rank=4), "scale": ef.blueprints.scale_shift()},
        capacity=1,
    )
    policy = chain(periodic(every=1), budget(100))
    seen = observe()
    alone = seen._replace(
        seeds=jax.tree.map(lambda leaf: leaf[:1], seen.seeds), owner=jnp.full((2,), -1, jnp.int32)
    )
    told = policy.decide(two, policy.init(two), alone, no_requests(1), jax.random.key(0))[1]
    assert (int(told.kind[0]), int(told.blueprint[0])) == (Kind.GERMINATE, 1)


def test_where_nothing_fits_the_log_says_which_limit_refuses() -> None:
    told = ask(chain(periodic(every=1), budget(7)), observe())[2]
    assert told.kind.tolist() == [0, 0, 0]
    assert told.requested_by.tolist() == [0, -1, -1]
    assert told.vetoed_by.tolist() == [1, -1, -1]


def asks_always(seed: int, priority: float = 9.0) -> Any:
    """A user's rule that asks for one seed, whatever it costs and whether it can."""

    def decide(layout: Any, state: Any, seen: Any, requests: Any, key: Any) -> Any:
        del layout, seen, key
        return state, requests._replace(
            kind=requests.kind.at[seed].set(jnp.int8(Kind.GERMINATE)),
            blueprint=requests.blueprint.at[seed].set(jnp.int8(0)),
            priority=requests.priority.at[seed].set(priority),
        )

    return rule("always", lambda layout: (), decide)


@pytest.mark.parametrize(
    "limit", [max_concurrent(2), budget(528), max_total(1)], ids=["c", "b", "q"]
)
def test_a_seed_that_cannot_germinate_takes_no_room(limit: Any) -> None:
    slots = (0, -1, -1)
    told = ask(chain(asks_always(BIG), asks_always(TINY, 1.0), limit), observe(slots=slots))[0]
    assert TINY in told


def test_a_quota_is_used_by_births_alone() -> None:
    """Refused behind it (by a budget, a veto, a full bank), a request costs no quota."""
    policy = chain(asks_always(BIG), max_total(1), budget(70))
    state = None
    for step in range(5):
        told, state, _ = ask(policy, observe(step), state=state)
        assert told == []
    free = chain(asks_always(SMALL), max_total(1), budget(70))
    told, state, _ = ask(free, observe(5), state=state)
    assert told == [SMALL]
    slots = (-1, layout().tables.banks[2].start, -1)
    for step in range(6, 9):
        told, state, _ = ask(
            chain(asks_always(TINY), max_total(1)), observe(step, slots), state=state[:2]
        )
        assert told == [], step


def test_a_cooldown_begins_with_a_birth() -> None:
    policy = chain(asks_always(BIG), cooldown(100), budget(70))
    _, state, _ = ask(policy, observe(0))
    told, _, _ = ask(chain(asks_always(SMALL), cooldown(100), budget(70)), observe(1), state=state)
    assert told == [SMALL]


def test_growth_under_a_budget_goes_on() -> None:
    """Whole steps: of 512, 64 and 8 parameters, 100 hold the two that fit, and the second waits."""
    policy = chain(periodic(every=1), cooldown(2), max_total(2), budget(100))
    growth = ef.Growth(**layout().arguments, policy=policy, adapters_at_once=None)

    def loss_fn(params: Any, seeds: Any) -> jax.Array:
        total = jnp.float32(0)
        for name, width in (("big", 256), ("small", 32), ("tiny", 4)):
            total += jnp.mean(jnp.square(seeds.grow(name, params * jnp.ones((2, width))) - 1))
        return total

    @jax.jit
    def step(state: Any) -> Any:
        loss, (_, _), statistics = growth.value_and_grad(loss_fn)(jnp.float32(0.5), state)
        return growth.update(state, state.adapters, statistics, loss)

    state = growth.init(jax.random.key(0))
    state = state._replace(
        seeds=state.seeds._replace(
            potential=jnp.asarray([3.0, 2.0, 1.0]), num_potentials=jnp.ones((3,), jnp.int32)
        )
    )
    born = {}
    for index in range(6):
        state, info = step(state)
        for seed in np.flatnonzero(np.asarray(info.request_code) == ef.commands.Code.DONE):
            born[int(seed)] = index
    assert born == {SMALL: 0, TINY: 2}
