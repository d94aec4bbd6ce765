"""All sites of a host, the blueprints that may grow there, and the slots of their adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_kind, describe, is_count
from esper_fn._sites import Site
from esper_fn._typing import Adapters, Array, DType, Int32, Key, Params
from esper_fn.blueprints._base import Blueprint, Cost
from esper_fn.errors import LayoutError, UnknownNameError


class Bank(NamedTuple):
    """The slots of one blueprint at one site: `start : start + num_slots` of Q."""

    site: int
    blueprint: int
    start: int
    num_slots: int
    """Slots of all layers."""


class Tables(NamedTuple):
    """Static look-up tables of a layout. A group is one layer of one site, a pool its bank's part.

    `G` groups, `B` blueprints, `Q` slots.
    """

    banks: tuple[Bank, ...]
    group_site: np.ndarray
    """int32[G]."""
    group_start: np.ndarray
    """int32[G]: first seed."""
    group_size: np.ndarray
    """int32[G]: seeds, the site's chunks."""
    pool_start: np.ndarray
    """int32[G, B]: first slot, or -1 where the blueprint does not serve the site."""
    slot_group: np.ndarray
    """int32[Q]."""
    slot_blueprint: np.ndarray
    """int32[Q]."""
    slot_pool_start: np.ndarray
    """int32[Q]: first slot of the slot's own pool."""
    costs: np.ndarray
    """float32[G, B]: parameters of an adapter."""
    flops: np.ndarray
    """float32[G, B]: forward operations of an adapter on one example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sites, blueprints and capacity; static and hashable.

    Attributes:
      sites: in the order of the flat seed axis S.
      names: the blueprints' names here, in the order of their indices.
      blueprints: the blueprints themselves.
      capacity: slots P per bank and layer.
      dtype: dtype of the adapters' parameters.
    """

    sites: tuple[Site, ...]
    names: tuple[str, ...]
    blueprints: tuple[Blueprint, ...]
    capacity: int
    dtype: DType

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `Growth` that lead to this layout."""
        return {
            "sites": self.sites,
            "blueprints": dict(zip(self.names, self.blueprints, strict=True)),
            "capacity": self.capacity,
            "dtype": self.dtype,
        }

    def replace(self, **changes: Any) -> Layout:
        """Another layout, with these of its `arguments` changed; raises as `Growth` does."""
        return make_layout(**{**self.arguments, **changes})

    @property
    def num_seeds(self) -> int:
        """S."""
        return sum(site.num_seeds for site in self.sites)

    @property
    def num_slots(self) -> int:
        """Q."""
        return len(self.tables.slot_group)

    @property
    def tables(self) -> Tables:
        """Look-up tables, made once."""
        return _tables(self)

    def site_index(self, name: str) -> int:
        """Position of a site; raises `UnknownNameError`."""
        for index, site in enumerate(self.sites):
            if site.name == name:
                return index
        raise UnknownNameError("site", name, [site.name for site in self.sites])

    def blueprint_index(self, name: str) -> int:
        """Position of a blueprint; raises `UnknownNameError`."""
        if name not in self.names:
            raise UnknownNameError("blueprint", name, self.names)
        return self.names.index(name)

    def seed_index(self, site: str, chunk: int, layer: int = 0) -> int:
        """Flat index of a seed.

        Raises:
          UnknownNameError: no such site.
          LayoutError: a chunk or layer that the site does not have.
        """
        index = self.site_index(site)
        chunks, layers = self.sites[index].chunks, self.sites[index].num_layers
        if not 0 <= chunk < chunks or not 0 <= layer < layers:
            raise LayoutError(
                f"site {site!r} has chunks 0..{chunks - 1} and layers 0..{layers - 1}, got chunk "
                f"{chunk!r} of layer {layer!r}"
            )
        before = sum(earlier.num_seeds for earlier in self.sites[:index])
        return before + layer * chunks + chunk

    def locate(self, seed: int) -> tuple[Site, int, int]:
        """`(site, layer, chunk)` of a flat index."""
        if not 0 <= seed < self.num_seeds:
            raise LayoutError(f"seed must be in 0..{self.num_seeds - 1}, got {seed!r}")
        tables = self.tables
        group = int(np.searchsorted(tables.group_start, seed, side="right")) - 1
        site = self.sites[tables.group_site[group]]
        within = seed - int(tables.group_start[group])
        first = int(np.flatnonzero(tables.group_site == tables.group_site[group])[0])
        return site, group - first, within

    def cost(self, site: str, blueprint: str) -> Cost:
        """What one adapter of `blueprint` costs at `site`."""
        entry = self.sites[self.site_index(site)]
        return self.blueprints[self.blueprint_index(blueprint)].cost(entry.spec, entry.positions)

    def per_seed(self, per_group: np.ndarray | Array) -> Array:
        """`[G, ...]` spread over the seeds, `[S, ...]`."""
        values = jnp.asarray(per_group)
        spread, first = [], 0
        for site in self.sites:
            rows = values[first : first + site.num_layers, None]
            wide = jnp.broadcast_to(rows, (site.num_layers, site.chunks, *values.shape[1:]))
            spread.append(wide.reshape(site.num_seeds, *values.shape[1:]))
            first += site.num_layers
        return jnp.concatenate(spread)


def serves(blueprint: Blueprint, site: Site) -> bool:
    """Whether a blueprint can grow at a site."""
    return site.topology in blueprint.topologies and (blueprint.can_span or not site.is_span)


def make_layout(
    *,
    sites: Iterable[Site],
    blueprints: Mapping[str, Blueprint],
    capacity: int,
    dtype: DType = jnp.float32,
) -> Layout:
    """Puts sites, blueprints and capacity together; arguments and errors as of `Growth`."""
    all_sites = tuple(sites) if isinstance(sites, Iterable) else (sites,)
    _check_kinds(all_sites, blueprints)
    _check_fit(all_sites, blueprints)
    if not is_count(capacity):
        raise LayoutError(f"capacity must be a positive int, got {capacity!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise LayoutError(f"dtype must be a floating type, got {dtype!r}")
    return Layout(
        sites=all_sites,
        names=tuple(blueprints),
        blueprints=tuple(blueprints.values()),
        capacity=capacity,
        dtype=jnp.dtype(dtype),
    )


def _check_kinds(sites: Sequence[Site], blueprints: Mapping[str, Blueprint]) -> None:
    """Raises `TypeError` or `LayoutError` unless there are sites and blueprints."""
    for site in sites:
        check_kind("sites: each", site, Site, "make a list of them with `ef.site`")
    if not isinstance(blueprints, Mapping):
        raise TypeError(
            f"blueprints must be a dict of names and blueprints, got {describe(blueprints)}; "
            '`{"low_rank": ef.blueprints.low_rank()}` for instance'
        )
    for name, blueprint in blueprints.items():
        remedy = f"call its factory: `{{{name!r}: ef.blueprints.low_rank()}}` for instance"
        check_kind(f"blueprints[{name!r}]", blueprint, Blueprint, remedy)
    if not sites:
        raise LayoutError("a layout needs at least one site; make one with `site`")
    names = [site.name for site in sites]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise LayoutError(f"site names must differ, given twice: {doubled}")
    if not blueprints:
        raise LayoutError("a layout needs at least one blueprint")
    if len(blueprints) > np.iinfo(np.int8).max:
        raise LayoutError(f"at most 127 blueprints, got {len(blueprints)}")


def _check_fit(sites: Sequence[Site], blueprints: Mapping[str, Blueprint]) -> None:
    """Raises `LayoutError` where a blueprint serves no site, or a site has no blueprint."""
    for name, blueprint in blueprints.items():
        if not any(serves(blueprint, site) for site in sites):
            forms = [(s.name, s.topology, "span" if s.is_span else "plain") for s in sites]
            raise LayoutError(
                f"blueprint {name!r} serves {blueprint.topologies} "
                f"{'with' if blueprint.can_span else 'without'} spans, which is none of the sites "
                f"{forms}"
            )
    for site in sites:
        if not any(serves(blueprint, site) for blueprint in blueprints.values()):
            raise LayoutError(
                f"no blueprint serves site {site.name!r} ({site.topology}"
                f"{', a span' if site.is_span else ''}); given: {sorted(blueprints)}"
            )


def bank_capacity(site: Site, capacity: int) -> int:
    """Slots of one layer's pool: never more than it has seeds."""
    return min(capacity, site.chunks)


@lru_cache(maxsize=64)
def _tables(self: Layout) -> Tables:
    num_blueprints = len(self.blueprints)
    group_site = np.repeat(
        np.arange(len(self.sites)), [site.num_layers for site in self.sites]
    ).astype(np.int32)
    group_size = np.asarray([self.sites[s].chunks for s in group_site], np.int32)
    group_start = (np.cumsum(group_size) - group_size).astype(np.int32)
    num_groups = len(group_site)
    pool_start = np.full((num_groups, num_blueprints), -1, np.int32)
    costs = np.zeros((num_groups, num_blueprints), np.float32)
    flops = np.zeros((num_groups, num_blueprints), np.float32)
    banks: list[Bank] = []
    slot_group: list[np.ndarray] = []
    slot_blueprint: list[np.ndarray] = []
    start = 0
    for s, site in enumerate(self.sites):
        groups = np.flatnonzero(group_site == s)
        size = bank_capacity(site, self.capacity)
        for b, blueprint in enumerate(self.blueprints):
            if not serves(blueprint, site):
                continue
            num_slots = size * len(groups)
            banks.append(Bank(site=s, blueprint=b, start=start, num_slots=num_slots))
            pool_start[groups, b] = start + size * np.arange(len(groups))
            slot_group.append(np.repeat(groups, size))
            slot_blueprint.append(np.full(num_slots, b))
            cost = blueprint.cost(site.spec, site.positions)
            costs[groups, b] = cost.parameters
            flops[groups, b] = cost.flops
            start += num_slots
    of_group = np.concatenate(slot_group).astype(np.int32)
    of_blueprint = np.concatenate(slot_blueprint).astype(np.int32)
    return Tables(
        banks=tuple(banks),
        group_site=group_site,
        group_start=group_start,
        group_size=group_size,
        pool_start=pool_start,
        slot_group=of_group,
        slot_blueprint=of_blueprint,
        slot_pool_start=pool_start[of_group, of_blueprint],
        costs=costs,
        flops=flops,
    )


def alike_banks(self: Layout) -> list[list[int]]:
    """Indices of the banks; those of one blueprint, form of site and size are together."""
    alike: dict[object, list[int]] = {}
    for index, bank in enumerate(self.tables.banks):
        form = (bank.blueprint, self.sites[bank.site].spec, bank.num_slots)
        alike.setdefault(form, []).append(index)
    return list(alike.values())


def init_adapters(self: Layout, key: Key) -> Adapters:
    """Fresh parameters for every slot of every bank.

    Alike banks are drawn together: that is one generator to compile.
    """
    adapters: dict[str, dict[str, object]] = {site.name: {} for site in self.sites}
    banks = self.tables.banks
    bank_keys = jax.random.split(key, len(banks))
    for alike in alike_banks(self):
        first = banks[alike[0]]
        fresh = jax.vmap(partial(fresh_bank, self, first))(bank_keys[np.asarray(alike)])
        for row, index in enumerate(alike):
            site, name = self.sites[banks[index].site].name, self.names[banks[index].blueprint]
            adapters[site][name] = jax.tree.map(itemgetter(row), fresh)
    return adapters


def fresh_bank(self: Layout, bank: Bank, key: Key) -> Params:
    """Fresh parameters for every slot of one bank, `[P, ...]`."""
    blueprint, spec = self.blueprints[bank.blueprint], self.sites[bank.site].spec
    keys = jax.random.split(key, bank.num_slots)
    return jax.vmap(lambda slot_key: blueprint.init(slot_key, spec, self.dtype))(keys)


def local_chunk(self: Layout, owner: Int32[Array, "Q"]) -> Int32[Array, "Q"]:
    """The chunk, counted within its site and layer, that each slot serves; negative for free ones.

    A free slot has owner -1, which stays negative after subtracting its group's first seed.
    """
    return owner - jnp.asarray(self.tables.group_start[self.tables.slot_group])
