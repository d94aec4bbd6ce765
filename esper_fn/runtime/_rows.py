"""Which seed, slot and row of a larger layout takes over which of a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._layout import Layout
from esper_fn._layout._layout import Bank
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import NONE


class Move(NamedTuple):
    """From a layout to a larger one.

    Attributes:
      before: the smaller layout.
      after: the larger layout.
      seed: for each seed of the larger layout the one that it takes over, or `NONE`.
      slot: the same for slots.
    """

    before: Layout
    after: Layout
    seed: np.ndarray
    slot: np.ndarray


def find_move(before: Layout, after: Layout) -> Move:
    """Seeds at the same site, layer and chunk; slots of the same site, blueprint and position."""
    old_seeds = {_location(before, seed): seed for seed in range(before.num_seeds)}
    seeds = [old_seeds.get(_location(after, seed), NONE) for seed in range(after.num_seeds)]
    slots = np.full(after.num_slots, NONE)
    for _, old_slots, _, new_slots in _pairs(before, after):
        slots[new_slots] = old_slots
    return Move(before=before, after=after, seed=np.asarray(seeds), slot=slots)


def _location(layout: Layout, seed: int) -> tuple[str, int, int]:
    site, layer, chunk = layout.locate(seed)
    return site.name, layer, chunk


def _pairs(before: Layout, after: Layout) -> Iterator[tuple[Bank, Any, Bank, Any]]:
    """Banks of the same site and blueprint, and the slots that correspond."""
    old_banks = {_name(before, bank): bank for bank in before.tables.banks}
    for bank in after.tables.banks:
        old = old_banks.get(_name(after, bank))
        if old is not None:
            old_slots, new_slots = _slots(before, old), _slots(after, bank)
            width = min(old_slots.shape[1], new_slots.shape[1])
            yield old, old_slots[:, :width], bank, new_slots[:, :width]


def _name(layout: Layout, bank: Bank) -> tuple[str, str]:
    return layout.sites[bank.site].name, layout.names[bank.blueprint]


def _slots(layout: Layout, bank: Bank) -> np.ndarray:
    """The flat slots of a bank, by layer and position."""
    slots = np.arange(bank.start, bank.start + bank.num_slots)
    return slots.reshape(layout.sites[bank.site].num_layers, -1)


def check_nothing_is_lost(move: Move, owner: Any) -> None:
    """Raises `CheckpointError` where an adapter that lives has no slot in the larger layout."""
    owner = np.asarray(owner)
    for slot in np.flatnonzero(owner != NONE).tolist():
        seed = int(owner[slot])
        if slot not in move.slot or seed not in move.seed:
            site, layer, chunk = move.before.locate(seed)
            raise CheckpointError(
                f"seed {seed} (site {site.name!r}, layer {layer}, chunk {chunk}) holds an adapter "
                "that has no place in this layout; keep its site and at least the capacity of "
                f"the run, {move.before.capacity}"
            )


def merge_rows(sources: np.ndarray, saved: Any, own: Any) -> jax.Array:
    """`saved[sources]`, and `own` where the source is `NONE`; dtype and bits as saved."""
    if jnp.issubdtype(jnp.result_type(own), jax.dtypes.prng_key):
        if jnp.result_type(saved) != jnp.result_type(own):
            raise CheckpointError(
                f"random keys were saved as {jnp.result_type(saved)}, here they are "
                f"{jnp.result_type(own)}"
            )
        rows = merge_rows(sources, jax.random.key_data(saved), jax.random.key_data(own))
        return jax.random.wrap_key_data(rows, impl=jax.random.key_impl(own))
    saved, own = np.asarray(saved), np.asarray(own)
    if saved.dtype != own.dtype or saved.shape[1:] != own.shape[1:]:
        raise CheckpointError(
            f"rows of {saved.dtype}{list(saved.shape[1:])} were saved, here they are "
            f"{own.dtype}{list(own.shape[1:])}; blueprints and optimizer must be the run's"
        )
    rows = own.copy()
    rows[sources != NONE] = saved[sources[sources != NONE]]
    return jnp.asarray(rows)


def merge_banks(move: Move, saved: Any, own: Any) -> Any:
    """Adapters of all banks, or their optimiser states: `own` with the rows that were saved."""
    merged = {site: dict(banks) for site, banks in own.items()}
    for old, old_slots, bank, new_slots in _pairs(move.before, move.after):
        site, name = _name(move.after, bank)
        if name not in merged.get(site, {}):
            continue  # a blueprint without parameters has no optimiser state
        if name not in saved.get(site, {}):
            raise CheckpointError(
                f"the state holds no adapters of {name!r} at {site!r}: it is not of that growth"
            )
        sources = np.full(bank.num_slots, NONE)
        sources[new_slots - bank.start] = old_slots - old.start
        leaves, structure = jax.tree.flatten(own[site][name])
        saved_leaves = jax.tree.leaves(saved[site][name])
        if len(saved_leaves) != len(leaves):
            raise CheckpointError(f"adapters of {name!r} at {site!r} have another form here")
        rows = [merge_rows(sources, a, b) for a, b in zip(saved_leaves, leaves, strict=True)]
        merged[site][name] = jax.tree.unflatten(structure, rows)
    return merged


def inverse(sources: np.ndarray, size: int) -> np.ndarray:
    """Where each of `size` old numbers is now, or `NONE`."""
    numbers = np.full(size, NONE, np.int64)
    known = np.flatnonzero(sources != NONE)
    numbers[sources[known]] = known
    return numbers


def renumber(numbers: Any, new: np.ndarray) -> jax.Array:
    """`new[numbers]`, and `NONE` where that stands."""
    old = np.asarray(numbers)
    return jnp.asarray(np.where(old == NONE, NONE, new[np.maximum(old, 0)]).astype(old.dtype))


def form(tree: Any) -> Any:
    """What two trees must have in common for one to take the numbers of the other."""
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), [(np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves]
