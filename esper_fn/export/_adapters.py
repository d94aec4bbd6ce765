"""What has grown: the adapters that act, by name and position instead of by slot."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._growth import Growth, GrowthState
from esper_fn._layout import Layout
from esper_fn._sites import BankView, Site, SiteConfig, forward
from esper_fn._typing import Array, Params
from esper_fn.errors import LayoutError
from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._state import gains
from esper_kernels import Gains


class Adapter(NamedTuple):
    """One adapter that acts on its host."""

    seed: int
    site: str
    layer: int
    chunk: int
    blueprint: str
    stage: str
    output_scale: float
    """How much it acts: 1, or alpha while it is grafted in."""
    params: Params


def acting_adapters(growth: Growth, state: GrowthState) -> list[Adapter]:
    """The adapters that act, in the order of their seeds; parameters are NumPy's.

    Adapters that only learn behind the host are no part of the network.

    Args:
      growth: the growing network.
      state: of it.
    """
    layout = growth.layout
    seeds, banks = jax.device_get((state.seeds, state.adapters))
    scale = np.asarray(gains(jnp.asarray(seeds.stage), jnp.asarray(seeds.alpha)))[:, 0]
    acting = []
    for seed in np.flatnonzero((seeds.slot >= 0) & (scale != 0)).tolist():
        site, layer, chunk = layout.locate(seed)
        slot = int(seeds.slot[seed])
        bank = next(b for b in layout.tables.banks if b.start <= slot < b.start + b.num_slots)
        blueprint = layout.names[bank.blueprint]
        acting.append(
            Adapter(
                seed=seed,
                site=site.name,
                layer=layer,
                chunk=chunk,
                blueprint=blueprint,
                stage=Stage(int(seeds.stage[seed])).name,
                output_scale=float(scale[seed]),
                params=jax.tree.map(itemgetter(slot - bank.start), banks[site.name][blueprint]),
            )
        )
    return acting


@jax.tree_util.register_pytree_node_class
class FixedSeeds:
    """Stands in for `Seeds` where what has grown is fixed: no slots, no lifecycle, no state."""

    def __init__(self, layout: Layout, banks: dict[str, dict[str, BankView]]) -> None:
        """See `fixed_seeds`."""
        self._layout, self._banks = layout, banks

    def tree_flatten(self) -> tuple[tuple[Any], Layout]:
        """The adapters are the children."""
        return (self._banks,), self._layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: tuple[Any]) -> FixedSeeds:
        """The inverse of `tree_flatten`."""
        return cls(layout, *children)

    def grow(self, name: str, x: Array, *, source: Array | None = None) -> Array:
        """`x + output_scale * r` for each adapter of the site.

        A host into which adapters were folded may have wider activations than its sites; features
        beyond the site's are left as they are.
        """
        site, banks = self._layout.sites[self._layout.site_index(name)], self._banks.get(name, {})
        blueprints = [self._layout.blueprints[self._layout.blueprint_index(key)] for key in banks]
        config = SiteConfig(
            site=site, blueprints=tuple(blueprints), adapters_at_once=None, implementation="loops"
        )
        inputs = (x if source is None else source)[..., : site.source.features]
        y, _ = forward(config, tuple(banks.values()), inputs, x[..., : site.features])
        return jnp.concatenate([y, x[..., site.features :]], axis=-1)

    def layers(self, name: str) -> FixedSeeds:
        """The seeds of a site inside a scanned stack, with a leading axis L to be scanned over."""
        return FixedSeeds(self._layout, {name: self._banks.get(name, {})})

    def layer(self, name: str, index: int | Array) -> FixedSeeds:
        """The seeds of one layer of a site inside a stack."""
        at_site = jax.tree.map(lambda leaf: leaf[index], self._banks.get(name, {}))
        return FixedSeeds(self._layout, {name: at_site})


def fixed_seeds(layout: Layout, adapters: Sequence[Adapter]) -> FixedSeeds:
    """The adapters as seeds for a forward pass, `host.apply(params, seeds, inputs)`.

    Args:
      layout: of the growing network.
      adapters: those of `acting_adapters`.

    Raises:
      LayoutError: an adapter of a site or blueprint that the layout does not have.
    """
    sites = [site.name for site in layout.sites]
    for adapter in adapters:
        if adapter.blueprint not in layout.names or adapter.site not in sites:
            raise LayoutError(f"the layout has no {adapter.blueprint!r} at {adapter.site!r}")
    banks: dict[str, dict[str, BankView]] = {}
    for site in layout.sites:
        for name in layout.names:
            own = [a for a in adapters if (a.site, a.blueprint) == (site.name, name)]
            if own:
                banks.setdefault(site.name, {})[name] = _bank(own, site)
    return FixedSeeds(layout, banks)


def _bank(adapters: Sequence[Adapter], site: Site) -> BankView:
    """Adapters of one blueprint at one site, with a leading axis of layers where it has layers."""
    by_layer: list[list[Adapter]] = [[] for _ in range(site.num_layers)]
    for adapter in adapters:
        by_layer[adapter.layer].append(adapter)
    num_slots = max(map(len, by_layer))
    layers = [_stacked(row, num_slots, adapters[0].params) for row in by_layer]
    if site.layers is None:
        return layers[0]
    stacked: BankView = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return stacked


def _stacked(adapters: Sequence[Adapter], num_slots: int, like: Params) -> BankView:
    num_free = num_slots - len(adapters)
    params = [adapter.params for adapter in adapters]
    params += [jax.tree.map(jnp.zeros_like, like)] * num_free
    zeros = jnp.zeros((num_slots,), jnp.float32)
    scale = jnp.asarray([adapter.output_scale for adapter in adapters] + [0.0] * num_free)
    return BankView(
        adapters=jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *params),
        chunk=jnp.asarray([adapter.chunk for adapter in adapters] + [-1] * num_free, jnp.int32),
        gains=jnp.stack(Gains(scale, zeros, zeros, zeros), axis=-1),
    )


def fold(
    host_fold: Any, layout: Layout, params: Params, adapters: Sequence[Adapter]
) -> tuple[Params, list[Adapter], list[Adapter]]:
    """Takes fossils into the host's own parameters, where that is the same function.

    Args:
      host_fold: `host_fold(params, site, blueprint, adapter_params, output_scale)` returns the
        host's new parameters, or None where it cannot take the adapter in; None for a host that
        never can.
      layout: of the growing network.
      params: parameters of the host.
      adapters: those of `acting_adapters`.

    Returns:
      Parameters, the adapters that remain beside them, and those that were folded.
    """
    rest, folded = [], []
    for adapter in adapters:
        blueprint = layout.blueprints[layout.blueprint_index(adapter.blueprint)]
        new_params = None
        if host_fold is not None and adapter.stage == Stage.FOSSILIZED.name:
            new_params = host_fold(
                params, adapter.site, blueprint, adapter.params, adapter.output_scale
            )
        if new_params is None:
            rest.append(adapter)
        else:
            params = new_params
            folded.append(adapter)
    return params, rest, folded
