"""The 121 cells of the transition table, driven through `Growth.update`, and the gains."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import ACTING, HOLDING, LEGAL, NONE, place, row, strict, wide

from esper_fn.commands import Code, germinate, transition
from esper_fn.lifecycle import ACTS, ON_ITS_WAY, OWNS_ADAPTER, TRANSITIONS, Cause, Stage, is_in
from esper_fn.lifecycle._moves import is_legal
from esper_fn.lifecycle._state import gains, seed_state, state_bytes_per_seed

CELLS = [(source, target) for source in range(11) for target in range(11)]
COUNTERS = {"steps_in_stage", "embargo_steps"}


class Table(NamedTuple):
    before: Any
    asked: Any
    told: Any
    control: Any


@pytest.fixture(scope="module")
def table() -> Table:
    """One seed a cell, all asked in one step; and the same step without any command."""
    rig = wide()
    source = np.zeros(128, np.int8)
    source[:121] = [source for source, _ in CELLS]
    target = np.zeros(128, np.int8)
    target[:121] = [target for _, target in CELLS]
    with strict():
        before = place(
            rig.growth,
            rig.fresh(),
            source,
            # Nothing may move by itself, so the way home is open only where it is asked for.
            embargo_steps=np.where(np.isin(source, (8, 9)) & (target != 0), 5, 0),
            utility=0.25,
            contribution=0.125,
            potential=0.5,
            gradient_norm=2.0,
            num_potentials=3,
            error_count=1,
        )
        commands = [
            germinate(seed, "scale") if (a, b) == (0, 1) else transition(seed, Stage(b))
            for seed, (a, b) in enumerate(CELLS)
        ]
        asked, told = rig.step(before, commands)
        control, _ = rig.step(before)
    return Table(before, asked, told, control)


@pytest.mark.parametrize(("source", "target"), CELLS)
def test_cell(table: Table, source: int, target: int) -> None:
    seed = source * 11 + target
    seeds, told = table.asked.seeds, table.told
    code = int(told.outcomes.code[seed])
    assert int(told.outcomes.before[seed]) == source
    assert int(told.request_code[seed]) == code
    if target in LEGAL[source]:
        assert code == Code.DONE
        assert int(seeds.stage[seed]) == target
        assert int(told.outcomes.after[seed]) == target
        assert int(seeds.parent[seed]) == source
        assert int(seeds.steps_in_stage[seed]) == 0
        assert int(told.cause[seed]) == Cause.COMMAND
        keeps = source in ACTING and target in ACTING
        started = 0.5 + 0.01 * (source == 3)  # GRAFTING has taken its step before it is moved
        assert float(seeds.alpha[seed]) == pytest.approx(started if keeps else 0.0, abs=1e-6)
        assert (int(seeds.slot[seed]) != NONE) == (target in HOLDING)
        if source in HOLDING:
            slot = int(table.before.seeds.slot[seed])
            assert int(table.asked.owner[slot]) == (seed if target in HOLDING else NONE)
        return
    assert code == Code.ILLEGAL_TRANSITION
    assert int(told.outcomes.after[seed]) == source
    assert int(told.cause[seed]) == Cause.NONE
    after = row(seeds, seed)
    assert after == row(table.control.seeds, seed)
    same = row(table.before.seeds, seed)
    exempt = COUNTERS | ({"alpha"} if source == 3 else set())
    assert {k: v for k, v in after.items() if k not in exempt} == {
        k: v for k, v in same.items() if k not in exempt
    }


def test_refused_and_idle_slots_stay_as_they_were(table: Table) -> None:
    moved = [seed for seed, (a, b) in enumerate(CELLS) if b in LEGAL[a]]
    rest = np.setdiff1d(np.arange(128), moved)
    np.testing.assert_array_equal(
        np.asarray(table.asked.seeds.slot)[rest], np.asarray(table.before.seeds.slot)[rest]
    )
    for name, leaf in table.asked.adapters["all"]["scale"].items():
        # Only the newborn's slot may differ; it is zero like every other adapter here.
        np.testing.assert_array_equal(leaf, table.before.adapters["all"]["scale"][name])


@pytest.mark.parametrize("source", range(11))
def test_only_a_dormant_seed_germinates(source: int) -> None:
    rig = wide()
    stage = np.zeros(128, np.int8)
    stage[5] = source
    before = place(rig.growth, rig.fresh(), stage, embargo_steps=7)
    after, info = rig.step(before, [germinate(5, "scale", "stability")])
    if source == 0:
        assert int(info.outcomes.code[0]) == Code.DONE
        assert int(after.seeds.stage[5]) == Stage.GERMINATED
        assert int(after.seeds.blueprint[5]) == 0
        assert int(after.seeds.graft[5]) == 1
        assert int(after.owner[int(after.seeds.slot[5])]) == 5
        slot = int(after.seeds.slot[5])
        assert int(after.generation[slot]) == int(before.generation[slot]) + 1
    else:
        assert int(info.outcomes.code[0]) == Code.ILLEGAL_TRANSITION
        control, _ = rig.step(before)
        assert row(after.seeds, 5) == row(control.seeds, 5)


def test_a_bare_transition_to_germinated_is_refused() -> None:
    rig = wide()
    after, info = rig.step(rig.fresh(), [transition(0, Stage.GERMINATED)])
    assert int(info.outcomes.code[0]) == Code.ILLEGAL_TRANSITION
    assert int(after.seeds.stage[0]) == Stage.DORMANT


def test_table_is_the_designs() -> None:
    expected = np.zeros((11, 11), bool)
    for source, targets in LEGAL.items():
        expected[source, list(targets)] = True
    np.testing.assert_array_equal(TRANSITIONS, expected)
    assert [int(stage) for stage in np.flatnonzero(OWNS_ADAPTER)] == list(HOLDING)
    assert [int(stage) for stage in np.flatnonzero(ACTS)] == list(ACTING)
    assert [int(stage) for stage in np.flatnonzero(ON_ITS_WAY)] == [1, 2, 3, 4, 5, 6]


def test_is_legal_knows_every_pair_and_no_other_stage() -> None:
    source, target = np.meshgrid(np.arange(11), np.arange(-128, 128), indexing="ij")
    told = is_legal(jnp.asarray(source, jnp.int8), jnp.asarray(target, jnp.int8))
    expected = [[b in LEGAL[int(a)] for b in range(-128, 128)] for a in range(11)]
    np.testing.assert_array_equal(told, expected)


def test_gains_by_stage() -> None:
    a = 0.375
    expected = [
        (0, 0, 0),  # DORMANT
        (0, 0, 0),  # GERMINATED
        (0, 1, 0),  # TRAINING
        (a, 1, a),  # GRAFTING
        (a, 1, a),  # STABILIZATION
        (a, 1, a),  # EVALUATING
        (a, 1, a),  # FINE_TUNING
        (a, 1, a),  # FOSSILIZED
        (0, 0, 0),  # CULLED
        (0, 0, 0),  # CANCELLED
        (0, 0, 0),  # ROLLED_BACK
    ]
    told = gains(jnp.arange(11, dtype=jnp.int8), jnp.full((11,), a))
    assert told.dtype == jnp.float32
    np.testing.assert_array_equal(told, np.asarray(expected, np.float32))


def test_is_in_takes_stages_and_masks() -> None:
    stage = jnp.arange(11, dtype=jnp.int8)
    expected = np.isin(np.arange(11), [3, 8])
    np.testing.assert_array_equal(is_in(stage, [Stage.GRAFTING, Stage.CULLED]), expected)
    np.testing.assert_array_equal(is_in(stage, expected), expected)


def test_a_seeds_row_is_small() -> None:
    assert state_bytes_per_seed() < 200
    leaves = jax.tree.leaves(seed_state(5))
    assert all(leaf.shape[0] == 5 for leaf in leaves)
