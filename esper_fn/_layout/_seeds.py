"""What a loss function is given: the seeds, ready to grow an activation."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_fn._control import by_compiler, vary_alike
from esper_fn._layout._forward import grow_in_place, grow_span
from esper_fn._layout._probe import Moments, probe
from esper_fn._layout._rounds import BankView, Wiring
from esper_fn._layout._scope import Mark
from esper_fn._layout._site import Site
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

    sites: tuple[Site, ...]
    wirings: tuple[Wiring, ...]
    is_stacked: tuple[bool, ...]
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
        self._layout = structure
        self._views = views
        self.mark = Mark()

    def tree_flatten(self) -> tuple[tuple[tuple[SiteView, ...]], SeedsStructure]:
        """Arrays and structure."""
        return (self._views,), self._layout

    @classmethod
    def tree_unflatten(
        cls, structure: SeedsStructure, children: tuple[tuple[SiteView, ...]]
    ) -> Seeds:
        """The inverse of `tree_flatten`."""
        return cls(structure, children[0])

    def _find(self, name: str) -> int:
        for index, place in enumerate(self._layout.sites):
            if place.name == name:
                return index
        raise UnknownNameError(
            "site",
            name,
            [place.name for place in self._layout.sites],
            "give it to `Growth(sites=...)`",
        )

    def grow(
        self,
        name: str,
        x: Float[Array, "... D"],
        *,
        source: Float[Array, "... E"] | None = None,
    ) -> Float[Array, "... D"]:
        """The activation with the site's adapters added: `x + act * adapter(source or x)` per
        chunk.

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
        place, wiring = self._layout.sites[index], self._layout.wirings[index]
        view = self._views[index]
        if self._layout.is_stacked[index]:
            raise LayoutError(
                f"site {name!r} has {place.layers} layers: scan over `seeds.layers({name!r})`, or "
                f"take one with `seeds.layer({name!r}, index)`, and grow inside"
            )
        _check_activation(place, "x", x, place.features)
        if place.is_span != (source is not None):
            raise LayoutError(
                f"site {name!r} is {'a span: pass' if place.is_span else 'no span: do not pass'} "
                "source="
            )
        if source is not None:
            _check_activation(place, "source", source, place.source.features)
            if source.shape[:-1] != x.shape[:-1] or source.dtype != x.dtype:
                raise LayoutError(
                    f"site {name!r}: source {source.shape} {source.dtype} and x {x.shape} "
                    f"{x.dtype} may differ in their last axis only"
                )
        if self._layout.visits is not None:
            self._layout.visits.names[name] = None
        if source is not None:
            x, source = vary_alike(x, source), vary_alike(source, x)
        banks = tuple(bank._replace(adapters=vary_alike(bank.adapters, x)) for bank in view.banks)
        tap, moments = vary_alike(view.tap, x), vary_alike(view.probe, x)
        return by_compiler(partial(_grow, wiring), x, banks, tap, moments, x, source)

    def layers(self, name: str) -> Seeds:
        """The seeds of a site with layers, every array with leading axis L: `xs` of a `lax.scan`.

        Inside the scan each slice is a `Seeds` whose `grow(name, h)` serves that layer.
        """
        index = self._find(name)
        if not self._layout.is_stacked[index]:
            raise LayoutError(f"site {name!r} has no layers; declare it with `layers=`")
        return self._only(index, self._views[index])

    def layer(self, name: str, index: int | Array) -> Seeds:
        """One layer of a site with layers, for a stack written as a Python loop."""
        num_layers = self._layout.sites[self._find(name)].num_layers
        if isinstance(index, (int, np.integer)) and not 0 <= index < num_layers:
            raise LayoutError(
                f"site {name!r} has layers 0..{num_layers - 1}, got {index}; declare more with "
                "`layers=`"
            )
        one: Seeds = jax.tree.map(lambda leaf: leaf[index], self.layers(name))
        return one

    def _only(self, index: int, view: SiteView) -> Seeds:
        structure = SeedsStructure(
            sites=(self._layout.sites[index],),
            wirings=(self._layout.wirings[index],),
            is_stacked=(False,),
            visits=self._layout.visits,
        )
        return Seeds(structure, (view,))


def _grow(
    wiring: Wiring,
    banks: tuple[BankView, ...],
    tap: Array,
    moments: Moments | None,
    x: Array,
    source: Array | None,
) -> Array:
    if moments is not None:
        chunkings = (wiring.source, wiring.target)
        x = probe(chunkings, x if source is None else source, x, moments)
    if source is None:
        return grow_in_place(wiring, banks, x, tap)
    return grow_span(wiring, banks, source, x, tap)


def _check_activation(place: Site, argument: str, x: Any, features: int) -> None:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        raise LayoutError(f"site {place.name!r}: {argument} must be an array, got {type(x)}")
    inner = {"vector": 1, "sequence": 2, "image": 3}[place.topology]
    if len(shape) < inner:
        raise LayoutError(
            f"site {place.name!r} ({place.topology}): {argument} needs at least {inner} axes, "
            f"got shape {shape}"
        )
    if shape[-1] != features:
        raise LayoutError(
            f"site {place.name!r}: {argument} has {shape[-1]} features, declared are {features}; "
            "the last axis must be the feature axis"
        )
    if dtype not in (jax.numpy.float32, jax.numpy.bfloat16, jax.numpy.float16):
        raise LayoutError(
            f"site {place.name!r}: {argument} must be float32, bfloat16 or float16, got {dtype}"
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
