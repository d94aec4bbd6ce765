"""Which seed, slot and row of a larger layout takes over which of a smaller one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._layout import Layout
from esper_fn._layout._layout import Bank
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import NONE


def seed_map(before: Layout, after: Layout) -> np.ndarray:
    """For each seed of `after` the seed of `before` at the same place, or `NONE`."""
    at = {_place(before, seed): seed for seed in range(before.num_seeds)}
    return np.asarray([at.get(_place(after, seed), NONE) for seed in range(after.num_seeds)])


def _place(of: Layout, seed: int) -> tuple[str, int, int]:
    site, layer, chunk = of.locate(seed)
    return site.name, layer, chunk


def _slots(of: Layout, bank: Bank) -> np.ndarray:
    """The flat slots of a bank, `[L, pool]`."""
    return np.arange(bank.start, bank.start + bank.num_slots).reshape(
        of.sites[bank.site].num_layers, -1
    )


def _pairs(before: Layout, after: Layout) -> list[tuple[Bank, Bank]]:
    """Banks of the same site and blueprint."""
    of = {(before.sites[b.site].name, before.names[b.blueprint]): b for b in before.tables.banks}
    found = []
    for bank in after.tables.banks:
        twin = of.get((after.sites[bank.site].name, after.names[bank.blueprint]))
        if twin is not None:
            found.append((twin, bank))
    return found


def slot_map(before: Layout, after: Layout) -> np.ndarray:
    """For each slot of `after` the slot of `before` it takes over, or `NONE`."""
    found = np.full(after.num_slots, NONE)
    for old, new in _pairs(before, after):
        sources, targets = _slots(before, old), _slots(after, new)
        width = min(sources.shape[1], targets.shape[1])
        found[targets[:, :width]] = sources[:, :width]
    return found


def check_nothing_is_lost(
    before: Layout, grown: Any, seed_of: np.ndarray, slot_of: np.ndarray
) -> None:
    """Raises where an adapter that lives has no slot."""
    """Raises where an adapter that lives has no slot."""
    owner = np.asarray(grown.owner)
    for slot in np.flatnonzero(owner != NONE).tolist():
        seed = int(owner[slot])
        if slot not in slot_of or seed not in seed_of:
            site, layer, chunk = before.locate(seed)
            raise CheckpointError(
                f"seed {seed} (site {site.name!r}, layer {layer}, chunk {chunk}) holds an adapter "
                "that has no place in this layout; keep its site and at least the capacity of "
                f"the run, {before.capacity}"
            )


def merged(of: np.ndarray, saved: Any, new: Any) -> jax.Array:
    """`saved[of]`, and `new` where `of` is `NONE`; dtype and bits as saved."""
    if jnp.issubdtype(jnp.result_type(new), jax.dtypes.prng_key):
        return _key_rows(of, saved, new)
    saved, own = np.asarray(saved), np.asarray(new)
    if saved.dtype != own.dtype or saved.shape[1:] != own.shape[1:]:
        raise CheckpointError(
            f"rows of {saved.dtype}{list(saved.shape[1:])} were saved, here they are "
            f"{own.dtype}{list(own.shape[1:])}; blueprints and optimizer must be the run's"
        )
    rows = own.copy()
    rows[of != NONE] = saved[of[of != NONE]]
    return jnp.asarray(rows)


def _key_rows(of: np.ndarray, saved: Any, new: Any) -> jax.Array:
    """`_rows` of typed random keys."""
    impl = str(jax.random.key_impl(new))
    if not jnp.issubdtype(jnp.result_type(saved), jax.dtypes.prng_key):
        raise CheckpointError(f"random keys are here what was saved as {jnp.result_type(saved)}")
    if str(jax.random.key_impl(saved)) != impl:
        raise CheckpointError(
            f"random keys were saved as {jax.random.key_impl(saved)}, here they are {impl}"
        )
    rows = merged(of, jax.random.key_data(saved), jax.random.key_data(new))
    return jax.random.wrap_key_data(rows, impl=impl)


def banks(before: Layout, after: Layout, saved: Any, new: Any) -> Any:
    """Adapters, or their optimiser states: `[P, ...]` a bank."""
    found = {site: dict(at_site) for site, at_site in new.items()}
    for old, bank in _pairs(before, after):
        site, name = after.sites[bank.site].name, after.names[bank.blueprint]
        if name not in found.get(site, {}):
            continue  # a blueprint without parameters has no optimiser state
        sources, targets = _slots(before, old) - old.start, _slots(after, bank) - bank.start
        width = min(sources.shape[1], targets.shape[1])
        of = np.full(bank.num_slots, NONE)
        of[targets[:, :width]] = sources[:, :width]
        if name not in saved.get(site, {}):
            raise CheckpointError(
                f"the state holds no adapters of {name!r} at {site!r}: it is not of that growth"
            )
        rows = [jax.tree.leaves(tree[site][name]) for tree in (saved, new)]
        if len(rows[0]) != len(rows[1]):
            raise CheckpointError(f"adapters of {name!r} at {site!r} have another form here")
        found[site][name] = jax.tree.unflatten(
            jax.tree.structure(new[site][name]),
            [merged(of, a, b) for a, b in zip(*rows, strict=True)],
        )
    return found


def inverse(of: np.ndarray, size: int) -> np.ndarray:
    """Where each of `size` old numbers is now, or `NONE`."""
    """Where each of `size` old numbers is now, or `NONE`."""
    found = np.full(size, NONE, np.int64)
    known = np.flatnonzero(of != NONE)
    found[of[known]] = known
    return found


def renumbered(numbers: Any, to: np.ndarray) -> jax.Array:
    """`to[numbers]`, and `NONE` where that stands."""
    """`to[numbers]`, and `NONE` where that stands."""
    held = np.asarray(numbers)
    return jnp.asarray(np.where(held == NONE, NONE, to[np.maximum(held, 0)]).astype(held.dtype))


def shapes(tree: Any) -> Any:
    """What two trees must have in common for one to take the numbers of the other."""
    """What two trees must have in common for one to take the other's numbers."""
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), [(np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves]
