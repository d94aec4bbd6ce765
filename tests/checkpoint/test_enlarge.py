"""Growing the capacity of a state in memory, and of checkpoints of a loop of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from checkpoint_support import assert_same, fail
from growing import Job, mlp

import esper_fn as ef
from esper_fn import checkpoint, runtime
from esper_fn.errors import CheckpointError
from esper_fn.runtime._packing import pack

KEY = jax.random.key(7)
MORE = ef.site("more", features=6, chunks=3)


def numbers(state: runtime.TrainState) -> Any:
    """All leaves as NumPy's, without the random key."""
    growth_state = state.growth_state._replace(key=0)
    return jax.tree.map(np.array, state._replace(growth_state=growth_state))


@pytest.fixture(scope="module")
def job() -> Job:
    """A run that has no room for more: each bank has one slot."""
    return mlp(capacity=1)


@pytest.fixture(scope="module")
def state(job: Job) -> runtime.TrainState:
    state: runtime.TrainState = job.fit(num_steps=60).state
    assert (np.asarray(state.growth_state.owner) >= 0).sum() >= 2
    return state


def growth(job: Job, capacity: int = 2, sites: Any = None, **options: Any) -> ef.Growth:
    layout = job.growth.layout
    sites = layout.sites if sites is None else sites
    blueprints = dict(zip(layout.names, layout.blueprints, strict=True))
    return ef.Growth(
        sites=sites,
        blueprints=blueprints,
        capacity=capacity,
        **options,
        policy=job.growth.policy,
        graft=ef.grafting.linear(12),
        settings=job.growth.settings,
        adapters_at_once=None,
    )


def test_more_capacity_in_memory_changes_nothing_that_lives(
    job: Job, state: runtime.TrainState
) -> None:
    larger = growth(job, sites=[*job.growth.layout.sites, MORE])
    before = numbers(state)
    carried, changes = runtime.enlarge(state, larger, job.optimizer, key=KEY, before=job.growth)
    # The old state is untouched.
    assert_same(
        before,
        jax.tree.map(np.array, state._replace(growth_state=state.growth_state._replace(key=0))),
    )
    assert carried.growth_state.owner.shape == (larger.layout.num_slots,)
    assert (job.growth.layout.num_slots, larger.layout.num_slots) == (4, 8)
    assert (np.asarray(carried.growth_state.owner) >= 0).sum() == (
        np.asarray(state.growth_state.owner) >= 0
    ).sum()
    assert any("new slots, fresh" in change for change in changes)
    batch = jax.tree.map(lambda leaf: leaf[0], job.batches(60, 1))
    np.testing.assert_allclose(
        job.loss_fn(state.params, job.growth.seeds(state.growth_state), batch),
        job.loss_fn(carried.params, larger.seeds(carried.growth_state), batch),
        rtol=1e-6,
    )
    assert int(carried.growth_state.step) == 60
    assert int(carried.ring.every) == int(state.ring.every)


def test_the_growth_alone_needs_no_optimizer(job: Job, state: runtime.TrainState) -> None:
    larger = growth(job)
    whole = runtime.enlarge(
        state, larger, job.optimizer, key=KEY, before=job.growth
    ).state.growth_state
    assert_same(
        whole, runtime.enlarge(state.growth_state, larger, key=KEY, before=job.growth).state
    )


def test_rows_of_an_alpha_schedule_follow_their_seeds_and_its_numbers_stay() -> None:
    def make(*sites: Any, graft: Any) -> ef.Growth:
        blueprints = {"scale": ef.blueprints.scale_shift()}
        return ef.Growth(sites=sites, blueprints=blueprints, capacity=1, graft=graft)

    front, old = ef.site("front", features=4), ef.site("old", features=4, chunks=2)
    small = make(old, graft=[ef.grafting.momentum(50), ef.grafting.linear(40)])
    state = small.init(KEY)
    tuned = state.grafts[0]._replace(gain=np.float32(0.5), speed=np.float32([1.5, 2.5]))
    state = state._replace(grafts=(tuned, state.grafts[1]))
    large = make(front, old, graft=[ef.grafting.linear(30), ef.grafting.momentum(60)])
    linear, momentum = runtime.enlarge(state, large, key=KEY, before=small).state.grafts
    assert momentum.speed.tolist() == [1.0, 1.5, 2.5]
    assert (float(momentum.gain), float(momentum.step)) == (0.5, np.float32(1 / 50))
    assert float(linear.step) == np.float32(1 / 40)


def test_there_and_nothing_more_is_the_same(job: Job, state: runtime.TrainState) -> None:
    carried, changes = runtime.enlarge(state, job.growth, job.optimizer, key=KEY, before=job.growth)
    assert changes == ("ring: snapshots begin now",)
    assert_same(state[:3], carried[:3])


FORMS = {
    "the state alone": pack,
    "as it is in memory": lambda state: state,
    "under a name": lambda state: {"state": pack(state), "losses": np.ones(3)},
    "under another name": lambda state: {"mine": state, "best": 0.5},
    "its parts": lambda state: {
        "params": state.params, "opt_state": state.opt_state, "growth_state": state.growth_state
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_checkpoints_of_a_loop_of_ones_own(
    job: Job, state: runtime.TrainState, tmp_path: Path, name: str
) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        writer.save(60, FORMS[name](state), record={"mine": [1]} if name[0] == "u" else None)
    restored = checkpoint.restore(tmp_path)
    larger = growth(job)
    carried = runtime.enlarge(restored, larger, job.optimizer, key=KEY, before=job.growth)
    expected = runtime.enlarge(state, larger, job.optimizer, key=KEY, before=job.growth)
    if name == "its parts":
        assert carried.state.ring is None
        expected = expected._replace(state=expected.state._replace(ring=None))
    assert_same(expected.state, carried.state)
    with pytest.raises(CheckpointError, match=r"does not say with which growth .* pass `before=`"):
        runtime.enlarge(restored, larger, job.optimizer, key=KEY)


def restored_of(value: Any, record: Any = None) -> checkpoint.Restored:
    return checkpoint.Restored(
        step=3, value=value, record=record, metrics={}, versions={}, passed_over=()
    )


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "does not hold a whole run"),
    "nothing": (None, "does not hold a whole run"),
    "a word": ("state", "does not hold a whole run"),
    "a dict of others": ({"weights": np.ones(2)}, r"it is a dict with \['weights'\]"),
    "a state of words": ({"state": "x"}, "does not hold a whole run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_state_is_refused_by_what_it_is(job: Job, name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(CheckpointError, match=message):
        runtime.enlarge(restored_of(value), growth(job), job.optimizer, key=KEY, before=job.growth)
    with pytest.raises(CheckpointError, match=message):
        runtime.enlarge(value, growth(job), job.optimizer, key=KEY, before=job.growth)


def test_arguments_of_another_kind_are_named(job: Job, state: runtime.TrainState) -> None:
    larger = growth(job)
    arguments = {
        "source": state,
        "before": job.growth,
        "growth": larger,
        "optimizer": job.optimizer,
    }
    arguments["key"] = KEY
    words = state.growth_state._replace(step="60")
    for changes, message in (
        ({"before": None}, "before must be a growth, .* got NoneType"),
        ({"before": larger}, "state is not of the growth `before`: it has 4 slots, the growth 6"),
        ({"growth": larger.layout}, "growth must be a growth, .* got Layout"),
        ({"optimizer": None}, r"optimizer must be the run's, .* got NoneType"),
        ({"optimizer": optax.adam(0.1)}, "optimizer must be the run's"),
        ({"optimizer": ef.optim.per_adapter(optax.sgd(0.1))}, "opt_state.host|must be the run's"),
        ({"key": 3}, "key must be a random key, .* got int"),
        (
            {"source": state._replace(growth_state=None)},
            "growth_state must be .*, got NoneType",
        ),
        ({"source": state._replace(opt_state=(1,))}, "opt_state must be of `optim.per_adapter`"),
        (
            {"source": state._replace(growth_state=words)},
            "growth_state.step must be an array, got str",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            runtime.enlarge(**{**arguments, **changes})
    with pytest.raises(CheckpointError, match=r"before must be a growth, .* got NoneType"):
        runtime.enlarge(state, larger, job.optimizer, key=KEY)
    for record in (None, 5, {"settings": None}, {"settings": {"sites": 3}}, {"settings": {1: 2}}):
        with pytest.raises(CheckpointError, match="pass `before="):
            runtime.enlarge(restored_of(state, record), larger, job.optimizer, key=KEY)
    strange = {"sites": [[1]], "blueprints": [], "capacity": "x", "dtype": "y", "grafts": []}
    with pytest.raises(CheckpointError, match="pass `before="):
        runtime.enlarge(restored_of(state, {"settings": strange}), larger, job.optimizer, key=KEY)


def test_optimisers_with_random_keys_are_carried(job: Job) -> None:
    noisy = ef.optim.per_adapter(optax.add_noise(0.1, 0.5, jax.random.key(3)))
    started = runtime.init(noisy, job.params, job.growth.init(KEY))
    carried = runtime.enlarge(started, growth(job), noisy, key=KEY, before=job.growth).state
    assert_same(started.opt_state.host, carried.opt_state.host)


def test_what_lives_is_never_dropped(job: Job, state: runtime.TrainState) -> None:
    with pytest.raises(CheckpointError, match="holds an adapter that has no place in this layout"):
        runtime.enlarge(state, growth(job, sites=[MORE]), job.optimizer, key=KEY, before=job.growth)
