"""What has grown: the adapters that act, by name and place instead of by slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._growth import Growth, GrowthState
from esper_fn._layout import Layout
from esper_fn._typing import Array, Params
from esper_fn.errors import LayoutError
from esper_fn.lifecycle import Stage, gains


class Adapter(NamedTuple):
    """One adapter that acts on its host."""

    seed: int
    site: str
    layer: int
    chunk: int
    blueprint: str
    stage: str
    act: float
    """How much it acts: 1, or alpha while it is grafted in."""
    params: Params


def acting(growth: Growth, state: GrowthState) -> list[Adapter]:
    """The adapters that act, in the order of their seeds; parameters are NumPy's.

    Adapters that only learn behind the host are no part of the network.
    """
    seeds, adapters = jax.device_get((state.seeds, state.adapters))
    act = np.asarray(gains(jnp.asarray(seeds.stage), jnp.asarray(seeds.alpha)))[:, 0]
    tables = growth.layout.tables
    found = []
    for seed in np.flatnonzero((seeds.slot >= 0) & (act != 0)).tolist():
        place, layer, chunk = growth.layout.locate(seed)
        slot = int(seeds.slot[seed])
        bank = next(b for b in tables.banks if b.start <= slot < b.start + b.num_slots)
        name = growth.layout.names[bank.blueprint]
        at = slot - bank.start
        found.append(
            Adapter(
                seed=seed,
                site=place.name,
                layer=layer,
                chunk=chunk,
                blueprint=name,
                stage=Stage(int(seeds.stage[seed])).name,
                act=float(act[seed]),
                params=jax.tree.map(lambda leaf, at=at: leaf[at], adapters[place.name][name]),
            )
        )
    return found


class _Placed(NamedTuple):
    """Adapters of one blueprint at one site, `[n, ...]`; a site inside a stack has `[L, n,
    ...]`.
    """

    params: Params
    chunk: Array
    act: Array
    """0 where there is no adapter."""


@jax.tree_util.register_pytree_node_class
class FixedSeeds:
    """Stands in for `Seeds` where what has grown is fixed: no slots, no lifecycle, no state."""

    def __init__(self, layout: Layout, placed: dict[str, dict[str, _Placed]]) -> None:
        """See `fixed`."""
        self._layout, self._placed = layout, placed

    def tree_flatten(self) -> tuple[tuple[Any], Layout]:
        """The adapters are the children."""
        return (self._placed,), self._layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: tuple[Any]) -> FixedSeeds:
        """The inverse of `tree_flatten`."""
        return cls(layout, *children)

    def grow(self, name: str, x: Array, *, source: Array | None = None) -> Array:
        """`x + act r` for each adapter of the site; features beyond the site's are left as they
        are.

        A host into which adapters were folded may have wider activations than its sites.
        """
        place = self._layout.sites[self._layout.site_index(name)]
        read = (x if source is None else source)[..., : place.source.features]
        y = x
        for blueprint_name, placed in self._placed.get(name, {}).items():
            blueprint = self._layout.blueprints[self._layout.blueprint_index(blueprint_name)]
            for n in range(placed.chunk.shape[0]):
                adapter = jax.tree.map(lambda leaf, n=n: leaf[n], placed.params)
                chunk, act = placed.chunk[n], placed.act[n].astype(x.dtype)
                u = _read(read, place.source, chunk)
                mask = jnp.asarray(place.source.mask)[chunk]
                r = blueprint.apply(adapter, u, place.spec, mask)
                r = jnp.where(act != 0, act * r, jnp.zeros_like(r))
                columns, is_real = _columns(place.target, chunk)
                columns = jnp.where(is_real, columns, x.shape[-1])
                y = y.at[..., columns].add(r, mode="drop")
        return y

    def layers(self, name: str) -> FixedSeeds:
        """The seeds of a site inside a scanned stack, with a leading axis L to be scanned over."""
        return FixedSeeds(self._layout, {name: self._placed.get(name, {})})

    def layer(self, name: str, index: int | Array) -> FixedSeeds:
        """The seeds of one layer of a site inside a stack."""
        at_site = jax.tree.map(lambda leaf: leaf[index], self._placed.get(name, {}))
        return FixedSeeds(self._layout, {name: at_site})


def _columns(chunking: Any, chunk: Array) -> tuple[Array, Array]:
    offsets = jnp.arange(chunking.widest, dtype=jnp.int32)
    return jnp.asarray(chunking.starts)[chunk] + offsets, jnp.asarray(chunking.mask)[chunk]


def _read(x: Array, chunking: Any, chunk: Array) -> Array:
    columns, is_real = _columns(chunking, chunk)
    columns = jnp.where(is_real, columns, x.shape[-1])
    return jnp.take(x, columns, axis=-1, mode="fill", fill_value=0)


def fixed(layout: Layout, adapters: Sequence[Adapter]) -> FixedSeeds:
    """The adapters as seeds for a forward pass, `host.apply(params, seeds, inputs)`.

    Raises:
      LayoutError: an adapter of a site or blueprint that the layout does not have.
    """
    placed: dict[str, dict[str, _Placed]] = {}
    for adapter in adapters:
        if adapter.blueprint not in layout.names or adapter.site not in [
            s.name for s in layout.sites
        ]:
            raise LayoutError(f"the layout has no {adapter.blueprint!r} at {adapter.site!r}")
    for place in layout.sites:
        for name in layout.names:
            here = [
                adapter
                for adapter in adapters
                if (adapter.site, adapter.blueprint) == (place.name, name)
            ]
            if not here:
                continue
            rows = [
                [adapter for adapter in here if adapter.layer == layer]
                for layer in range(place.num_layers)
            ]
            width = max(map(len, rows))
            layers = [_stacked(row, width, here[0].params) for row in rows]
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
            if place.layers is None:
                stack = layers[0]
            placed.setdefault(place.name, {})[name] = stack
    return FixedSeeds(layout, placed)


def _stacked(adapters: Sequence[Adapter], width: int, like: Params) -> _Placed:
    nothing = jax.tree.map(jnp.zeros_like, like)
    filled = [adapter.params for adapter in adapters] + [nothing] * (width - len(adapters))
    num_free = width - len(adapters)
    return _Placed(
        params=jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *filled),
        chunk=jnp.asarray([adapter.chunk for adapter in adapters] + [0] * num_free, jnp.int32),
        act=jnp.asarray([adapter.act for adapter in adapters] + [0.0] * num_free, jnp.float32),
    )


def fold(
    host_fold: Any, layout: Layout, params: Params, adapters: Sequence[Adapter]
) -> tuple[Params, list[Adapter], list[Adapter]]:
    """Takes fossils into the host's own parameters, where that is the same function.

    Args:
      host_fold: `Host.fold`, or None for a host that cannot.
      layout: of the run.
      params: of the host.
      adapters: from `acting`.

    Returns:
      Parameters, the adapters that remain beside them, and those that were folded.
    """
    rest, folded = [], []
    for adapter in adapters:
        blueprint = layout.blueprints[layout.blueprint_index(adapter.blueprint)]
        taken = None
        if host_fold is not None and adapter.stage == Stage.FOSSILIZED.name:
            taken = host_fold(params, adapter.site, blueprint, adapter.params, adapter.act)
        if taken is None:
            rest.append(adapter)
        else:
            params = taken
            folded.append(adapter)
    return params, rest, folded
