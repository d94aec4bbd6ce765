"""A saved run into a larger lattice: more capacity, more sites, more blueprints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import checkpoint, rollback
from esper_fn._growth import Growth
from esper_fn._lattice import Lattice, Site, lattice
from esper_fn._lattice._lattice import Bank
from esper_fn._typing import Key
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import NONE, SeedState
from esper_fn.optim import PerBody
from esper_fn.runtime._ring import num_saved
from esper_fn.runtime._step import TrainState


class Carried(NamedTuple):
    """A state for a larger lattice, and what is not as it was saved."""

    state: TrainState
    changes: tuple[str, ...]
    """One line for each group of leaves that changed, and by which rule."""


def carry_over(
    restored: checkpoint.Restored, growth: Growth, optimizer: PerBody, *, key: Key
) -> Carried:
    """Puts what `fit` saved into a growth with more capacity, sites, blueprints or strategies.

    | leaves | rule |
    |---|---|
    | `params`, `opt_state.host`, `growth.loss`, `.settings`, `.key`, `.step` | as saved |
    | `growth.seeds` | row of the same site, layer and chunk; a new seed is dormant |
    | `growth.bodies`, `opt_state.bodies`, `growth.is_born` | slot of the same site, blueprint, \
layer and position; a new slot is fresh |
    | `growth.owner`, `seeds.slot`, `.blueprint`, `.graft` | renumbered to name the same things |
    | `growth.grafts` | numbers of a strategy of the same name as saved, others the growth's own |
    | `growth.policy`, `growth.governor` | as saved where structure and shapes are the growth's, \
else its own, from their beginning |
    | `growth.memory` | forgotten until the next survey |
    | `anchor` | taken now: no roll-back goes back beyond this moment |

    Args:
      restored: a step that `fit` saved, read back whole.
      growth: the larger one; blueprints are recognised by their names.
      optimizer: the one of the run.
      key: for the new slots' bodies.

    Returns:
      A state for `fit(start=...)`, and what changed.

    Raises:
      CheckpointError: not saved by `fit`, or something living has no place in `growth`.
    """
    try:
        old: TrainState = restored.value["state"]
        settings = restored.record["settings"]
        before = _lattice_of(settings, growth.lattice)
    except (TypeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"step {restored.step} does not hold a whole run as `fit` saves it ({error!r}); "
            "restore it without `only=`"
        ) from None
    after = growth.lattice
    fresh = growth.init(key)
    seed_of = _seed_map(before, after)
    slot_of = _slot_map(before, after)
    _check_nothing_is_lost(before, old.growth, seed_of, slot_of)
    changes: list[str] = []

    def rows(of: np.ndarray, saved: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: _rows(of, a, b), saved, new)

    new_seed = _inverse(seed_of, before.num_seeds)
    new_slot = _inverse(slot_of, before.num_slots)
    graft_of = [_index(growth, name) for name in settings["grafts"]]
    seeds: SeedState = rows(seed_of, old.growth.seeds, fresh.seeds)
    blueprints = [after.names.index(name) for name in before.names]
    seeds = seeds._replace(
        slot=_renumbered(seeds.slot, new_slot),
        blueprint=_renumbered(seeds.blueprint, np.asarray(blueprints, np.int8)),
        graft=_renumbered(seeds.graft, np.asarray(graft_of, np.int8)),
    )
    owner = rows(slot_of, old.growth.owner, fresh.owner)
    bodies = _banks(before, after, old.growth.bodies, fresh.bodies)
    if (num_new := int((seed_of == NONE).sum())) > 0:
        changes.append(f"growth.seeds: {num_new} new, dormant")
    if (num_new := int((slot_of == NONE).sum())) > 0:
        changes.append(f"growth.bodies, opt_state.bodies: {num_new} new slots, fresh")

    def kept(name: str) -> Any:
        saved, own = getattr(old.growth, name), getattr(fresh, name)
        if _shapes(saved) == _shapes(own):
            return jax.tree.map(jnp.asarray, saved)
        changes.append(f"growth.{name}: of another form, begins anew")
        return own

    if fresh.memory is not None or old.growth.memory is not None:
        changes.append("growth.memory: forgotten until the next survey")
    saved_grafts = dict(zip(settings["grafts"], old.growth.grafts, strict=True))
    grown = fresh._replace(
        seeds=seeds,
        bodies=bodies,
        owner=_renumbered(owner, new_seed),
        is_born=rows(slot_of, old.growth.is_born, fresh.is_born),
        loss=jax.tree.map(jnp.asarray, old.growth.loss),
        settings=jax.tree.map(jnp.asarray, old.growth.settings),
        grafts=tuple(
            jax.tree.map(jnp.asarray, saved_grafts.get(graft.name, own))
            for graft, own in zip(growth.grafts, fresh.grafts, strict=True)
        ),
        policy=kept("policy"),
        governor=kept("governor"),
        key=old.growth.key,
        step=jnp.asarray(old.growth.step),
    )
    params = jax.tree.map(jnp.asarray, old.params)
    opt_state = optimizer.init((params, fresh.bodies))
    if _shapes(opt_state.host) != _shapes(old.opt_state.host):
        raise CheckpointError("opt_state.host has another form: the optimizer is not the run's")
    opt_state = opt_state._replace(
        host=jax.tree.map(jnp.asarray, old.opt_state.host),
        bodies=_banks(before, after, old.opt_state.bodies, opt_state.bodies),
    )
    anchor = None
    if old.anchor is not None:
        anchor = rollback.anchor(
            params,
            opt_state,
            grown,
            every=int(old.anchor.every),
            num_snapshots=num_saved(old.anchor),
        )
        changes.append("anchor: taken now")
    state = TrainState(params=params, opt_state=opt_state, growth=grown, anchor=anchor)
    return Carried(state=jax.tree.map(jnp.copy, state), changes=tuple(changes))


def _lattice_of(settings: Any, larger: Lattice) -> Lattice:
    """The lattice a run was saved with, its blueprints found by name in the larger one."""
    names = settings["blueprints"]
    missing = [name for name in names if name not in larger.names]
    if missing:
        raise CheckpointError(f"the run grew with blueprints {missing}; offer them here too")
    if settings["dtype"] != str(larger.dtype):
        raise CheckpointError(
            f"bodies were saved as {settings['dtype']} and are {larger.dtype} here; nothing is "
            "cast silently: make the lattice with the dtype of the run"
        )
    fields = (
        "name", "features", "chunks", "topology", "source_features", "layers", "positions",
    )  # fmt: skip
    places = [Site(**dict(zip(fields, row, strict=True))) for row in settings["sites"]]
    for place in places:
        for other in larger.sites:
            if other.name == place.name and (
                changed := [f for f in fields[1:-1] if getattr(place, f) != getattr(other, f)]
            ):
                raise CheckpointError(
                    f"site {place.name!r}: {changed[0]} was {getattr(place, changed[0])!r} and is "
                    f"{getattr(other, changed[0])!r}; give a site of another form another name"
                )
    return lattice(
        sites=places,
        blueprints={name: larger.blueprints[larger.names.index(name)] for name in names},
        capacity=settings["capacity"],
        dtype=larger.dtype,
    )


def _index(growth: Growth, graft: str) -> int:
    names = [one.name for one in growth.grafts]
    if graft not in names:
        raise CheckpointError(f"the run grafted with {graft!r}; offer it here too, beside {names}")
    return names.index(graft)


def _seed_map(before: Lattice, after: Lattice) -> np.ndarray:
    """For each seed of `after` the seed of `before` at the same place, or `NONE`."""
    at = {_place(before, seed): seed for seed in range(before.num_seeds)}
    return np.asarray([at.get(_place(after, seed), NONE) for seed in range(after.num_seeds)])


def _place(of: Lattice, seed: int) -> tuple[str, int, int]:
    site, layer, chunk = of.locate(seed)
    return site.name, layer, chunk


def _slots(of: Lattice, bank: Bank) -> np.ndarray:
    """The flat slots of a bank, `[L, pool]`."""
    return np.arange(bank.start, bank.start + bank.num_slots).reshape(
        of.sites[bank.site].num_layers, -1
    )


def _pairs(before: Lattice, after: Lattice) -> list[tuple[Bank, Bank]]:
    """Banks of the same site and blueprint."""
    of = {(before.sites[b.site].name, before.names[b.blueprint]): b for b in before.tables.banks}
    found = []
    for bank in after.tables.banks:
        twin = of.get((after.sites[bank.site].name, after.names[bank.blueprint]))
        if twin is not None:
            found.append((twin, bank))
    return found


def _slot_map(before: Lattice, after: Lattice) -> np.ndarray:
    """For each slot of `after` the slot of `before` it takes over, or `NONE`."""
    found = np.full(after.num_slots, NONE)
    for old, new in _pairs(before, after):
        sources, targets = _slots(before, old), _slots(after, new)
        width = min(sources.shape[1], targets.shape[1])
        found[targets[:, :width]] = sources[:, :width]
    return found


def _check_nothing_is_lost(
    before: Lattice, grown: Any, seed_of: np.ndarray, slot_of: np.ndarray
) -> None:
    owner = np.asarray(grown.owner)
    for slot in np.flatnonzero(owner != NONE).tolist():
        seed = int(owner[slot])
        if slot not in slot_of or seed not in seed_of:
            site, layer, chunk = before.locate(seed)
            raise CheckpointError(
                f"seed {seed} (site {site.name!r}, layer {layer}, chunk {chunk}) holds a body "
                "that has no place in this lattice; keep its site and at least the capacity of "
                f"the run, {before.capacity}"
            )


def _rows(of: np.ndarray, saved: Any, new: Any) -> jax.Array:
    """`saved[of]`, and `new` where `of` is `NONE`; dtype and bits as saved."""
    saved, own = np.asarray(saved), np.asarray(new)
    if saved.dtype != own.dtype or saved.shape[1:] != own.shape[1:]:
        raise CheckpointError(
            f"rows of {saved.dtype}{list(saved.shape[1:])} were saved, here they are "
            f"{own.dtype}{list(own.shape[1:])}; blueprints and optimizer must be the run's"
        )
    rows = own.copy()
    rows[of != NONE] = saved[of[of != NONE]]
    return jnp.asarray(rows)


def _banks(before: Lattice, after: Lattice, saved: Any, new: Any) -> Any:
    """Bodies, or their optimiser states: `[P, ...]` a bank."""
    found = {site: dict(at_site) for site, at_site in new.items()}
    for old, bank in _pairs(before, after):
        site, name = after.sites[bank.site].name, after.names[bank.blueprint]
        if name not in found.get(site, {}):
            continue  # a blueprint without parameters has no optimiser state
        sources, targets = _slots(before, old) - old.start, _slots(after, bank) - bank.start
        width = min(sources.shape[1], targets.shape[1])
        of = np.full(bank.num_slots, NONE)
        of[targets[:, :width]] = sources[:, :width]
        rows = [jax.tree.leaves(tree[site][name]) for tree in (saved, new)]
        if len(rows[0]) != len(rows[1]):
            raise CheckpointError(f"bodies of {name!r} at {site!r} have another form here")
        found[site][name] = jax.tree.unflatten(
            jax.tree.structure(new[site][name]),
            [_rows(of, a, b) for a, b in zip(*rows, strict=True)],
        )
    return found


def _inverse(of: np.ndarray, size: int) -> np.ndarray:
    found = np.full(size, NONE, np.int64)
    known = np.flatnonzero(of != NONE)
    found[of[known]] = known
    return found


def _renumbered(numbers: Any, to: np.ndarray) -> jax.Array:
    held = np.asarray(numbers)
    return jnp.asarray(np.where(held == NONE, NONE, to[np.maximum(held, 0)]).astype(held.dtype))


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), [(np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves]
