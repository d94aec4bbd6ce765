"""What a loss function is given: the seeds, ready to grow an activation."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_fn._control import by_compiler, vary_alike
from esper_fn._sites._autodiff import grow
from esper_fn._sites._exact import grow_exact
from esper_fn._sites._probe import Moments, probe
from esper_fn._sites._schedule import BankView, SiteConfig
from esper_fn._sites._scope import Mark
from esper_fn._sites._site import Site
from esper_fn._typing import Array, Float
from esper_fn.errors import LayoutError, UnknownNameError


class SiteView(NamedTuple):
    """The arrays of one site; with a leading axis L before the site's layers are scanned over."""

    banks: tuple[BankView, ...]
    tap: Array
    probe: Moments | None


class Visits:
    """Notes, while tracing, which sites a loss function reached; holds names, never arrays.

    It is part of the tree structure and equal only to itself, so an inner `jit` that receives the
    seeds is traced anew for each outer trace and its visits are noted.
    """

    def __init__(self) -> None:
        self.names: dict[str, None] = {}


class SeedsStructure(NamedTuple):
    """The static part of `Seeds`."""

    sites: tuple[SiteConfig, ...]
    visits: Visits | None
    """None where nobody asks, as in an evaluation: such `Seeds` may enter a `jit` again and again
    without tracing it anew."""


@jax.tree_util.register_pytree_node_class
class Seeds:
    """The seeds of a layout as a loss function sees them; a pytree.

    Inside the loss, `h = seeds.grow("hidden", h)` at the place of each site is all there is to it.
    Made by `Growth.seeds` and `Growth.value_and_grad`.
    """

    def __init__(self, structure: SeedsStructure, views: tuple[SiteView, ...]) -> None:
        self._structure = structure
        self._views = views
        self.mark = Mark()

    def tree_flatten(self) -> tuple[tuple[tuple[SiteView, ...]], SeedsStructure]:
        """Arrays and structure."""
        return (self._views,), self._structure

    @classmethod
    def tree_unflatten(
        cls, structure: SeedsStructure, children: tuple[tuple[SiteView, ...]]
    ) -> Seeds:
        """The inverse of `tree_flatten`."""
        return cls(structure, children[0])

    def _find(self, name: str) -> int:
        names = [config.site.name for config in self._structure.sites]
        if name not in names:
            raise UnknownNameError("site", name, names, "give it to `Growth(sites=...)`")
        return names.index(name)

    def grow(
        self,
        name: str,
        x: Float[Array, "... D"],
        *,
        source: Float[Array, "... E"] | None = None,
    ) -> Float[Array, "... D"]:
        """The activation with the site's adapters added: `x + output_scale *
        adapter(source or x)` per chunk.

        Args:
          name: the site.
          x: the activation, any leading shape; float32 or bfloat16 (or float16).
          source: for a span, the earlier activation its adapters read.

        Returns:
          An activation of `x`'s shape and dtype; `x` itself, bit for bit, in the chunks of seeds
          that do not act.

        Raises:
          UnknownNameError: no such site.
          LayoutError: a wrong feature count, dtype or rank, a source where none belongs or a
            missing one, or a site with layers outside a scan over `layers`.
        """
        index = self._find(name)
        config, view = self._structure.sites[index], self._views[index]
        site = config.site
        if config.is_stacked:
            raise LayoutError(
                f"site {name!r} has {site.layers} layers: scan over `seeds.layers({name!r})`, or "
                f"take one with `seeds.layer({name!r}, index)`, and grow inside"
            )
        _check_activation(site, "x", x, site.features)
        if site.is_span != (source is not None):
            raise LayoutError(
                f"site {name!r} is {'a span: pass' if site.is_span else 'no span: do not pass'} "
                "source="
            )
        if source is not None:
            _check_activation(site, "source", source, site.source.features)
            if source.shape[:-1] != x.shape[:-1] or source.dtype != x.dtype:
                raise LayoutError(
                    f"site {name!r}: source {source.shape} {source.dtype} and x {x.shape} "
                    f"{x.dtype} may differ in their last axis only"
                )
        if self._structure.visits is not None:
            self._structure.visits.names[name] = None
        if source is not None:
            x, source = vary_alike(x, source), vary_alike(source, x)
        banks = tuple(bank._replace(adapters=vary_alike(bank.adapters, x)) for bank in view.banks)
        tap, moments = vary_alike(view.tap, x), vary_alike(view.probe, x)
        return by_compiler(partial(_grow, config.anonymous()), x, banks, tap, moments, x, source)

    def layers(self, name: str) -> Seeds:
        """The seeds of a site with layers, every array with leading axis L: `xs` of a `lax.scan`.

        Inside the scan each slice is a `Seeds` whose `grow(name, h)` serves that layer.
        """
        index = self._find(name)
        if not self._structure.sites[index].is_stacked:
            raise LayoutError(f"site {name!r} has no layers; declare it with `layers=`")
        return self._only(index, self._views[index])

    def layer(self, name: str, index: int | Array) -> Seeds:
        """One layer of a site with layers, for a stack written as a Python loop."""
        num_layers = self._structure.sites[self._find(name)].site.num_layers
        if isinstance(index, (int, np.integer)) and not 0 <= index < num_layers:
            raise LayoutError(
                f"site {name!r} has layers 0..{num_layers - 1}, got {index}; declare more with "
                "`layers=`"
            )
        own: Seeds = jax.tree.map(lambda leaf: leaf[index], self.layers(name))
        return own

    def _only(self, index: int, view: SiteView) -> Seeds:
        config = self._structure.sites[index]._replace(is_stacked=False)
        return Seeds(SeedsStructure((config,), self._structure.visits), (view,))


@partial(jax.jit, static_argnums=0)
def _grow(
    config: SiteConfig,
    banks: tuple[BankView, ...],
    tap: Array,
    moments: Moments | None,
    x: Array,
    source: Array | None,
) -> Array:
    if config.is_exact:
        return grow_exact(config, banks, source, x)
    if moments is not None:
        chunkings = (config.site.source, config.site.target)
        x = probe(chunkings, x if source is None else source, x, moments)
    return grow(config, banks, source, x, tap)


def _check_activation(site: Site, argument: str, x: Any, features: int) -> None:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        raise LayoutError(f"site {site.name!r}: {argument} must be an array, got {type(x)}")
    inner = {"vector": 1, "sequence": 2, "image": 3}[site.topology]
    if len(shape) < inner:
        raise LayoutError(
            f"site {site.name!r} ({site.topology}): {argument} needs at least {inner} axes, "
            f"got shape {shape}"
        )
    if shape[-1] != features:
        raise LayoutError(
            f"site {site.name!r}: {argument} has {shape[-1]} features, declared are {features}; "
            "the last axis must be the feature axis"
        )
    if dtype not in (jax.numpy.float32, jax.numpy.bfloat16, jax.numpy.float16):
        raise LayoutError(
            f"site {site.name!r}: {argument} must be float32, bfloat16 or float16, got {dtype}"
        )


@jax.tree_util.register_pytree_node_class
class NoSeeds:
    """Stands in for `Seeds` where nothing grows: the plain host."""

    mark = Mark()

    def tree_flatten(self) -> tuple[tuple[()], None]:
        """No arrays."""
        return (), None

    @classmethod
    def tree_unflatten(cls, structure: None, children: tuple[()]) -> NoSeeds:
        """The inverse of `tree_flatten`."""
        del structure, children
        return cls()

    def grow(self, name: str, x: Array, *, source: Array | None = None) -> Array:
        """`x`."""
        del name, source
        return x

    def layers(self, name: str) -> NoSeeds:
        """Itself."""
        del name
        return self

    def layer(self, name: str, index: int | Array) -> NoSeeds:
        """Itself."""
        del name, index
        return self
