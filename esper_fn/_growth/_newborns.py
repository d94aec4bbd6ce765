"""Parameters of newborn adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._control import vary_as_after
from esper_fn._layout import Layout, alike_banks, map_banks, select_slots, split_by_bank
from esper_fn._survey import Directions, SiteDirections
from esper_fn._typing import Adapters, Array, Bool, DType, Float32, Int32, Key, Params
from esper_fn.blueprints._base import AdapterSpec, Blueprint
from esper_fn.lifecycle._state import NONE


class _Birth(NamedTuple):
    """What decides on the parameters of newborn adapters."""

    is_born: Bool[Array, "Q"]
    key: Key
    owner: Int32[Array, "Q"]
    directions: SiteDirections | None


def init_newborns(
    layout: Layout,
    adapters: Adapters,
    is_born: Bool[Array, "Q"],
    key: Key,
    *,
    owner: Int32[Array, "Q"],
    directions: SiteDirections | None = None,
) -> Adapters:
    """Fresh parameters in the slots where `is_born`; the others keep theirs, bit for bit.

    Differentiable in `adapters`, in both modes: a newborn depends on none of them.

    Args:
      layout: the static layout.
      adapters: parameters of all banks.
      is_born: slots with a newborn adapter.
      key: for the drawn parameters; the same ones with and without directions.
      owner: the seed that holds each slot.
      directions: of some seeds; their adapters begin along them where the blueprint can.
    """
    fresh: Adapters = _init_newborns(layout, _Birth(is_born, key, owner, directions), adapters)
    return fresh


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _init_newborns(layout: Layout, birth: _Birth, adapters: Adapters) -> Adapters:
    after = {site: dict(banks) for site, banks in adapters.items()}
    for alike in alike_banks(layout):
        banks = [layout.tables.banks[index] for index in alike]
        names = [(layout.sites[bank.site].name, layout.names[bank.blueprint]) for bank in banks]
        filled = _fill(layout, alike, birth, [after[site][name] for site, name in names])
        for (site, name), parameters in zip(names, filled, strict=True):
            after[site][name] = parameters
    return after


@_init_newborns.defjvp
def _init_newborns_jvp(layout: Layout, primals: Any, tangents: Any) -> Any:
    birth, adapters = primals

    def push(is_born: Array, tangent: Params) -> Params:
        return select_slots(is_born, jax.tree.map(jnp.zeros_like, tangent), tangent)

    pushed = map_banks(push, split_by_bank(layout, birth.is_born), tangents[1])
    return _init_newborns(layout, birth, adapters), pushed


def _fill(
    layout: Layout, alike: Sequence[int], birth: _Birth, parameters: list[Params]
) -> list[Params]:
    """The parameters of alike banks, with newborn ones: one adapter in each round of a loop.

    So an adapter is drawn only where one is born, and alike banks are one generator to compile.
    """
    banks = [layout.tables.banks[index] for index in alike]
    size, site = banks[0].num_slots, layout.sites[banks[0].site]
    blueprint = layout.blueprints[banks[0].blueprint]
    slots = np.concatenate([bank.start + np.arange(size) for bank in banks])
    indices = jnp.asarray(alike, jnp.int32)
    own = [birth.directions[bank.site] for bank in banks] if birth.directions else []
    rows = _joined([entry for entry in own if entry is not None])

    def draw(row: Array, slot: Array) -> Params:
        slot_key = jax.random.split(jax.random.fold_in(birth.key, indices[row]), size)[slot]
        drawn = blueprint.init(slot_key, site.spec, layout.dtype)
        if rows is None or blueprint.init_along is None:
            return drawn
        seed = birth.owner[jnp.asarray(slots)[row * size + slot]]
        is_own = (rows.seed == seed) & (seed != NONE)
        along = rows.along[jnp.argmax(is_own)]
        directed = blueprint.init_along(jax.random.clone(slot_key), site.spec, layout.dtype, along)
        return jax.tree.map(lambda a, b: jnp.where(jnp.any(is_own), a, b), directed, drawn)

    def fill_next(carry: tuple[Array, list[Params]]) -> tuple[Array, list[Params]]:
        is_empty, filled = carry
        position = jnp.argmax(is_empty).astype(jnp.int32)
        row, slot = position // size, position % size
        fresh = draw(row, slot)
        filled = [_write(old, fresh, slot, row == index) for index, old in enumerate(filled)]
        return is_empty.at[position].set(False), filled

    carry = (birth.is_born[jnp.asarray(slots)], parameters)
    carry = vary_as_after(fill_next, carry)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), fill_next, carry)[1]


def _write(bank: Params, fresh: Params, slot: Array, is_written: Bool[Array, ""]) -> Params:
    def write(old: Array, new: Array) -> Array:
        present = jax.lax.dynamic_index_in_dim(old, slot, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            old, jnp.where(is_written, new, present), slot, 0
        )

    return jax.tree.map(write, bank, fresh)


class _Rows(NamedTuple):
    """Directions of several sites."""

    seed: Int32[Array, "n"]
    along: Float32[Array, "n F U"]


def _joined(directions: Sequence[Directions]) -> _Rows | None:
    if not directions:
        return None
    return _Rows(
        seed=jnp.concatenate([entry.seed.reshape(-1) for entry in directions]),
        along=jnp.concatenate(
            [entry.along.reshape(-1, *entry.along.shape[2:]) for entry in directions]
        ),
    )


def newborn(
    layout: Layout,
    key: Key,
    slot: int,
    seed: int = NONE,
    directions: SiteDirections | None = None,
) -> Params:
    """The parameters that `init_newborns` puts into one slot, bit for bit. Not for use in `jit`.

    Args:
      layout: the static layout.
      key: as there.
      slot: on the flat slot axis.
      seed: the seed that holds it.
      directions: as there.
    """
    banks = layout.tables.banks
    index = next(i for i, b in enumerate(banks) if b.start <= slot < b.start + b.num_slots)
    bank = banks[index]
    own_key = _slot_keys(jax.random.clone(key), index, bank.num_slots)[slot - bank.start]
    blueprint, spec = layout.blueprints[bank.blueprint], layout.sites[bank.site].spec
    rows = None if directions is None else directions[bank.site]
    if rows is not None and blueprint.init_along is not None and seed != NONE:
        row = np.flatnonzero(np.asarray(rows.seed).reshape(-1) == seed)
        if row.size:
            along = rows.along.reshape(-1, *rows.along.shape[2:])[int(row[0])]
            return _initialiser(blueprint, spec, layout.dtype, True)(own_key, along)
    return _initialiser(blueprint, spec, layout.dtype, False)(own_key)


@lru_cache(maxsize=256)
def _initialiser(
    blueprint: Blueprint, spec: AdapterSpec, dtype: DType, is_directed: bool
) -> Callable[..., Params]:
    if is_directed and blueprint.init_along is not None:
        along = blueprint.init_along
        return jax.jit(lambda key, directions: along(key, spec, dtype, directions))
    return jax.jit(lambda key: blueprint.init(key, spec, dtype))


@partial(jax.jit, static_argnums=2)
def _slot_keys(key: Key, bank: int, num_slots: int) -> Key:
    """The keys of a bank's slots."""
    keys: Key = jax.random.split(jax.random.fold_in(key, bank), num_slots)
    return keys
