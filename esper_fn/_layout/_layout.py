"""All sites of a host, the blueprints that may grow there, and the room for their adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_kind, describe, is_count
from esper_fn._sites import Site
from esper_fn._typing import Adapters, Array, DType, Float32, Int32, Key
from esper_fn.blueprints._base import Blueprint, Cost
from esper_fn.errors import LayoutError, UnknownNameError


class Bank(NamedTuple):
    """Room for the adapters of one blueprint at one site: slots `start : start + num_slots` of
    Q.
    """

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
        place = self.sites[index]
        if not 0 <= chunk < place.chunks or not 0 <= layer < place.num_layers:
            raise LayoutError(
                f"site {site!r} has chunks 0..{place.chunks - 1} and layers "
                f"0..{place.num_layers - 1}, got chunk {chunk!r} of layer {layer!r}"
            )
        before = sum(earlier.num_seeds for earlier in self.sites[:index])
        return before + layer * place.chunks + chunk

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
        place = self.sites[self.site_index(site)]
        chosen = self.blueprints[self.blueprint_index(blueprint)]
        return chosen.cost(place.spec, place.positions)

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
    """Puts sites, blueprints and the room for adapters together.

    Args:
      sites: the places; their order is the order of the seeds.
      blueprints: name -> blueprint; each is offered at the sites whose topology it serves.
      capacity: adapters that may be alive at once, per site, layer and blueprint; a site with fewer
        chunks has room for as many as it has chunks.
      dtype: dtype of the adapters' parameters.

    Raises:
      TypeError: a site or a blueprint is none, its factory for instance.
      LayoutError: no site, a name given twice, a blueprint that serves no site, a site no
        blueprint serves, a capacity below one, a dtype that is not floating.
    """
    places = tuple(sites) if isinstance(sites, Iterable) else (sites,)
    for place in places:
        check_kind("sites: each", place, Site, "make a list of them with `ef.site` and `ef.site`")
    if not isinstance(blueprints, Mapping):
        raise TypeError(
            f"blueprints must be a dict of names and blueprints, got {describe(blueprints)}; "
            '`{"low_rank": ef.blueprints.low_rank()}` for instance'
        )
    for name, blueprint in blueprints.items():
        remedy = f"call its factory: `{{{name!r}: ef.blueprints.low_rank()}}` for instance"
        check_kind(f"blueprints[{name!r}]", blueprint, Blueprint, remedy)
    if not places:
        raise LayoutError("a layout needs at least one site; make one with `site` or `span`")
    doubled = {p.name for p in places if sum(q.name == p.name for q in places) > 1}
    if doubled:
        raise LayoutError(f"site names must differ, given twice: {sorted(doubled)}")
    if not blueprints:
        raise LayoutError("a layout needs at least one blueprint")
    if len(blueprints) > np.iinfo(np.int8).max:
        raise LayoutError(f"at most 127 blueprints, got {len(blueprints)}")
    for name, blueprint in blueprints.items():
        if not any(serves(blueprint, place) for place in places):
            raise LayoutError(
                f"blueprint {name!r} serves {blueprint.topologies} "
                f"{'with' if blueprint.can_span else 'without'} spans, which is none of the sites "
                f"{[(p.name, p.topology, 'span' if p.is_span else 'plain') for p in places]}"
            )
    for place in places:
        if not any(serves(blueprint, place) for blueprint in blueprints.values()):
            raise LayoutError(
                f"no blueprint serves site {place.name!r} ({place.topology}"
                f"{', a span' if place.is_span else ''}); given: {sorted(blueprints)}"
            )
    if not is_count(capacity):
        raise LayoutError(f"capacity must be a positive int, got {capacity!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise LayoutError(f"dtype must be a floating type, got {dtype!r}")
    return Layout(
        sites=places,
        names=tuple(blueprints),
        blueprints=tuple(blueprints.values()),
        capacity=capacity,
        dtype=jnp.dtype(dtype),
    )


def bank_capacity(place: Site, capacity: int) -> int:
    """Slots of one layer's pool: never more than it has seeds."""
    return min(capacity, place.chunks)


@lru_cache(maxsize=64)
def _tables(self: Layout) -> Tables:
    num_blueprints = len(self.blueprints)
    group_site = np.repeat(
        np.arange(len(self.sites)), [place.num_layers for place in self.sites]
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
    for s, place in enumerate(self.sites):
        groups = np.flatnonzero(group_site == s)
        size = bank_capacity(place, self.capacity)
        for b, blueprint in enumerate(self.blueprints):
            if not serves(blueprint, place):
                continue
            num_slots = size * len(groups)
            banks.append(Bank(site=s, blueprint=b, start=start, num_slots=num_slots))
            pool_start[groups, b] = start + size * np.arange(len(groups))
            slot_group.append(np.repeat(groups, size))
            slot_blueprint.append(np.full(num_slots, b))
            cost = blueprint.cost(place.spec, place.positions)
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


def fresh_bank(
    self: Layout, bank: Bank, key: Key, along: Float32[Array, "P F U"] | None = None
) -> object:
    """Newborn parameters for every slot of one bank, `[P, ...]`; along directions, if given."""
    blueprint, place = self.blueprints[bank.blueprint], self.sites[bank.site]
    keys, init_along = jax.random.split(key, bank.num_slots), blueprint.init_along
    if along is None or init_along is None:
        return jax.vmap(lambda k: blueprint.init(k, place.spec, self.dtype))(keys)
    return jax.vmap(lambda k, d: init_along(k, place.spec, self.dtype, d))(keys, along)


def local_chunk(self: Layout, owner: Int32[Array, "Q"]) -> Int32[Array, "Q"]:
    """The chunk, counted within its site and layer, that each slot serves; negative for free ones.

    A free slot has owner -1, which stays negative after subtracting its group's first seed.
    """
    return owner - jnp.asarray(self.tables.group_start[self.tables.slot_group])
