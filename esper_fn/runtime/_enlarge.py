"""A state, saved or in memory, into a larger layout: more capacity, sites, blueprints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn import rollback
from esper_fn._growth import Growth, GrowthState
from esper_fn._layout import Layout, make_layout
from esper_fn._sites import Site
from esper_fn._typing import Key
from esper_fn.checkpoint import Restored
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import NONE, SeedState
from esper_fn.optim._checks import find_states
from esper_fn.runtime import _rows
from esper_fn.runtime._enlarge_optimizer import enlarge_optimizer_state
from esper_fn.runtime._packing import num_snapshots
from esper_fn.runtime._plain import decoded
from esper_fn.runtime._step import TrainState

_SITE_FORM = ("features", "chunks", "topology", "source_features", "layers")


class Enlarged(NamedTuple):
    """A state for a larger layout, and what is not as it was."""

    state: Any
    """A `TrainState`, or a `GrowthState` where one was given."""
    changes: tuple[str, ...]
    """One line for each group of leaves that changed, and by which rule."""


class _Before(NamedTuple):
    """The static part of the smaller growth."""

    layout: Layout
    grafts: tuple[str, ...]


def enlarge(
    source: Restored | TrainState | GrowthState,
    growth: Growth,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
    *,
    key: Key,
    before: Growth | None = None,
) -> Enlarged:
    """Puts a state into a growth with more capacity, sites, blueprints or alpha schedules.

    | leaves | rule |
    |---|---|
    | `params`, `opt_state.host`, `growth.loss`, `.settings`, `.key`, `.step` | as before |
    | `growth.seeds` | row of the same site, layer and chunk; a new seed is dormant |
    | `growth.adapters`, `opt_state.adapters`, `growth.generation` | slot of the same site,
    blueprint, layer and position; a new slot is fresh |
    | `growth.owner`, `seeds.slot`, `.blueprint`, `.graft` | renumbered to name the same things |
    | `growth.grafts` | of a schedule of the same name numbers as before and rows as those of \
`growth.seeds`; others the growth's own |
    | `growth.policy`, `growth.governor`, what wraps the optimiser | as before where structure and \
shapes are the same, else from the beginning |
    | `growth.directions` | cleared until the next survey |
    | `ring` | snapshots begin now: no roll-back goes back beyond this moment |

    Programs compile again then. Arrays lie on the default device.

    Args:
      source: a state, which is not changed; or a step that `checkpoint.restore` read back whole,
        whose value is a state or a dict with one, or with `params`, `opt_state` and `growth`.
      growth: the larger one; blueprints are recognised by their names.
      optimizer: the one of the run; needless for a `GrowthState`.
      key: for the new slots' adapters.
      before: the growth that the state belongs to; left out for a step that `fit` saved, which
        says so itself.

    Returns:
      A state of the same kind, for `fit(start=...)` or a loop of your own, and what changed.

    Raises:
      CheckpointError: no such state, not of `before`, or something living has no slot in `growth`.
    """
    _check_growth("growth", growth)
    name, value, old = "state", source, None
    if isinstance(source, Restored):
        name, value = f"step {source.step}", source.value
    if before is not None or not isinstance(source, Restored):
        _check_growth("before", before)
        old = _Before(before.layout, tuple(graft.name for graft in before.grafts))  # type: ignore[union-attr]
    else:
        old = _from_record(source, growth.layout)
    if not isinstance(key, jax.Array | np.ndarray):
        raise CheckpointError(
            f"key must be a random key, `jax.random.key(0)` say, got {type(key).__name__}"
        )
    state = _find_state(value, name)
    _check_state(state, old, name)
    _check_layouts(old.layout, growth.layout)
    changes: list[str] = []
    enlarged = _enlarged(state, old, growth, optimizer, growth.init(key), changes)
    return Enlarged(state=jax.tree.map(jnp.copy, enlarged), changes=tuple(changes))


def _check_growth(name: str, growth: Any) -> None:
    if not isinstance(growth, Growth):
        raise CheckpointError(
            f"{name} must be a growth, an `esper_fn.Growth`, got {type(growth).__name__}"
        )


def _enlarged(
    state: TrainState | GrowthState,
    before: _Before,
    growth: Growth,
    optimizer: optax.GradientTransformationExtraArgs | None,
    fresh: GrowthState,
    changes: list[str],
) -> TrainState | GrowthState:
    saved = state if isinstance(state, GrowthState) else state.growth_state
    sources = _rows.find_sources(before.layout, growth.layout)
    _rows.check_nothing_is_lost(before.layout, saved.owner, sources)
    grown = _growth_state(saved, fresh, before, growth, sources, changes)
    if isinstance(state, GrowthState):
        return grown
    params = jax.tree.map(jnp.asarray, state.params)
    opt_state = enlarge_optimizer_state(
        state.opt_state, params, fresh, before.layout, growth.layout, optimizer, changes
    )
    ring = None
    if state.ring is not None:
        every, size = int(state.ring.every), num_snapshots(state.ring)
        ring = rollback.init(params, opt_state, grown, every=every, num_snapshots=size)
        changes.append("ring: snapshots begin now")
    return TrainState(params=params, opt_state=opt_state, growth_state=grown, ring=ring)


def _growth_state(
    saved: GrowthState,
    fresh: GrowthState,
    before: _Before,
    growth: Growth,
    sources: _rows.Sources,
    changes: list[str],
) -> GrowthState:
    if (num_new := int((sources.seed == NONE).sum())) > 0:
        changes.append(f"growth.seeds: {num_new} new, dormant")
    if (num_new := int((sources.slot == NONE).sum())) > 0:
        changes.append(f"growth.adapters, opt_state.adapters: {num_new} new slots, fresh")
    if fresh.directions is not None or saved.directions is not None:
        changes.append("growth.directions: cleared until the next survey")

    def restart_or_keep(name: str) -> Any:
        old, own = getattr(saved, name), getattr(fresh, name)
        if _rows.form(old) == _rows.form(own):
            return jax.tree.map(jnp.asarray, old)
        changes.append(f"growth.{name}: of another form, begins anew")
        return own

    new_seed = _rows.inverse(sources.seed, before.layout.num_seeds)
    owner = _rows.merge_rows(sources.slot, saved.owner, fresh.owner)
    schedules = dict(zip(before.grafts, saved.grafts, strict=True))
    return fresh._replace(
        seeds=_seeds(saved.seeds, fresh.seeds, before, growth, sources),
        adapters=_rows.merge_banks(before.layout, growth.layout, saved.adapters, fresh.adapters),
        owner=_rows.renumber(owner, new_seed),
        generation=_rows.merge_rows(sources.slot, saved.generation, fresh.generation),
        loss=jax.tree.map(jnp.asarray, saved.loss),
        settings=jax.tree.map(jnp.asarray, saved.settings),
        grafts=tuple(
            _schedule_state(sources.seed, schedules.get(graft.name), own)
            for graft, own in zip(growth.grafts, fresh.grafts, strict=True)
        ),
        policy=restart_or_keep("policy"),
        governor=restart_or_keep("governor"),
        key=saved.key,
        step=jnp.asarray(saved.step),
    )


def _seeds(
    saved: SeedState, fresh: SeedState, before: _Before, growth: Growth, sources: _rows.Sources
) -> SeedState:
    seeds = jax.tree.map(lambda a, b: _rows.merge_rows(sources.seed, a, b), saved, fresh)
    blueprints = [growth.layout.names.index(name) for name in before.layout.names]
    grafts = [_graft_index(growth, name) for name in before.grafts]
    slots = _rows.inverse(sources.slot, before.layout.num_slots)
    renumbered: SeedState = seeds._replace(
        slot=_rows.renumber(seeds.slot, slots),
        blueprint=_rows.renumber(seeds.blueprint, np.asarray(blueprints, np.int8)),
        graft=_rows.renumber(seeds.graft, np.asarray(grafts, np.int8)),
    )
    return renumbered


def _graft_index(growth: Growth, name: str) -> int:
    names = [graft.name for graft in growth.grafts]
    if name not in names:
        raise CheckpointError(f"the run grafted with {name!r}; offer it here too, beside {names}")
    return names.index(name)


def _schedule_state(seeds: np.ndarray, old: Any, own: Any) -> Any:
    """An alpha schedule's numbers as before, and the rows of the seeds where they are now."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, own)]
    if structures[0] != structures[1]:
        return own
    return jax.tree.map(
        lambda a, b: jnp.asarray(a) if np.ndim(b) == 0 else _rows.merge_rows(seeds, a, b), old, own
    )


def _find_state(value: Any, name: str) -> TrainState | GrowthState:
    """The state in what was saved, by its type."""
    if isinstance(value, TrainState | GrowthState):
        return value
    items = value if isinstance(value, dict) else {}
    if (
        isinstance(items.get("growth_state"), GrowthState)
        and {"params", "opt_state"} <= items.keys()
    ):
        return TrainState(
            params=items["params"],
            opt_state=items["opt_state"],
            growth_state=items["growth_state"],
            ring=items.get("ring"),
        )
    for kind in (TrainState, GrowthState):
        states = [item for item in items.values() if isinstance(item, kind)]
        if len(states) == 1:
            return states[0]
    description = f"a dict with {list(items)[:20]}" if items else f"a {type(value).__name__}"
    raise CheckpointError(
        f"{name} does not hold a whole run: there must be a `TrainState` or a `GrowthState`, or a "
        f"dict with one, or with `params`, `opt_state` and `growth_state`; it is {description}. "
        "Restore it without `only=`, or put the parts together"
    )


def _check_state(state: TrainState | GrowthState, before: _Before, name: str) -> None:
    """Raises unless it is a state of that growth, made of arrays."""
    grown: Any = state if isinstance(state, GrowthState) else state.growth_state
    if not isinstance(grown, GrowthState):
        raise CheckpointError(
            f"{name}: growth_state must be a `GrowthState`, got {type(grown).__name__}"
        )
    if isinstance(state, TrainState) and not find_states(state.opt_state):
        raise CheckpointError(
            f"{name}: opt_state must be of `optim.per_adapter`, got "
            f"{type(state.opt_state).__name__}; in a loop with another optimiser, "
            "enlarge the `GrowthState` alone"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            leaf_name = jax.tree_util.keystr(path)
            raise CheckpointError(
                f"{name}: {leaf_name} must be an array, got {type(leaf).__name__}"
            )
    layout = before.layout
    for what, count, expected in (
        ("seeds", np.shape(grown.seeds.stage), (layout.num_seeds,)),
        ("slots", np.shape(grown.owner), (layout.num_slots,)),
        ("grafts", (len(grown.grafts),), (len(before.grafts),)),
    ):
        if count != expected:
            numbers = count[0] if len(count) == 1 else count
            raise CheckpointError(
                f"{name} is not of the growth `before`: it has {numbers} {what}, the growth "
                f"{expected[0]}"
            )


def _check_layouts(before: Layout, after: Layout) -> None:
    _check_blueprints(before.names, after)
    if before.dtype != after.dtype:
        raise CheckpointError(
            f"adapters were saved as {before.dtype} and are {after.dtype} here; nothing is cast "
            "silently: make the layout with the dtype of the run"
        )
    sites = {site.name: site for site in after.sites}
    for site in before.sites:
        other = sites.get(site.name, site)
        for field in _SITE_FORM:
            if getattr(site, field) != getattr(other, field):
                raise CheckpointError(
                    f"site {site.name!r}: {field} was {getattr(site, field)!r} and is "
                    f"{getattr(other, field)!r}; give a site of another form another name"
                )


def _check_blueprints(names: Any, after: Layout) -> None:
    missing = [name for name in names if name not in after.names]
    if missing:
        raise CheckpointError(f"the run grew with blueprints {missing}; offer them here too")


def _from_record(restored: Restored, larger: Layout) -> _Before:
    """The growth that `fit` noted, its blueprints taken by name from the larger layout."""
    record = restored.record
    settings = decoded(record.get("settings")) if isinstance(record, dict) else None
    fields = ("sites", "blueprints", "capacity", "dtype", "grafts")
    if not isinstance(settings, dict) or any(name not in settings for name in fields):
        raise CheckpointError(
            f"step {restored.step} does not say with which growth it was saved, as steps of `fit` "
            "do; pass `before=` the growth of that run"
        )
    names = settings["blueprints"]
    _check_blueprints(names, larger)
    columns = ("name", *_SITE_FORM, "positions")
    try:
        layout = make_layout(
            sites=[Site(**dict(zip(columns, row, strict=True))) for row in settings["sites"]],
            blueprints={name: larger.blueprints[larger.names.index(name)] for name in names},
            capacity=settings["capacity"],
            dtype=jnp.dtype(settings["dtype"]),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"what the step says of its growth has another form ({error}); pass `before=` the "
            "growth of that run"
        ) from error
    return _Before(layout, tuple(settings["grafts"]))
