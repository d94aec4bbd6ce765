"""Driving `Growth.update` with made-up measurements, and checking what may never happen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.governors import Alarm, Governor, Verdict
from esper_fn.lifecycle._loss import loss_track
from esper_fn.types import Statistics

NONE = -1
ACTING = (3, 4, 5, 6, 7)
LEARNING = (2, 3, 4, 5, 6, 7)
HOLDING = (1, 2, 3, 4, 5, 6, 7)

# Written by hand from design.md section 5; the code's own table is compared with it.
LEGAL: dict[int, tuple[int, ...]] = {
    0: (1,),
    1: (2, 3, 9),
    2: (3, 8, 9, 10),
    3: (4, 8, 10),
    4: (5, 10),
    5: (6, 8, 10),
    6: (7, 8, 10),
    7: (0,),
    8: (0,),
    9: (0,),
    10: (0,),
}


@contextmanager
def strict() -> Iterator[None]:
    """What `conftest` sets for every test, for module fixtures."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


class Orders(NamedTuple):
    """State of `obedient`: what the governor will order."""

    quarantine: jax.Array
    veto: jax.Array


def obedient(num_seeds: int) -> Governor:
    """A governor that orders what its state says."""

    def update(state: Orders, observation: Any) -> tuple[Orders, Verdict]:
        del observation
        return state, Verdict(
            alarm=jnp.int8(Alarm.CALM),
            forbids_germination=state.veto,
            should_roll_back=jnp.zeros((), bool),
            is_quarantined=state.quarantine,
        )

    def init(num_seeds: int) -> Orders:
        return Orders(jnp.zeros((num_seeds,), bool), jnp.zeros((), bool))

    return Governor(init=init, update=update)


class Rig(NamedTuple):
    """A growth and its compiled update, which always takes `rows` commands."""

    growth: Any
    update: Any
    rows: int

    def fresh(self) -> Any:
        """All seeds dormant, the loss known for long and calm at 1."""
        state = self.growth.init(jax.random.key(0))
        return state._replace(loss=calm_track())

    def step(
        self,
        state: Any,
        commands: Sequence[Any] = (),
        *,
        loss: float = 1.0,
        reading: Any = None,
        adapters: Any = None,
    ) -> Any:
        """One update; nothing measured and adapters as they are where not said otherwise."""
        with strict():
            return self.update(
                state,
                state.adapters if adapters is None else adapters,
                silent(self.growth.layout.num_seeds) if reading is None else reading,
                jnp.float32(loss),
                self.growth.commands(commands, self.rows),
            )


def calm_track(num_steps: int = 1000, loss: float = 1.0, deviation: float = 0.01) -> Any:
    return loss_track()._replace(
        fast=jnp.float32(loss),
        slow=jnp.float32(loss),
        square=jnp.float32(deviation**2),
        num_steps=jnp.int32(num_steps),
    )


def rig(layout: Any, *, rows: int, **parts: Any) -> Rig:
    """Adapters go through TRAINING, so that a seed's way leads through every stage."""
    parts = {
        "policy": ef.policies.never(),
        "governor": ef.governors.disabled(),
        "settings": ef.lifecycle.settings(train_first=True),
        **parts,
    }
    growth = ef.Growth(**layout.arguments, adapters_at_once=None, **parts)
    return Rig(growth=growth, update=jax.jit(growth.update), rows=rows)


@lru_cache(maxsize=1)
def wide() -> Rig:
    """128 seeds of one site, a slot for each, a governor that obeys, two alpha schedules."""
    layout = make_layout(
        sites=[ef.site("all", features=128, chunks=128)],
        blueprints={"scale": ef.blueprints.scale_shift()},
        capacity=128,
    )
    with strict():
        return rig(
            layout,
            rows=128,
            governor=obedient(128),
            graft=(ef.grafting.linear(100), ef.grafting.stability(100)),
        )


@lru_cache(maxsize=1)
def small_layout() -> Any:
    """7 seeds: 3 of a vector site that `conv` does not serve, 2 in each of a sequence's 2 layers.

    Two slots a pool, so the vector site's bank holds 2 of its 3 seeds. Slots 0-1 are the vector
    site's, 2-5 `scale` and 6-9 `conv` of the sequence, layer by layer.
    """
    return make_layout(
        sites=[
            ef.site("vector", features=6, chunks=3),
            ef.site("sequence", features=4, chunks=2, topology="sequence", layers=2, positions=3),
        ],
        blueprints={
            "scale": ef.blueprints.scale_shift(),
            "conv": ef.blueprints.depthwise_conv(window=2),
        },
        capacity=2,
    )


@lru_cache(maxsize=1)
def small() -> Rig:
    with strict():
        return rig(
            small_layout(),
            rows=8,
            governor=obedient(7),
            graft=(ef.grafting.linear(10), ef.grafting.stability(10)),
        )


def reading(
    num_seeds: int, *, live: Any = 0.0, utility: Any = 0.0, gradient: Any = 1.0, errors: Any = 0.0
) -> Statistics:
    """A step in which every site was reached; numbers may be given per seed."""

    def column(value: Any) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, np.float32), (num_seeds,)))

    return Statistics(
        num_values=column(8.0),
        total=column(0.0),
        square=column(8.0),
        num_features=column(1.0),
        num_dead=column(0.0),
        gradient_square=column(np.square(gradient)),
        num_live=column(live),
        output_square=column(live),
        utility=column(utility),
        num_errors=column(errors),
    )


def silent(num_seeds: int) -> Statistics:
    """A step that reached no site."""
    return Statistics(*(jnp.zeros((num_seeds,), jnp.float32) for _ in Statistics._fields))


def place(growth: Any, state: Any, stage: Any, *, blueprint: int = 0, **columns: Any) -> Any:
    """`state` with seeds in the given stages, slots and owners to match, alpha 0.5 where they act.

    `columns` replace columns of `SeedState` or of its telemetry, in the column's own dtype.
    """
    tables = growth.layout.tables
    stage = np.asarray(stage, np.int8)
    slot = np.full(stage.shape, NONE, np.int32)
    owner = np.full(tables.slot_group.shape, NONE, np.int32)
    for seed in np.flatnonzero(np.isin(stage, HOLDING)):
        group = int(np.searchsorted(tables.group_start, seed, side="right")) - 1
        free = np.flatnonzero(
            (owner == NONE) & (tables.slot_pool_start == tables.pool_start[group, blueprint])
        )
        slot[seed], owner[free[0]] = free[0], seed
    acts = np.isin(stage, ACTING)
    columns = {
        "stage": stage,
        "slot": slot,
        "blueprint": np.where(slot >= 0, blueprint, NONE),
        "alpha": np.where(acts, 0.5, 0.0),
        **columns,
    }
    seeds = state.seeds
    told = {}
    for name, value in columns.items():
        source = seeds if hasattr(seeds, name) else seeds.telemetry
        old = getattr(source, name)
        told[name] = jnp.asarray(np.broadcast_to(np.asarray(value), old.shape), old.dtype)
    telemetry = {name: told.pop(name) for name in list(told) if not hasattr(seeds, name)}
    seeds = seeds._replace(**told, telemetry=seeds.telemetry._replace(**telemetry))
    return state._replace(seeds=seeds, owner=jnp.asarray(owner))


def limits(state: Any, **changes: Any) -> Any:
    """`state` with thresholds changed; dwells as `{stage: steps}` or one number for stages 1-6."""
    told = {}
    for name, value in changes.items():
        new = np.array(getattr(state.settings, name))
        if name in {"min_steps", "max_steps"}:
            dwell = value if isinstance(value, dict) else dict.fromkeys(range(1, 7), value)
            new[[int(stage) for stage in dwell]] = list(dwell.values())
        else:
            new[...] = value
        told[name] = jnp.asarray(new)
    return state._replace(settings=state.settings._replace(**told))


def row(seeds: Any, index: int) -> dict[str, bytes]:
    """One seed's row, column by column, as bytes: equal means bit-equal."""
    flat = {**seeds._asdict(), **seeds.telemetry._asdict()}
    del flat["telemetry"]
    return {name: np.asarray(column)[index].tobytes() for name, column in flat.items()}


# --- what may never happen ---------------------------------------------------------------------


def state_faults(growth: Any, state: Any) -> list[str]:
    """Names of the invariants that a state (as NumPy arrays) breaks."""
    tables, seeds = growth.layout.tables, state.seeds
    owner = np.asarray(state.owner)
    stage, slot, alpha = (np.asarray(c) for c in (seeds.stage, seeds.slot, seeds.alpha))
    blueprint = np.asarray(seeds.blueprint)
    every_seed, every_slot = np.arange(stage.size), np.arange(owner.size)
    holds, held = slot != NONE, owner != NONE
    faults = []
    if not ((stage >= 0) & (stage <= 10)).all():
        faults.append("unknown stage")
    if not (np.isin(stage, HOLDING) == holds).all():
        faults.append("slot without an adapter's stage, or the reverse")
    if (slot[holds] >= owner.size).any() or (owner[slot[holds]] != every_seed[holds]).any():
        faults.append("a seed's slot is not its own")
    if (slot[owner[held]] != every_slot[held]).any():
        faults.append("a slot's owner does not hold it")
    if not ((blueprint != NONE) == holds).all():
        faults.append("blueprint without an adapter")
    group = np.searchsorted(tables.group_start, every_seed, side="right") - 1
    pool = tables.pool_start[group, np.maximum(blueprint, 0)]
    if (tables.slot_pool_start[slot[holds]] != pool[holds]).any():
        faults.append("a slot of another pool")
    if np.count_nonzero(~held) != owner.size - np.count_nonzero(np.isin(stage, HOLDING)):
        faults.append("free slots miscounted")
    if not ((alpha >= 0) & (alpha <= 1)).all():
        faults.append("alpha outside [0, 1]")
    if (alpha[~np.isin(stage, ACTING)] != 0).any():
        faults.append("alpha in a stage that does not act")
    if (np.asarray(seeds.is_paused) & ~np.isin(stage, HOLDING[:-1])).any():
        faults.append("paused without a way to go")
    counters = (seeds.steps_in_stage, seeds.embargo_steps, seeds.error_count)
    if any((np.asarray(counter) < 0).any() for counter in counters):
        faults.append("a negative counter")
    if any(not np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.adapters)):
        faults.append("an adapter that is not finite")
    floats = [x for x in jax.tree.leaves(seeds) if np.issubdtype(np.asarray(x).dtype, np.floating)]
    if any(not np.isfinite(np.asarray(column)).all() for column in floats):
        faults.append("a row that is not finite")
    return faults


def step_faults(growth: Any, before: Any, after: Any, info: Any) -> list[str]:
    """Names of the invariants that one update breaks."""
    old, new = before.seeds, after.seeds
    was, now = np.asarray(old.stage), np.asarray(new.stage)
    changed = was != now
    faults = []
    if any(int(b) not in LEGAL[int(a)] for a, b in zip(was[changed], now[changed], strict=True)):
        faults.append("illegal transition")
    if (np.asarray(info.before) != was).any() or (np.asarray(info.stage) != now).any():
        faults.append("info tells other stages")
    if ((np.asarray(info.cause) != 0) != changed).any():
        faults.append("a change without a cause, or the reverse")
    if (np.asarray(new.parent) != np.where(changed, was, old.parent)).any():
        faults.append("parent is not the stage before")
    ticks = np.where(changed, 0, np.asarray(old.steps_in_stage) + ~np.asarray(new.is_paused))
    if (np.asarray(new.steps_in_stage) != ticks).any():
        faults.append("steps miscounted")
    moved = np.abs(np.asarray(new.alpha) - np.asarray(old.alpha))
    stays_acting = np.isin(was, ACTING) & np.isin(now, ACTING)
    largest = np.asarray([graft.max_step for graft in growth.grafts])
    most = np.where(was == 3, largest[np.asarray(old.graft)] + 2e-5, 0.0)
    if (moved > most)[stays_acting].any():
        faults.append("alpha jumps")
    gone, come = np.asarray(before.owner), np.asarray(after.owner)
    if ((gone != come) & (gone != NONE) & (come != NONE)).any():
        faults.append("a slot changes hands within one step")
    born = np.asarray(after.generation) - np.asarray(before.generation)
    if (born != ((gone == NONE) & (come != NONE))).any():
        faults.append("births miscounted")
    learns = (gone != NONE) & np.isin(was[np.maximum(gone, 0)], LEARNING)
    for bank in growth.layout.tables.banks:
        site = growth.layout.sites[bank.site].name
        name = growth.layout.names[bank.blueprint]
        here = slice(bank.start, bank.start + bank.num_slots)
        kept = ~learns[here] & (born[here] == 0)
        pairs = (jax.tree.leaves(state.adapters[site][name]) for state in (before, after))
        for a, b in zip(*pairs, strict=True):
            if np.asarray(a)[kept].tobytes() != np.asarray(b)[kept].tobytes():
                faults.append("an adapter that does not learn has changed")
    if int(after.step) != int(before.step) + 1:
        faults.append("step miscounted")
    return sorted(set(faults))
