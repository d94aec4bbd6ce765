"""The seeds in scope, for modules whose call takes only an activation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from esper_fn._discover import Discovery
from esper_fn._lattice import BareSeeds, Seeds, Site
from esper_fn._typing import Array
from esper_fn.base import Topology
from esper_fn.errors import LatticeError

AnySeeds = Seeds | BareSeeds | Discovery

_SEEDS: ContextVar[AnySeeds | None] = ContextVar("esper_fn_seeds", default=None)


@contextmanager
def using(seeds: AnySeeds) -> Iterator[None]:
    """Inside the block, `linen.Grow` and `nnx.Grow` modules use `seeds`.

    Put it around the model's call in the loss function; it holds no longer than the block, and in
    this thread only.
    """
    token = _SEEDS.set(seeds)
    try:
        yield
    finally:
        _SEEDS.reset(token)


def grow_here(
    site: str,
    x: Array,
    source: Array | None,
    seeds: AnySeeds | None,
    chunks: int,
    topology: Topology,
) -> Array:
    """What a `Grow` module does, whichever library it belongs to."""
    found = _SEEDS.get() if seeds is None else seeds
    if found is None:
        raise LatticeError(
            f"site {site!r}: no seeds in scope; put `with ef.using(seeds):` around the model's call "
            "in the loss function, or pass seeds= (`ef.BareSeeds()` for the plain host)"
        )
    if isinstance(found, Discovery):
        found.declare(_declared(site, x, source, chunks, topology))
        return x
    return found.grow(site, x, source=source)


def _declared(
    name: str, x: Array, source: Array | None, chunks: int, topology: Topology
) -> Site:
    return Site(
        name=name,
        features=x.shape[-1],
        chunks=chunks,
        topology=topology,
        source_features=None if source is None else source.shape[-1],
        positions=_positions(x, topology),
    )


def _positions(x: Array, topology: Topology) -> int:
    if topology == "vector":
        return 1
    if topology == "sequence":
        return int(x.shape[-2])
    return int(x.shape[-3] * x.shape[-2])
