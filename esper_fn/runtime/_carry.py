"""A state, saved or in memory, into a larger layout: more capacity, sites, blueprints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn import checkpoint, rollback
from esper_fn._growth import Growth, GrowthState
from esper_fn._layout import Layout, make_layout
from esper_fn._sites import Site
from esper_fn._typing import Key
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import NONE, SeedState
from esper_fn.optim._checks import find_states
from esper_fn.runtime import _rows
from esper_fn.runtime._carry_optimizer import carried_optimizer_state
from esper_fn.runtime._packing import num_snapshots
from esper_fn.runtime._plain import decoded
from esper_fn.runtime._step import TrainState


class Carried(NamedTuple):
    """A state for a larger layout, and what is not as it was."""

    state: Any
    """A `TrainState`, or a `GrowthState` where one was given."""
    changes: tuple[str, ...]
    """One line for each group of leaves that changed, and by which rule."""


def carry_over(
    restored: checkpoint.Restored,
    growth: Growth,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
    *,
    key: Key,
    before: Growth | None = None,
) -> Carried:
    """Puts what was saved into a growth with more capacity, sites, blueprints or alpha schedules.

    Args:
      restored: a step read back whole. `fit` saved it, or a loop of your own: its value is a
        `TrainState` or a `GrowthState`, or a dict that has one, or
        one with `params`, `opt_state` and `growth`.
      growth: the larger one; blueprints are recognised by their names.
      optimizer: the one of the run; needless for a `GrowthState`.
      key: for the new slots' adapters.
      before: the growth the step was saved with. `fit` notes it; a loop of your own gives it here.

    Returns:
      What `enlarge` returns, by its rules.

    Raises:
      CheckpointError: no such state, or something living has no slot in `growth`.
    """
    if not isinstance(restored, checkpoint.Restored):
        raise CheckpointError(
            f"restored must be what `checkpoint.restore` returns, got {type(restored).__name__}; "
            "for a state in memory there is `runtime.enlarge`"
        )
    _check_growth("growth", growth)
    if before is not None:
        _check_growth("before", before)
        old = _Before(before.layout, tuple(graft.name for graft in before.grafts))
    else:
        old = _from_record(restored, growth.layout)
    where = f"step {restored.step}"
    return _carried(_state_of(restored.value, where), old, growth, optimizer, key, where)


def enlarge(
    state: TrainState | GrowthState,
    before: Growth,
    growth: Growth,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
    *,
    key: Key,
) -> Carried:
    """Puts a state into a growth with more capacity, sites, blueprints or alpha schedules.

    | leaves | rule |
    |---|---|
    | `params`, `opt_state.host`, `growth.loss`, `.settings`, `.key`, `.step` | as before |
    | `growth.seeds` | row of the same site, layer and chunk; a new seed is dormant |
    | `growth.adapters`, `opt_state.adapters`, `growth.generation` | slot of the same site,
    blueprint, \
layer and position; a new slot is fresh |
    | `growth.owner`, `seeds.slot`, `.blueprint`, `.graft` | renumbered to name the same things |
    | `growth.grafts` | of a schedule of the same name: numbers as before, rows as \
`growth.seeds`; others the growth's own |
    | `growth.policy`, `growth.governor` | as before where structure and shapes are the growth's, \
else its own, from their beginning |
    | `growth.memory` | forgotten until the next survey |
    | `ring` | snapshots begin now: no roll-back goes back beyond this moment |

    Shapes are larger then, so programs compile again. Arrays lie on the default device.

    Args:
      state: the present one, as `Fit.state`; it is not changed. A `GrowthState` for loops with an
        optimiser of their own.
      before: the growth it belongs to.
      growth: the larger one; blueprints are recognised by their names.
      optimizer: the one of the run; needless for a `GrowthState`.
      key: for the new slots' adapters.

    Returns:
      A state of the same kind, for `fit(start=...)` or a loop of your own, and what changed.

    Raises:
      CheckpointError: not a state of `before`, or something living has no slot in `growth`.
    """
    _check_growth("before", before)
    _check_growth("growth", growth)
    old = _Before(before.layout, tuple(graft.name for graft in before.grafts))
    return _carried(_state_of(state, "state"), old, growth, optimizer, key, "state")


class _Before(NamedTuple):
    """What of the smaller growth is no state."""

    layout: Layout
    grafts: tuple[str, ...]


def _check_growth(name: str, growth: Any) -> None:
    if not isinstance(growth, Growth):
        raise CheckpointError(
            f"{name} must be a growth, an `esper_fn.Growth`, got {type(growth).__name__}"
        )


def _from_record(restored: checkpoint.Restored, larger: Layout) -> _Before:
    record = restored.record
    settings = decoded(record.get("settings")) if isinstance(record, dict) else None
    names = ("sites", "blueprints", "capacity", "dtype", "grafts")
    if not isinstance(settings, dict) or any(name not in settings for name in names):
        raise CheckpointError(
            f"step {restored.step} does not say with which growth it was saved, as steps of `fit` "
            "do; pass `before=` the growth of that run"
        )
    return _Before(_layout_of(settings, larger), tuple(settings["grafts"]))


def _state_of(value: Any, where: str) -> TrainState | GrowthState:
    """The state in what was saved, by its type."""
    if isinstance(value, TrainState | GrowthState):
        return value
    inner = value if isinstance(value, dict) else {}
    if isinstance(inner.get("growth"), GrowthState) and {"params", "opt_state"} <= inner.keys():
        return TrainState(
            params=inner["params"],
            opt_state=inner["opt_state"],
            growth=inner["growth"],
            ring=inner.get("ring"),
        )
    for kind in (TrainState, GrowthState):
        states = [one for one in inner.values() if isinstance(one, kind)]
        if len(states) == 1:
            return states[0]
    has = f"a dict with {list(inner)[:20]}" if inner else f"a {type(value).__name__}"
    raise CheckpointError(
        f"{where} does not hold a whole run: there must be a `TrainState` or a `GrowthState`, or a "
        f"dict with one, or with `params`, `opt_state` and `growth`; it is {has}. Restore it "
        "without `only=`, or put the parts together and call `runtime.enlarge`"
    )


def _carried(
    old: TrainState | GrowthState,
    before: _Before,
    growth: Growth,
    optimizer: optax.GradientTransformationExtraArgs | None,
    key: Key,
    where: str,
) -> Carried:
    if not isinstance(key, jax.Array | np.ndarray):
        raise CheckpointError(
            f"key must be a random key, `jax.random.key(0)` say, got {type(key).__name__}"
        )
    saved = old if isinstance(old, GrowthState) else old.growth
    _check_state(old, saved, before, where)
    _check_layouts(before.layout, growth.layout)
    fresh = growth.init(key)
    maps = _Maps(
        seed=_rows.seed_map(before.layout, growth.layout),
        slot=_rows.slot_map(before.layout, growth.layout),
    )
    _rows.check_nothing_is_lost(before.layout, saved, maps.seed, maps.slot)
    changes: list[str] = []
    grown = _growth_state(saved, fresh, before, growth, maps, changes)
    if isinstance(old, GrowthState):
        return Carried(state=jax.tree.map(jnp.copy, grown), changes=tuple(changes))
    params = jax.tree.map(jnp.asarray, old.params)
    opt_state = carried_optimizer_state(
        old.opt_state, params, fresh, before.layout, growth.layout, optimizer, changes
    )
    ring = None
    if old.ring is not None:
        ring = rollback.init(
            params,
            opt_state,
            grown,
            every=int(old.ring.every),
            num_snapshots=num_snapshots(old.ring),
        )
        changes.append("ring: snapshots begin now")
    state = TrainState(params=params, opt_state=opt_state, growth=grown, ring=ring)
    return Carried(state=jax.tree.map(jnp.copy, state), changes=tuple(changes))


class _Maps(NamedTuple):
    """For each seed and slot of the larger layout the one it takes over, or `NONE`."""

    seed: np.ndarray
    slot: np.ndarray


def _growth_state(
    saved: GrowthState,
    fresh: GrowthState,
    before: _Before,
    growth: Growth,
    maps: _Maps,
    changes: list[str],
) -> GrowthState:
    def rows(of: np.ndarray, old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: _rows.merged(of, a, b), old, new)

    after = growth.layout
    new_seed = _rows.inverse(maps.seed, before.layout.num_seeds)
    new_slot = _rows.inverse(maps.slot, before.layout.num_slots)
    graft_of = [_index(growth, name) for name in before.grafts]
    seeds: SeedState = rows(maps.seed, saved.seeds, fresh.seeds)
    blueprints = [after.names.index(name) for name in before.layout.names]
    seeds = seeds._replace(
        slot=_rows.renumbered(seeds.slot, new_slot),
        blueprint=_rows.renumbered(seeds.blueprint, np.asarray(blueprints, np.int8)),
        graft=_rows.renumbered(seeds.graft, np.asarray(graft_of, np.int8)),
    )
    owner = rows(maps.slot, saved.owner, fresh.owner)
    adapters = _rows.banks(before.layout, after, saved.adapters, fresh.adapters)
    if (num_new := int((maps.seed == NONE).sum())) > 0:
        changes.append(f"growth.seeds: {num_new} new, dormant")
    if (num_new := int((maps.slot == NONE).sum())) > 0:
        changes.append(f"growth.adapters, opt_state.adapters: {num_new} new slots, fresh")

    def as_before(name: str) -> Any:
        old, own = getattr(saved, name), getattr(fresh, name)
        if _rows.shapes(old) == _rows.shapes(own):
            return jax.tree.map(jnp.asarray, old)
        changes.append(f"growth.{name}: of another form, begins anew")
        return own

    if fresh.memory is not None or saved.memory is not None:
        changes.append("growth.memory: forgotten until the next survey")
    saved_grafts = dict(zip(before.grafts, saved.grafts, strict=True))
    return fresh._replace(
        seeds=seeds,
        adapters=adapters,
        owner=_rows.renumbered(owner, new_seed),
        generation=rows(maps.slot, saved.generation, fresh.generation),
        loss=jax.tree.map(jnp.asarray, saved.loss),
        settings=jax.tree.map(jnp.asarray, saved.settings),
        grafts=tuple(
            _schedule_state(maps.seed, saved_grafts.get(graft.name), own)
            for graft, own in zip(growth.grafts, fresh.grafts, strict=True)
        ),
        policy=as_before("policy"),
        governor=as_before("governor"),
        key=saved.key,
        step=jnp.asarray(saved.step),
    )


def _schedule_state(seed: np.ndarray, old: Any, own: Any) -> Any:
    """An alpha schedule's numbers as before, and the rows of the seeds where they are now."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, own)]
    if structures[0] != structures[1]:
        return own
    return jax.tree.map(
        lambda a, b: jnp.asarray(a) if np.ndim(b) == 0 else _rows.merged(seed, a, b), old, own
    )


def _check_state(old: TrainState | GrowthState, saved: Any, before: _Before, where: str) -> None:
    """Raises unless it is a state of that growth, made of arrays."""
    if not isinstance(saved, GrowthState):
        raise CheckpointError(
            f"{where}: growth must be a `GrowthState`, got {type(saved).__name__}"
        )
    if isinstance(old, TrainState) and not find_states(old.opt_state):
        raise CheckpointError(
            f"{where}: opt_state must be of `optim.per_adapter`, got "
            f"{type(old.opt_state).__name__}; in a loop with another optimiser, "
            "carry the `GrowthState` alone"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(old):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            name = jax.tree_util.keystr(path)
            raise CheckpointError(f"{where}: {name} must be an array, got {type(leaf).__name__}")
    counts = (np.shape(saved.seeds.stage), np.shape(saved.owner), len(saved.grafts))
    layout = before.layout
    expected = ((layout.num_seeds,), (layout.num_slots,), len(before.grafts))
    for name, has, wants in zip(("seeds", "slots", "grafts"), counts, expected, strict=True):
        if has != wants:
            raise CheckpointError(
                f"{where} is not of the growth `before`: it has {_count(has)} {name}, the growth "
                f"{_count(wants)}"
            )


def _count(shape: Any) -> Any:
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else shape


def _check_layouts(before: Layout, after: Layout) -> None:
    missing = [name for name in before.names if name not in after.names]
    if missing:
        raise CheckpointError(f"the run grew with blueprints {missing}; offer them here too")
    if before.dtype != after.dtype:
        raise CheckpointError(
            f"adapters were saved as {before.dtype} and are {after.dtype} here; nothing is cast "
            "silently: make the layout with the dtype of the run"
        )
    sites = {site.name: site for site in after.sites}
    for site in before.sites:
        other = sites.get(site.name, site)
        for field in _FORM:
            if getattr(site, field) != getattr(other, field):
                raise CheckpointError(
                    f"site {site.name!r}: {field} was {getattr(site, field)!r} and is "
                    f"{getattr(other, field)!r}; give a site of another form another name"
                )


_FORM = ("features", "chunks", "topology", "source_features", "layers")


def _layout_of(settings: dict[str, Any], larger: Layout) -> Layout:
    """The layout a run was saved with, its blueprints found by name in the larger one."""
    names = settings["blueprints"]
    missing = [name for name in names if name not in larger.names]
    if missing:
        raise CheckpointError(f"the run grew with blueprints {missing}; offer them here too")
    fields = ("name", *_FORM, "positions")
    try:
        return make_layout(
            sites=[Site(**dict(zip(fields, row, strict=True))) for row in settings["sites"]],
            blueprints={name: larger.blueprints[larger.names.index(name)] for name in names},
            capacity=settings["capacity"],
            dtype=jnp.dtype(settings["dtype"]),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"what the step says of its growth has another form ({error}); pass `before=` the "
            "growth of that run"
        ) from error


def _index(growth: Growth, graft: str) -> int:
    names = [one.name for one in growth.grafts]
    if graft not in names:
        raise CheckpointError(f"the run grafted with {graft!r}; offer it here too, beside {names}")
    return names.index(graft)
