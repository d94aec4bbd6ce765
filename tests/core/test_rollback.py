"""The ring of snapshots: what a roll-back restores, and what holding it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import esper_fn as ef
from esper_fn import rollback, runtime
from esper_fn.governors import Alarm, Verdict

GROWTH = ef.Growth(
    sites=[ef.site("hidden", features=4, chunks=2)],
    blueprints={"scale": ef.blueprints.scale_shift()},
    capacity=2,
    policy=ef.policies.never(),
)
STATE = GROWTH.init(jax.random.key(0))

TWO_DEVICES = "--xla_force_host_platform_device_count=2"


class Event(NamedTuple):
    """What happens in one step."""

    alarm: int = Alarm.CALM
    goes_back: bool = False
    is_elevated: bool = False
    born: int = -1
    """A slot that gets a newborn adapter in this step."""


CALM = Event()
BACK = Event(alarm=Alarm.NON_FINITE_LOSS, goes_back=True)
ELEVATED = Event(is_elevated=True)
DRIFT = Event(alarm=Alarm.DRIFT)


def numbers(step: Any) -> tuple[Any, Any, Any]:
    """Parameters, optimiser state and adapters that say how many steps were done."""
    count = jnp.asarray(step, jnp.float32)
    adapters = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1.0) * count, STATE.adapters)
    return {"w": count, "b": jnp.full((3,), 1.0) * count}, (count.astype(jnp.int32),), adapters


def start(every: int, places: int) -> rollback.Ring:
    params, opt_state, adapters = numbers(0)
    state = STATE._replace(adapters=adapters)
    opt_state = (*opt_state, state.generation)
    return rollback.init(params, opt_state, state, every=every, num_snapshots=places)


@jax.jit
def play(ring: rollback.Ring, events: Event) -> Any:
    """For each step what stands after it, and the ring."""

    def one(carry: Any, event: Event) -> Any:
        ring, step, births = carry
        params, opt_state, adapters = numbers(step + 1)
        opt_state = (*opt_state, births)  # as the optimiser knew them, before the step's own
        births += (jnp.arange(births.shape[0]) == event.born).astype(jnp.int32)
        state = STATE._replace(adapters=adapters, generation=births, step=step + 1)
        verdict = Verdict(
            alarm=event.alarm.astype(jnp.int8),
            forbids_germination=jnp.zeros((), bool),
            should_roll_back=event.goes_back,
            is_quarantined=jnp.zeros((2,), bool),
            is_elevated=event.is_elevated,
        )
        params, opt_state, state, ring, undone = rollback.update(
            GROWTH, ring, params, opt_state, state, verdict
        )
        is_new = state.generation != opt_state[1]
        row = (params["w"], params["b"][2], opt_state[0], _of_slots(state.adapters), is_new, undone)
        return (ring, step + 1, births), row

    (ring, _, _), rows = jax.lax.scan(one, (ring, jnp.int32(0), STATE.generation), events)
    return ring, rows


def _of_slots(adapters: Any) -> jax.Array:
    return jax.tree.leaves(adapters)[0].reshape(2, -1)[:, 0]


def run(every: int, places: int, events: list[Event], length: int = 64) -> Any:
    """`play`, filled up to a length that is compiled already."""
    padded = [*events, *[CALM] * (length - len(events))]
    ring, rows = play(start(every, places), Event(*map(jnp.asarray, zip(*padded, strict=True))))
    return ring, [np.asarray(row)[: len(events)] for row in rows]


class Model:
    """The same ring as a list of (step, slots born since, slots born just then), oldest first."""

    def __init__(self, every: int, places: int) -> None:
        self.every, self.places = every, places
        self.ring: list[tuple[int, set[int], set[int]]] = [(0, set(), set())]
        self.age, self.due = 0, every

    def step(self, step: int, event: Event) -> tuple[int, set[int], set[int]] | None:
        """The snapshot restored after it, if any."""
        self.age += 1
        now = {event.born} - {-1}
        self.ring = [(at, since | now, then) for at, since, then in self.ring]
        if event.goes_back:
            if len(self.ring) > 1:
                self.ring.pop()
            self.age, self.due = 0, self.places * self.every
            return self.ring[-1]
        is_calm = event.alarm == Alarm.CALM and not event.is_elevated
        if self.age >= self.due and is_calm:
            self.ring = [*self.ring, (step + 1, set(), now)][-self.places :]
            self.age, self.due = 0, self.every
        return None


def check(every: int, places: int, events: list[Event]) -> None:
    model = Model(every, places)
    _, (w, b, count, adapters, is_new, undone) = run(every, places, events)
    for step, event in enumerate(events):
        restored = model.step(step, event)
        assert undone[step] == (0 if restored is None else step + 1 - restored[0])
        stands, born, then = restored or (step + 1, {event.born} - {-1}, set())
        assert w[step] == b[step] == count[step] == stands, step
        assert set(np.flatnonzero(is_new[step]).tolist()) == born | then, step
        for slot in range(2):
            # An adapter born since keeps its numbers, all others go back in lockstep.
            assert adapters[step, slot] == (step + 1 if slot in born else stands), step


EVENTS = st.one_of(
    st.just(CALM), st.just(CALM), st.sampled_from([BACK, ELEVATED, DRIFT]),
    st.integers(0, 1).map(lambda slot: Event(born=slot)),
    st.just(BACK._replace(born=1)),
)  # fmt: skip


@pytest.mark.parametrize("places", [1, 2, 3, 5])
@given(every=st.integers(1, 6), events=st.lists(EVENTS, max_size=64))
@settings(max_examples=40, deadline=None)
def test_the_ring_is_what_the_model_says(places: int, every: int, events: list[Event]) -> None:
    check(every, places, events)


def restored(every: int, places: int, backs: list[int]) -> list[int]:
    """To which steps roll-backs in these steps go."""
    events = [BACK if step in backs else CALM for step in range(64)]
    check(every, places, events)
    return [int(run(every, places, events)[1][0][step]) for step in backs]


@pytest.mark.parametrize(
    ("places", "backs", "wanted"),
    [
        # Snapshots of 20 and 30 steps stand, and of 40 where there is room: the newest is skipped.
        (1, [43], [40]),
        (2, [43], [30]),
        (4, [43], [30]),
        # Soon after one another: one further each time, and the oldest stays.
        (4, [43, 44, 45, 46], [30, 20, 10, 10]),
        (3, [43, 48, 61], [30, 20, 20]),
        (2, [43, 44], [30, 30]),
        (1, [43, 44], [40, 40]),
        # After 3 * 10 calm steps a new one is taken, and the trouble is over.
        (3, [23, 62], [10, 10]),
        (3, [23, 52], [10, 0]),
        # Before there is any other than the first.
        (3, [0, 5, 14], [0, 0, 0]),
    ],
)
def test_emergencies_soon_after_one_another_go_back_further(
    places: int, backs: list[int], wanted: list[int]
) -> None:
    assert restored(10, places, backs) == wanted


def test_nothing_is_kept_while_things_go_wrong() -> None:
    """A divergence takes a while to become an alarm; its numbers never enter the ring."""
    events = [*[CALM] * 32, *[ELEVATED] * 25, BACK._replace(alarm=Alarm.DIVERGENCE)]
    check(5, 3, events)
    assert int(run(5, 3, events)[1][0][-1]) == 25
    # The steps after a roll-back that are no better replace nothing that is older.
    events = [*[CALM] * 32, BACK, *[ELEVATED] * 25, BACK]
    assert [int(run(5, 3, events)[1][0][step]) for step in (32, 58)] == [25, 20]


def test_a_state_of_many_runs_goes_back_run_by_run() -> None:
    source = np.random.default_rng(0)
    choice = np.asarray([CALM, CALM, CALM, BACK, DRIFT, ELEVATED, Event(born=0)], np.int32)
    drawn = choice[source.integers(len(choice), size=(3, 64))]
    events = Event(
        alarm=jnp.asarray(drawn[..., 0]),
        goes_back=jnp.asarray(drawn[..., 1] > 0),
        is_elevated=jnp.asarray(drawn[..., 2] > 0),
        born=jnp.asarray(drawn[..., 3]),
    )
    ring = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), start(3, 3))
    many = jax.vmap(play)(ring, events)
    for index in range(3):
        alone = play(start(3, 3), jax.tree.map(lambda leaf, at=index: leaf[at], events))
        for one, two in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(one[index], two)


# --- cost --------------------------------------------------------------------------------------


def of_entry(program: str, shape: str) -> list[str]:
    """The lines outside all loops that make something of a shape."""
    entry = program.split("\nENTRY ")[1]
    return [line for line in entry.splitlines() if f"= {shape}" in line]


@pytest.mark.parametrize("num_steps", [None, 4])
def test_a_step_copies_no_snapshot_and_works_in_place(num_steps: int | None) -> None:
    """Donated, the ring stays in its buffers; nothing of its size runs outside the loops."""
    params = {"w": jnp.zeros((64, 129))}
    ring = rollback.init(params, (), STATE, num_snapshots=5)
    no = jnp.zeros((), bool)
    verdict = Verdict(jnp.int8(0), no, no, jnp.zeros((2,), bool), no)

    def loss_fn(params: Any, seeds: Any) -> jax.Array:
        del seeds
        return jnp.sum(params["w"])

    def step(carry: Any, verdict: Verdict) -> Any:
        ring, params, state = carry
        reference, ring = rollback.reference_loss(GROWTH, ring, loss_fn, state)
        params = jax.tree.map(lambda leaf: leaf * 0.5 + 1, params)
        params, _, state, ring, _ = rollback.update(GROWTH, ring, params, (), state, verdict)
        return (ring, params, state), reference

    def steps(carry: Any, verdicts: Verdict) -> Any:
        return jax.lax.scan(step, carry, verdicts)

    call, verdicts = step, verdict
    if num_steps is not None:
        call, verdicts = steps, jax.tree.map(lambda leaf: jnp.stack([leaf] * num_steps), verdict)
    compiled = jax.jit(call, donate_argnums=0).lower((ring, params, STATE), verdicts).compile()
    ring_bytes, one_bytes = 5 * 64 * 129 * 4, 64 * 129 * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= ring_bytes + one_bytes
    assert memory.temp_size_in_bytes < 3 * one_bytes
    of_ring = re.findall(r"= f32\[5,64,129\]\S* ([\w-]+)\(", compiled.as_text())
    # One fusion writes one snapshot in place, inside the loop of one round or none, and one writes
    # back the snapshot that was tried, inside another.
    assert sorted(set(of_ring)) == [
        "dynamic-update-slice",
        "fusion",
        "get-tuple-element",
        "parameter",
    ]
    assert of_ring.count("fusion") == 2
    if num_steps is None:
        assert " fusion(" not in "".join(of_entry(compiled.as_text(), "f32[5,64,129]"))


def test_nothing_recompiles() -> None:
    run(3, 3, [])
    with runtime.count_compilations() as count:
        run(3, 3, [CALM, BACK, ELEVATED, BACK])
        run(7, 3, [DRIFT])
    assert count.num_compiled == 0


def test_snapshots_are_divided_among_devices_as_the_parameters_are() -> None:
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        import esper_fn as ef
        from esper_fn import rollback
        from esper_fn.governors import Verdict
        growth = ef.Growth(
            sites=[ef.site("hidden", features=4, chunks=2)],
            blueprints={"scale": ef.blueprints.scale_shift()},
            capacity=2,
        )
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
        wanted = NamedSharding(mesh, P(None, "data"))
        rows = jnp.arange(12.0).reshape(6, 2)
        params = {"w": jax.device_put(rows, NamedSharding(mesh, P("data")))}
        state = growth.init(jax.random.key(0))
        ring = rollback.init(params, (), state, every=1, num_snapshots=3)
        step = jax.jit(lambda *x: rollback.update(growth, x[0], x[1], (), *x[2:]), donate_argnums=0)
        no = jnp.zeros((), bool)
        for back in (False, False, False, True, True):
            assert ring.snapshots.params["w"].sharding.is_equivalent_to(wanted, 3)
            verdict = Verdict(jnp.int8(0), no, jnp.asarray(back), jnp.zeros((2,), bool))
            state = state._replace(step=state.step + 1)
            params, _, state, ring, _ = step(ring, params, state, verdict)
            first = int(params["w"][0, 0])
            params = {"w": params["w"] + 1}
        print(first, len(params["w"].sharding.device_set))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}",
        },
    )
    assert done.stdout == "0 2\n"


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3", None])
def test_a_ring_of_no_snapshots_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"num_snapshots must be an int, at least 1, got .*ring"):
        rollback.init({}, (), STATE, num_snapshots=wrong)


@pytest.mark.parametrize("wrong", [0, -5, 1.5, False])
def test_no_interval_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="every must be an int, at least 1, got"):
        rollback.init({}, (), STATE, every=wrong)


def test_in_the_runtime_0_means_none() -> None:
    import optax

    optimizer = ef.optim.per_adapter(optax.sgd(0.1))
    params = {"w": jnp.ones((2,))}
    assert runtime.init(optimizer, params, STATE, num_snapshots=0).ring is None
    assert runtime.init(optimizer, params, STATE, snapshot_every=None).ring is None
    ring = runtime.init(optimizer, params, STATE).ring
    assert ring is not None
    assert ring.num_snapshots == rollback.NUM_SNAPSHOTS == 3
    with pytest.raises(ValueError, match="num_snapshots must be an int, at least 1, got -2"):
        runtime.init(optimizer, params, STATE, num_snapshots=-2)


def test_memory_is_that_many_copies() -> None:
    params, opt_state, adapters = numbers(0)
    state = STATE._replace(adapters=adapters)
    now = rollback.take_snapshot(params, opt_state, state)
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(now))
    for places in (1, 2, 7):
        ring = rollback.init(params, opt_state, state, num_snapshots=places)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(ring.snapshots)) == places * one
