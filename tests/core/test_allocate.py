"""Slots are given and taken back as a plain loop would do it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drive import NONE, small_layout
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_fn as ef
from esper_fn._growth._newborns import init_newborns
from esper_fn._layout import allocate, free_slots, init_adapters, make_layout, select_slots
from esper_fn.lifecycle._resolve import take_slots
from esper_fn.lifecycle._state import UNSERVED

LAYOUT = small_layout()
NUM_SEEDS, NUM_SLOTS = 7, 10
_allocate = jax.jit(lambda owner, asks, blueprint: allocate(LAYOUT, owner, asks, blueprint))
_take, _free = jax.jit(take_slots), jax.jit(free_slots)


def by_loop(owner: list[int], asks: list[bool], blueprint: list[int]) -> list[int]:
    """Seed by seed, the first free slot of its pool. Pools as `small_layout` states them."""
    pools = {(0, 0): [0, 1], (1, 0): [2, 3], (2, 0): [4, 5], (1, 1): [6, 7], (2, 1): [8, 9]}
    group = [0, 0, 0, 1, 1, 2, 2]
    taken = set(np.flatnonzero(np.asarray(owner) != NONE).tolist())
    slots = []
    for seed in range(NUM_SEEDS):
        pool = pools.get((group[seed], blueprint[seed]))
        free = [slot for slot in pool or [] if slot not in taken]
        if not asks[seed]:
            slots.append(NONE)
        elif pool is None:
            slots.append(UNSERVED)
        elif not free:
            slots.append(NONE)
        else:
            taken.add(free[0])
            slots.append(free[0])
    return slots


def test_the_tables_are_the_ones_written_here() -> None:
    assert (LAYOUT.num_seeds, LAYOUT.num_slots) == (NUM_SEEDS, NUM_SLOTS)
    assert LAYOUT.tables.slot_pool_start.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.lists(st.sampled_from([NONE, 0]), min_size=NUM_SLOTS, max_size=NUM_SLOTS),
    st.lists(st.booleans(), min_size=NUM_SEEDS, max_size=NUM_SEEDS),
    st.lists(st.sampled_from([0, 0, 1, 1, -1, 2, 127]), min_size=NUM_SEEDS, max_size=NUM_SEEDS),
)
def test_allocation_is_the_loops(owner: list[int], asks: list[bool], blueprint: list[int]) -> None:
    slot = _allocate(
        jnp.asarray(owner, jnp.int32), jnp.asarray(asks), jnp.asarray(blueprint, jnp.int8)
    )
    assert slot.tolist() == by_loop(owner, asks, blueprint)
    after = np.asarray(_take(jnp.asarray(owner, jnp.int32), slot, slot >= 0))
    for index in range(NUM_SLOTS):
        takers = np.flatnonzero(np.asarray(slot) == index)
        assert len(takers) <= 1
        assert after[index] == (takers[0] if len(takers) else owner[index])


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.permutations(range(NUM_SEEDS)),
    st.integers(0, NUM_SEEDS),
    st.lists(st.booleans(), min_size=NUM_SEEDS, max_size=NUM_SEEDS),
)
def test_release_frees_exactly_those_who_hold_no_adapter(
    seeds: list[int], num_held: int, holds: list[bool]
) -> None:
    owner = np.full(NUM_SLOTS, NONE, np.int32)
    owner[:num_held] = seeds[:num_held]
    after = _free(jnp.asarray(owner), jnp.asarray(holds))
    expected = [seed if seed != NONE and holds[seed] else NONE for seed in owner.tolist()]
    assert after.tolist() == expected


def test_a_release_leaves_holes_that_are_filled_again() -> None:
    owner = jnp.asarray([0, 1, 3, 4, 5, 6, NONE, NONE, NONE, NONE], jnp.int32)
    holds = jnp.ones((7,), bool).at[jnp.asarray([0, 4])].set(False)
    owner = _free(owner, holds)
    assert owner.tolist() == [NONE, 1, 3, NONE, 5, 6, NONE, NONE, NONE, NONE]
    asks = jnp.zeros((7,), bool).at[jnp.asarray([2, 4])].set(True)
    slot = _allocate(owner, asks, jnp.zeros((7,), jnp.int8))
    assert slot.tolist() == [NONE, NONE, 0, NONE, 3, NONE, NONE]


@pytest.fixture(scope="module")
def low_rank() -> Any:
    """A layout whose newborn adapters are random, so that each birth can be told from the last."""
    return make_layout(
        sites=[ef.site("a", features=4, chunks=4), ef.site("b", features=4, chunks=2)],
        blueprints={
            "low_rank": ef.blueprints.low_rank(rank=2),
            "scale": ef.blueprints.scale_shift(),
        },
        capacity=4,
    )


def test_birth_touches_only_the_newborn(low_rank: Any) -> None:
    old = init_adapters(low_rank, jax.random.key(0))
    old = jax.tree.map(lambda leaf: leaf + jnp.float32(np.nan), old)
    is_born = jnp.zeros((low_rank.num_slots,), bool).at[jnp.asarray([1, 9])].set(True)
    owner = jnp.arange(low_rank.num_slots, dtype=jnp.int32)
    birth = jax.jit(partial(init_newborns, low_rank, owner=owner))
    new = birth(old, is_born, jax.random.key(1))
    born = {("a", "low_rank"): [1], ("b", "low_rank"): [1]}
    for site, at_site in new.items():
        for name, bank in at_site.items():
            for leaf in jax.tree.leaves(bank):
                fresh = np.flatnonzero(
                    np.isfinite(np.asarray(leaf)).all(axis=(*range(1, leaf.ndim),))
                )
                assert fresh.tolist() == born.get((site, name), [])
    again = birth(old, is_born, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), new, again))
    other = birth(old, is_born, jax.random.key(2))
    a, b = (np.asarray(adapters["a"]["low_rank"]["down"][1]) for adapters in (new, other))
    assert not np.array_equal(a, b)


def test_a_newborn_depends_on_no_adapter_before_it(low_rank: Any) -> None:
    """The derivative is that of a plain selection, forward and backward."""
    old = init_adapters(low_rank, jax.random.key(0))
    is_born = jnp.zeros((low_rank.num_slots,), bool).at[jnp.asarray([1, 9])].set(True)
    owner = jnp.arange(low_rank.num_slots, dtype=jnp.int32)

    def fresh(adapters: Any) -> Any:
        return init_newborns(low_rank, adapters, is_born, jax.random.key(1), owner=owner)

    ones = jax.tree.map(jnp.ones_like, old)
    pushed = jax.jit(lambda: jax.jvp(fresh, (old,), (ones,))[1])()
    pulled = jax.jit(lambda: jax.vjp(fresh, old)[1](ones)[0])()
    for tangents in (pushed, pulled):
        flat = [np.asarray(leaf) for leaf in jax.tree.leaves(tangents["a"]["low_rank"])]
        assert all((leaf[1] == 0).all() and (leaf[[0, 2, 3]] == 1).all() for leaf in flat)
        assert all((leaf == 1).all() for leaf in jax.tree.leaves(tangents["b"]["scale"]))


def test_select_slots_takes_rows() -> None:
    first, second = jnp.ones((3, 2, 2)), jnp.zeros((3, 2, 2))
    told = select_slots(jnp.asarray([True, False, True]), first, second)
    assert told[:, 0, 0].tolist() == [1.0, 0.0, 1.0]
