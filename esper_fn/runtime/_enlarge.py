"""A state, saved or in memory, into a larger layout: more capacity, sites, blueprints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from esper_fn.optim import PerAdapterState
from esper_fn.optim._checks import find_states
from esper_fn.runtime import _rows
from esper_fn.runtime._plain import decoded
from esper_fn.runtime._step import TrainState

_SITE_FORM = ("features", "chunks", "topology", "source_features", "layers")


class Enlarged(NamedTuple):
    """A state for a larger layout, and what is not as it was."""

    state: Any
    """A `TrainState`, or a `GrowthState` where one was given."""
    changes: tuple[str, ...]
    """One line for each group of leaves that changed, and by which rule."""


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
    name, value = "state", source
    if isinstance(source, Restored):
        name, value = f"step {source.step}", source.value
    layout, grafts = _smaller(source, before, growth)
    if not isinstance(key, jax.Array | np.ndarray):
        raise CheckpointError(
            f"key must be a random key, `jax.random.key(0)` say, got {type(key).__name__}"
        )
    state = _find_state(value, name)
    _check_state(state, layout, grafts, name)
    _check_layouts(layout, growth.layout)
    move = _rows.find_move(layout, growth.layout)
    enlarging = _Enlarging(growth, grafts, move, growth.init(key), changes=[])
    if isinstance(state, GrowthState):
        enlarged: Any = enlarging.growth_state(state)
    else:
        enlarged = enlarging.train_state(state, optimizer)
    return Enlarged(state=jax.tree.map(jnp.copy, enlarged), changes=tuple(enlarging.changes))


def _check_growth(name: str, growth: Any) -> None:
    if not isinstance(growth, Growth):
        raise CheckpointError(
            f"{name} must be a growth, an `esper_fn.Growth`, got {type(growth).__name__}"
        )


def _smaller(source: Any, before: Growth | None, growth: Growth) -> tuple[Layout, list[str]]:
    """Layout and alpha schedules of the growth that the state belongs to."""
    if before is None and isinstance(source, Restored):
        return _from_record(source, growth.layout)
    _check_growth("before", before)
    return before.layout, _graft_names(before)  # type: ignore[union-attr, arg-type]


def _graft_names(growth: Growth) -> list[str]:
    return [graft.name for graft in growth.grafts]


@dataclass(frozen=True)
class _Enlarging:
    """The way of one state into a larger growth.

    Attributes:
      growth: the larger one.
      old_grafts: names of the alpha schedules of the smaller one.
      move: from the smaller layout to the larger one.
      fresh: a first state of the larger growth.
      changes: one line for each group of leaves that is not as it was.
    """

    growth: Growth
    old_grafts: Sequence[str]
    move: _rows.Move
    fresh: GrowthState
    changes: list[str]

    def train_state(self, state: TrainState, optimizer: Any) -> TrainState:
        grown = self.growth_state(state.growth_state)
        params = jax.tree.map(jnp.asarray, state.params)
        opt_state = self._opt_state(state.opt_state, params, optimizer)
        ring = None
        if state.ring is not None:
            every, size = int(state.ring.every), state.ring.num_snapshots
            ring = rollback.init(params, opt_state, grown, every=every, num_snapshots=size)
            self.changes.append("ring: snapshots begin now")
        return TrainState(params=params, opt_state=opt_state, growth_state=grown, ring=ring)

    def growth_state(self, saved: GrowthState) -> GrowthState:
        move, fresh, changes = self.move, self.fresh, self.changes
        _rows.check_nothing_is_lost(move, saved.owner)
        if (num_new := int((move.seed == NONE).sum())) > 0:
            changes.append(f"growth.seeds: {num_new} new, dormant")
        if (num_new := int((move.slot == NONE).sum())) > 0:
            changes.append(f"growth.adapters, opt_state.adapters: {num_new} new slots, fresh")
        if fresh.directions is not None or saved.directions is not None:
            changes.append("growth.directions: cleared until the next survey")
        as_saved = {
            name: jax.tree.map(jnp.asarray, getattr(saved, name))
            for name in ("loss", "settings", "step", "policy", "governor")
        }
        for name in ("policy", "governor"):
            if _rows.form(getattr(saved, name)) != _rows.form(getattr(fresh, name)):
                changes.append(f"growth.{name}: of another form, begins anew")
                del as_saved[name]
        owner = _rows.merge_rows(move.slot, saved.owner, fresh.owner)
        schedules = dict(zip(self.old_grafts, saved.grafts, strict=True))
        return fresh._replace(
            seeds=self._seeds(saved.seeds),
            adapters=_rows.merge_banks(move, saved.adapters, fresh.adapters),
            owner=_rows.renumber(owner, _rows.inverse(move.seed, move.before.num_seeds)),
            generation=_rows.merge_rows(move.slot, saved.generation, fresh.generation),
            grafts=tuple(
                _schedule_state(move.seed, schedules.get(name), own)
                for name, own in zip(_graft_names(self.growth), fresh.grafts, strict=True)
            ),
            key=saved.key,
            **as_saved,
        )

    def _seeds(self, saved: SeedState) -> SeedState:
        move, names = self.move, _graft_names(self.growth)
        for name in self.old_grafts:
            if name not in names:
                raise CheckpointError(
                    f"the run grafted with {name!r}; offer it here too, beside {names}"
                )
        blueprints = [move.after.names.index(name) for name in move.before.names]
        grafts = [names.index(name) for name in self.old_grafts]
        seeds: SeedState = jax.tree.map(
            partial(_rows.merge_rows, move.seed), saved, self.fresh.seeds
        )
        return seeds._replace(
            slot=_rows.renumber(seeds.slot, _rows.inverse(move.slot, move.before.num_slots)),
            blueprint=_rows.renumber(seeds.blueprint, np.asarray(blueprints, np.int8)),
            graft=_rows.renumber(seeds.graft, np.asarray(grafts, np.int8)),
        )

    def _opt_state(self, saved: Any, params: Any, optimizer: Any) -> Any:
        """The state of `optim.per_adapter`, and of what may be wrapped around it."""
        own = None if optimizer is None else optimizer.init((params, self.fresh.adapters))
        states, own_states = find_states(saved), find_states(own)
        if not own_states:
            raise CheckpointError(
                "optimizer must be the run's, from `optim.per_adapter`, got "
                f"{type(optimizer).__name__}; in a loop with another, enlarge the `GrowthState` "
                "alone"
            )
        if len(states) != len(own_states):
            raise CheckpointError("opt_state has another form: the optimizer is not the run's")
        merged = map(self._per_adapter_state, states, own_states)
        wrapper = saved
        if _rows.form(_without_states(saved)) != _rows.form(_without_states(own)):
            wrapper = own
            self.changes.append("opt_state: what is around `per_adapter` begins anew")
        return jax.tree.map(
            lambda node: next(merged) if _is_state(node) else jnp.asarray(node),
            wrapper,
            is_leaf=_is_state,
        )

    def _per_adapter_state(self, old: PerAdapterState, own: PerAdapterState) -> PerAdapterState:
        if _rows.form(own.host) != _rows.form(old.host):
            raise CheckpointError("opt_state.host has another form: the optimizer is not the run's")
        return own._replace(
            host=jax.tree.map(jnp.asarray, old.host),
            adapters=_rows.merge_banks(self.move, old.adapters, own.adapters),
            num_updates=jnp.asarray(old.num_updates),
            generation=_rows.merge_banks(self.move, old.generation, own.generation),
        )


def _is_state(node: Any) -> bool:
    return isinstance(node, PerAdapterState)


def _without_states(opt_state: Any) -> Any:
    """An optimiser's state with None for the states of `per_adapter` inside."""
    return jax.tree.map(
        lambda node: None if _is_state(node) else node, opt_state, is_leaf=_is_state
    )


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
    fields = {name: items[name] for name in TrainState._fields if name in items}
    if isinstance(items.get("growth_state"), GrowthState) and len(fields.keys() - {"ring"}) == 3:
        return TrainState(**{"ring": None, **fields})
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


def _check_state(
    state: TrainState | GrowthState, layout: Layout, grafts: Sequence[str], name: str
) -> None:
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
    for what, shape, expected in (
        ("seeds", np.shape(grown.seeds.stage), layout.num_seeds),
        ("slots", np.shape(grown.owner), layout.num_slots),
        ("grafts", (len(grown.grafts),), len(grafts)),
    ):
        if shape != (expected,):
            numbers = shape[0] if len(shape) == 1 else shape
            raise CheckpointError(
                f"{name} is not of the growth `before`: it has {numbers} {what}, the growth "
                f"{expected}"
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


def _from_record(restored: Restored, larger: Layout) -> tuple[Layout, list[str]]:
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
    return layout, settings["grafts"]
