"""Random commands, losses, errors, statistics, policies and thresholds: what may never happen.

And the proof that the checker would notice: each invariant is broken on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import LEGAL, NONE, calm_track, limits, place, small, small_layout, state_faults
from drive import reading as made_reading
from drive import step_faults as faults_of_step
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_fn as ef
from esper_fn.commands import Code, Commands, Kind, germinate
from esper_fn.lifecycle import Cause, Stage

T, M, S, Q = 48, 4, 7, 10
POLICY = ef.policies.chain(
    ef.policies.random(every=2, count=2),
    ef.policies.chain(ef.policies.max_concurrent(3), ef.policies.cooldown(1)),
    ef.policies.budget(1000),
    ef.policies.max_total(100),
)
GROWTH = ef.Growth(
    **small_layout().arguments,
    policy=POLICY,
    graft=[
        ef.grafting.linear(3),
        ef.grafting.adaptive(4),
        ef.grafting.stability(3, hold_steps=1, back_steps=1),
    ],
    governor=ef.governors.standard(patience=3, veto_steps=3, max_drift=5.0),
    adapters_at_once=None,
)


class Inputs(NamedTuple):
    """Everything that comes from outside; [T, ...]."""

    commands: Commands
    loss: np.ndarray
    utility: np.ndarray
    gradient: np.ndarray
    size: np.ndarray
    """Stands for every other sum of a reading."""
    errors: np.ndarray
    contribution: np.ndarray
    is_surveyed: np.ndarray
    change: np.ndarray
    """What is added to every adapter offered; [T, Q]."""


class Step(NamedTuple):
    before: Any
    after: Any
    info: Any


@jax.jit
def play(state: Any, told: Inputs) -> Step:
    def one(state: Any, now: Inputs) -> tuple[Any, Step]:
        # A survey writes contributions of seeds on trial, and nothing else.
        seeds = state.seeds
        surveyed = now.is_surveyed & ((seeds.stage == 5) | (seeds.stage == 6))
        before = state._replace(
            seeds=seeds._replace(
                contribution=jnp.where(surveyed, now.contribution, seeds.contribution),
                num_contributions=seeds.num_contributions + surveyed.astype(jnp.int32),
            )
        )
        adapters = {site: dict(banks) for site, banks in before.adapters.items()}
        for bank in GROWTH.layout.tables.banks:
            site, name = GROWTH.layout.sites[bank.site].name, GROWTH.layout.names[bank.blueprint]
            change = now.change[bank.start : bank.start + bank.num_slots]
            adapters[site][name] = jax.tree.map(
                lambda leaf, change=change: leaf + change.reshape(-1, *(1,) * (leaf.ndim - 1)),
                adapters[site][name],
            )
        reading = made_reading(S)._replace(
            num_live=((seeds.stage >= 2) & (seeds.stage <= 7)).astype(jnp.float32),
            utility=now.utility,
            gradient_square=now.gradient,
            total=now.size,
            square=now.size,
            output_square=now.size,
            num_errors=now.errors,
        )
        after, info = GROWTH.update(before, adapters, reading, now.loss, now.commands)
        return after, Step(before, after, info)

    steps: Step = jax.lax.scan(one, state, told)[1]
    return steps


def draw_inputs(rng: np.random.Generator, trouble: float, num_commands: int) -> Inputs:
    """Mostly sensible input; `trouble` is the share of entries in which something breaks."""

    def pick(values: list[float], shape: tuple[int, ...]) -> np.ndarray:
        return rng.choice(np.asarray(values), size=shape)

    def sometimes(bad: list[float], good: np.ndarray) -> np.ndarray:
        is_bad = rng.random(good.shape) < trouble
        return np.where(is_bad, pick(bad, good.shape), good).astype(np.float32)

    kind = pick([1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 5, 6, -3], (T, M))
    kind[:, num_commands:] = Kind.NONE
    columns = (
        pick([-1, *[*range(S)] * 3, S], (T, M)),  # seed
        kind,
        pick([0, 0, 1, 1, -1, 2], (T, M)),  # blueprint
        pick([NONE, 0, 1, 2, 2, 3], (T, M)),  # graft
        pick([-1, *[0] * 6, *range(1, 10), *[10] * 3, 11], (T, M)),  # target
        np.full((T, M), NONE),  # batch
    )
    commands = Commands(np.stack(columns, axis=-2).astype(np.int32))
    normal = rng.normal(size=(T,))
    return Inputs(
        commands=commands,
        loss=sometimes([np.nan, np.inf, 50.0, 1e30, -1e30], 1 + 0.02 * normal),
        utility=sometimes([np.nan, np.inf, 1e30], rng.normal(0.5, 1.0, (T, S))),
        gradient=sometimes([np.nan, np.inf, 1e30, 0.0], rng.uniform(0.5, 2.0, (T, S))),
        size=sometimes([np.nan, np.inf, 1e38, 0.0, -1e38], rng.uniform(1.0, 9.0, (T, S))),
        errors=(rng.random((T, S)) < trouble * 0.3).astype(np.float32),
        contribution=rng.normal(0.5, 1.0, (T, S)).astype(np.float32),
        is_surveyed=rng.random((T, S)) < 0.6,
        change=sometimes([np.nan, np.inf, 1e30, 100.0], 0.05 * rng.normal(size=(T, Q))),
    )


def tuned(knobs: dict[str, int]) -> Any:
    """A fresh state whose thresholds and policy numbers are the drawn ones: no recompilation."""
    state = limits(
        GROWTH.init(jax.random.key(knobs["key"])),
        min_steps=dict.fromkeys((1, 2, 4, 5, 6), knobs["shortest"]),
        max_steps=knobs["shortest"] + knobs["longer"],
        max_training=knobs["places"],
        embargo_steps=knobs["embargo"],
        max_errors=1 + knobs["embargo"],
        min_surveys=1,
        train_first=knobs["train_first"],
    )
    asks, (narrow, cool), spend, quota = state.policy
    return state._replace(
        loss=calm_track() if knobs["is_calm"] else state.loss,
        policy=(
            asks._replace(every=jnp.int32(knobs["every"])),
            (
                narrow._replace(limit=jnp.int32(knobs["places"])),
                cool._replace(steps=jnp.int32(knobs["embargo"])),
            ),
            spend._replace(limit=jnp.float32(knobs["budget"])),
            quota._replace(left=jnp.int32(knobs["quota"])),
        ),
    )


def check(steps: Step) -> list[tuple[int, str]]:
    """`(step, name)` of every broken invariant."""
    told = []
    for t in range(T):
        step = jax.tree.map(lambda leaf, t=t: leaf[t], steps)
        told += [(t, name) for name in state_faults(GROWTH, step.after)]
        told += [(t, name) for name in faults_of_step(GROWTH, *step)]
    return told


def on_host(steps: Step) -> Step:
    """NumPy arrays; the random keys, which NumPy cannot hold, left out."""
    steps = steps._replace(before=steps.before._replace(key=()), after=steps.after._replace(key=()))
    return jax.tree.map(np.asarray, steps)


KNOBS = st.fixed_dictionaries(
    {
        "key": st.integers(0, 2**31 - 1),
        "shortest": st.integers(0, 2),
        "longer": st.integers(1, 6),
        "places": st.integers(1, 5),
        "embargo": st.integers(0, 4),
        "every": st.integers(1, 10),
        "budget": st.integers(0, 60),
        "quota": st.integers(0, 40),
        "is_calm": st.booleans(),
        "train_first": st.booleans(),
    }
)


NUM_WILD = 30


def wild(key: int) -> dict[str, int]:
    """Knobs of a run in which much happens."""
    rng = np.random.default_rng(key)
    most = {"shortest": 2, "longer": 5, "places": 5, "embargo": 3, "every": 3}
    return {
        **{name: int(rng.integers(1, high + 1)) for name, high in most.items()},
        "key": key,
        "shortest": key % 3,
        "budget": 60,
        "quota": 40 if key % 4 else 5,
        "is_calm": True,
        "train_first": bool(key % 2),
    }


def test_whatever_comes_the_invariants_hold() -> None:
    seen: set[tuple[int, int]] = set()
    causes: set[int] = set()
    codes: set[int] = set()

    def look(knobs: dict[str, int], trouble: float, num_commands: int) -> None:
        told = draw_inputs(np.random.default_rng(knobs["key"]), trouble, num_commands)
        steps = on_host(play(tuned(knobs), told))
        assert check(steps) == []
        info = steps.info
        is_first = info.outcomes.code == Code.DONE
        moves = is_first & (told.commands.kind == Kind.TRANSITION)
        assert (info.outcomes.after == told.commands.target)[moves].all()
        # Nobody is rolled back but by an order, and no order is overruled.
        ordered = info.verdict.is_quarantined & np.isin(info.before, [2, 3, 4, 5, 6])
        assert (info.stage[ordered] == Stage.ROLLED_BACK).all()
        # A veto holds against commands and policies alike.
        is_birth = (info.before == Stage.DORMANT) & (info.stage == Stage.GERMINATED)
        assert not is_birth[info.verdict.forbids_germination].any()
        changed = info.before != info.stage
        seen.update(zip(info.before[changed].tolist(), info.stage[changed].tolist(), strict=True))
        causes.update(info.cause.ravel().tolist())
        codes.update(info.outcomes.code.ravel().tolist())

    settings(deadline=None, max_examples=40, derandomize=True)(
        given(KNOBS, st.sampled_from([0.0, 0.02, 0.2]), st.integers(0, M))(look)
    )()
    # Hypothesis likes its examples simple; these are not.
    for key in range(NUM_WILD):
        look(wild(key), 0.02 * (key % 2), M)
    assert play._cache_size() == 1
    # The runs were worth something: every legal transition, cause and code but one occurred.
    assert seen == {(source, target) for source, targets in LEGAL.items() for target in targets}
    assert causes >= set(Cause) - {Cause.ERRORS}
    # Batches have tests of their own in test_commands.
    assert codes == set(Code) - {Code.BATCH_REFUSED}


def test_the_same_again_is_the_same_bit_for_bit() -> None:
    knobs = {
        "key": 5,
        "shortest": 1,
        "longer": 3,
        "places": 3,
        "embargo": 1,
        "every": 2,
        "budget": 60,
        "quota": 40,
        "is_calm": True,
        "train_first": True,
    }
    runs = [
        on_host(play(tuned(knobs), draw_inputs(np.random.default_rng(5), 0.1, M))) for _ in range(2)
    ]
    leaves = zip(*(jax.tree.leaves(run) for run in runs), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in leaves)
    other = on_host(play(tuned({**knobs, "key": 6}), draw_inputs(np.random.default_rng(5), 0.1, M)))
    assert other.info.stage.tobytes() != runs[0].info.stage.tobytes()


# --- the checker itself --------------------------------------------------------------------------


def a_step() -> Step:
    """A sound step in which seeds of many stages stay, one germinates, one moves, one ramps."""
    rig = small()
    stage = [Stage.GRAFTING, Stage.DORMANT, Stage.CULLED, 7, 5, 1, 2]
    state = place(
        rig.growth,
        rig.fresh(),
        stage,
        steps_in_stage=1,
        embargo_steps=[0, 0, 5, 0, 0, 0, 0],
    )
    after, info = rig.step(state, [germinate(1, "scale")])
    return on_host(Step(state, after, info))


def seeds_with(state: Any, **columns: tuple[int, Any]) -> Any:
    """`state` with one entry of each named column replaced."""
    told = {}
    for name, (index, value) in columns.items():
        column = np.array(getattr(state.seeds, name))
        column[index] = value
        told[name] = column
    return state._replace(seeds=state.seeds._replace(**told))


def owner_with(state: Any, slot: int, seed: int) -> Any:
    owner = np.array(state.owner)
    owner[slot] = seed
    return state._replace(owner=owner)


def poison(state: Any, value: float) -> Any:
    adapters = jax.tree.map(np.array, state.adapters)
    adapters["sequence"]["scale"]["scale"][2] = value  # seed 5's, which waits to learn
    return state._replace(adapters=adapters)


PLANTED_IN_STATE: dict[str, Callable[[Any], Any]] = {
    "unknown stage": lambda s: seeds_with(s, stage=(0, 11)),
    "slot without an adapter's stage, or the reverse": lambda s: seeds_with(s, stage=(2, 3)),
    "a seed's slot is not its own": lambda s: seeds_with(s, slot=(0, int(s.seeds.slot[1]))),
    "a slot's owner does not hold it": lambda s: owner_with(s, 8, 5),
    "blueprint without an adapter": lambda s: seeds_with(s, blueprint=(2, 0)),
    "a slot of another pool": lambda s: seeds_with(s, blueprint=(4, 1)),
    "free slots miscounted": lambda s: owner_with(s, 9, 6),
    "alpha outside [0, 1]": lambda s: seeds_with(s, alpha=(0, 1.5)),
    "alpha in a stage that does not act": lambda s: seeds_with(s, alpha=(6, 0.25)),
    "paused without a way to go": lambda s: seeds_with(s, is_paused=(3, True)),
    "a negative counter": lambda s: seeds_with(s, embargo_steps=(2, -1)),
    "an adapter that is not finite": lambda s: poison(s, np.nan),
    "a row that is not finite": lambda s: seeds_with(s, stability=(1, np.inf)),
}
PLANTED_IN_STEP: dict[str, Callable[[Step], Step]] = {
    "illegal transition": lambda t: t._replace(after=seeds_with(t.after, stage=(6, 5))),
    "info tells other stages": lambda t: t._replace(info=t.info._replace(before=t.info.stage)),
    "a change without a cause, or the reverse": lambda t: t._replace(
        info=t.info._replace(cause=np.zeros_like(t.info.cause))
    ),
    "parent is not the stage before": lambda t: t._replace(
        after=seeds_with(t.after, parent=(1, 5))
    ),
    "steps miscounted": lambda t: t._replace(after=seeds_with(t.after, steps_in_stage=(3, 9))),
    "alpha jumps": lambda t: t._replace(after=seeds_with(t.after, alpha=(0, 0.8))),
    "a slot changes hands within one step": lambda t: t._replace(
        after=owner_with(t.after, int(t.after.seeds.slot[0]), 1)
    ),
    "births miscounted": lambda t: t._replace(
        after=t.after._replace(generation=np.asarray(t.after.generation) + 1)
    ),
    "an adapter that does not learn has changed": lambda t: t._replace(after=poison(t.after, -0.0)),
    "step miscounted": lambda t: t._replace(after=t.after._replace(step=t.after.step + 1)),
}


def test_a_sound_step_has_no_faults() -> None:
    step = a_step()
    assert np.asarray(step.after.seeds.stage).tolist() == [3, 1, 8, 7, 5, 2, 2]
    growth = small().growth
    assert state_faults(growth, step.before) == state_faults(growth, step.after) == []
    assert faults_of_step(growth, *step) == []


@pytest.mark.parametrize("name", PLANTED_IN_STATE)
def test_a_corrupted_state_is_noticed(name: str) -> None:
    broken = PLANTED_IN_STATE[name](a_step().after)
    assert name in state_faults(small().growth, broken)


@pytest.mark.parametrize("name", PLANTED_IN_STEP)
def test_a_corrupted_step_is_noticed(name: str) -> None:
    assert name in faults_of_step(small().growth, *PLANTED_IN_STEP[name](a_step()))


def test_every_invariant_is_broken_once() -> None:
    text = Path(drive.__file__).read_text()
    names = set(re.findall(r'faults\.append\("(.*)"\)', text))
    assert names == set(PLANTED_IN_STATE) | set(PLANTED_IN_STEP)


def test_a_faulty_update_is_caught_by_the_property() -> None:
    """A leak planted into a run: a slot that stays owned after its seed was culled."""
    knobs = {
        "key": 5,
        "shortest": 0,
        "longer": 2,
        "places": 5,
        "embargo": 0,
        "every": 1,
        "budget": 60,
        "quota": 40,
        "is_calm": True,
        "train_first": True,
    }
    steps = on_host(play(tuned(knobs), draw_inputs(np.random.default_rng(5), 0.0, 0)))
    assert check(steps) == []
    ended = np.argwhere((steps.info.before == Stage.TRAINING) & (steps.info.stage == Stage.CULLED))
    t, seed = ended[0].tolist()
    slot = int(steps.before.seeds.slot[t, seed])
    owner = np.array(steps.after.owner)
    owner[t, slot] = seed
    leaking = steps._replace(after=steps.after._replace(owner=owner))
    assert {name for at, name in check(leaking) if at == t} >= {
        "a slot's owner does not hold it",
        "free slots miscounted",
    }
