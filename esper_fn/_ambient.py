"""The seeds in scope, for modules whose call takes only an activation, and finding their sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

from esper_fn._arguments import describe
from esper_fn._sites import Mark, NoSeeds, Seeds, Site, marked
from esper_fn._typing import Array
from esper_fn.blueprints._base import Topology
from esper_fn.errors import LayoutError


class Discovery:
    """Stands in for `Seeds` while the sites of a model are looked for."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.mark = Mark()

    def declare(self, site: Site) -> None:
        """Notes a site; the same one may be reached several times."""
        known = self.sites.setdefault(site.name, site)
        if known != site:
            raise LayoutError(
                f"site {site.name!r} is declared twice, as {known} and as {site}; "
                "give the two sites different names"
            )


AnySeeds = Seeds | NoSeeds | Discovery

_SEEDS: ContextVar[AnySeeds | None] = ContextVar("esper_fn_seeds", default=None)


@contextmanager
def use_seeds(seeds: AnySeeds) -> Iterator[None]:
    """Inside the block, `Grow` modules of `esper_fn.flax` use `seeds`.

    Put the block around the model's call in the loss function. The seeds are in scope until its
    end, in this thread only. What is compiled inside (`jax.jit`, `nnx.jit`, a scan, each operation
    outside of any of them) is compiled for these seeds alone. In the loss function of a
    compiled step that costs nothing. An evaluation would compile all anew for each
    `growth.seeds(state)`: to compile it once, compile a function that takes the seeds as an
    argument and enters the block itself.

    Args:
      seeds: those the loss function is given, `growth.seeds(state)`, or `ef.NoSeeds()`.

    Raises:
      LayoutError: `seeds` are of another type.
    """
    if not isinstance(seeds, AnySeeds):
        raise LayoutError(
            f"use_seeds: seeds must be `Seeds` or `NoSeeds`, got {describe(seeds)}; "
            "take those the loss function is given, or `growth.seeds(state)`"
        )
    token = _SEEDS.set(seeds)
    try:
        with marked(seeds.mark):
            yield
    finally:
        _SEEDS.reset(token)


def discover_sites(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """The sites that `Grow` modules of `esper_fn.flax` declare, in the order of their calls.

    Args:
      run: calls the model once, e.g. `lambda x: model(x)`; nothing is computed. An NNX model that
        draws random numbers or keeps statistics needs `model.eval()` first: its state may not
        change while it is traced.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: its keyword arguments.

    Returns:
      The sites, for `Growth(sites=...)`.

    Raises:
      LayoutError: no site, two different ones of the same name, or a model that changes its own
        state.
    """
    discovery = Discovery()

    def traced(*args: Any, **kwargs: Any) -> Any:
        with use_seeds(discovery):
            return run(*args, **kwargs)

    try:
        jax.eval_shape(traced, *args, **kwargs)
    except Exception as error:
        # By its name: the core knows nothing of Flax.
        if type(error).__name__ != "TraceContextError":
            raise
        raise LayoutError(
            "discover_sites: the model changes its own state when it is called, as dropout and "
            "running statistics do in training mode; call `model.eval()` first, or give the model "
            "a copy of its state inside `run` (`nnx.merge(*nnx.split(model))`)"
        ) from error
    if not discovery.sites:
        raise LayoutError("the model has no site; put a `Grow` of `esper_fn.flax` after a layer")
    return tuple(discovery.sites.values())


def grow_ambient(
    site: str,
    x: Array,
    source: Array | None,
    seeds: AnySeeds | None,
    chunks: int,
    topology: Topology,
) -> Array:
    """What a `Grow` module does, whichever library it belongs to."""
    if seeds is None:
        seeds = _SEEDS.get()
    if seeds is None:
        raise LayoutError(
            f"site {site!r}: no seeds in scope; put `with ef.use_seeds(seeds):` around the model's "
            "call in the loss function, or pass seeds= (`ef.NoSeeds()` for the plain host)"
        )
    if isinstance(seeds, Discovery):
        if not hasattr(x, "shape"):
            raise LayoutError(f"site {site!r}: x must be an array, got {describe(x)}")
        seeds.declare(_declared(site, x, source, chunks, topology))
        return x
    return seeds.grow(site, x, source=source)


def _declared(name: str, x: Array, source: Array | None, chunks: int, topology: Topology) -> Site:
    return Site(
        name=name,
        features=x.shape[-1],
        chunks=chunks,
        topology=topology,
        source_features=None if source is None else source.shape[-1],
        positions=_positions(name, x, topology),
    )


def _positions(name: str, x: Array, topology: Topology) -> int:
    inner = {"sequence": 2, "image": 3}.get(topology, 1)
    if len(x.shape) < inner:
        raise LayoutError(
            f"site {name!r}: topology={topology!r} needs an activation of at least {inner} axes, "
            f"got {x.shape}; choose another topology or keep the axes"
        )
    return math.prod(x.shape[-inner:-1])
