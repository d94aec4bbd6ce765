"""The directions that a survey stores for adapters to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._layout import Bank, Layout, serves
from esper_fn._records import record
from esper_fn._sites import Moments, Site
from esper_fn._survey._potential import directions
from esper_fn._typing import Array, Bool, Float32, Int8, Int32
from esper_fn.lifecycle import NONE


@record
class Directions(NamedTuple):
    """Where adapters of a few seeds of one site may begin to look, one row a layer."""

    seed: Int32[Array, "L N"]
    """The seed that a row is for, or `NONE`."""
    along: Float32[Array, "L N F U"]
    """Columns for a first matrix (`blueprints.InitAlong`); undefined where `seed` is `NONE`."""


SiteDirections = tuple[Directions | None, ...]
"""One entry a site; None where no blueprint that serves it begins along directions."""


def has_directed(layout: Layout, site: Site) -> bool:
    """Whether some blueprint at the site begins along directions."""
    return any(b.init_along is not None and serves(b, site) for b in layout.blueprints)


def no_directions(layout: Layout, num_seeds: int, num_directions: int) -> SiteDirections:
    """No directions for any seed.

    Args:
      layout: the static layout.
      num_seeds: N, or as many as a layer has chunks if those are fewer.
      num_directions: U, or as many as the chunk reads or writes features if those are fewer.
    """

    def empty(site: Site) -> Directions:
        rows = (site.num_layers, min(num_seeds, site.chunks))
        inputs, outputs, _ = site.spec
        return Directions(
            seed=jnp.full(rows, NONE, jnp.int32),
            along=jnp.zeros((*rows, inputs, min(num_directions, inputs, outputs)), jnp.float32),
        )

    return tuple(empty(site) if has_directed(layout, site) else None for site in layout.sites)


def slot_directions(
    bank: Bank, owner: Int32[Array, "Q"], directions: Directions
) -> tuple[Bool[Array, "P"], Float32[Array, "P F U"]]:
    """The slots of a bank whose seed has directions, and these; undefined in other slots."""
    seed = owner[bank.start : bank.start + bank.num_slots]
    is_own = (seed[:, None] == directions.seed.reshape(1, -1)) & (seed != NONE)[:, None]
    rows = directions.along.reshape(-1, *directions.along.shape[2:])
    return jnp.any(is_own, axis=1), rows[jnp.argmax(is_own, axis=1)]


def store_directions(
    layout: Layout,
    before: SiteDirections,
    moments: Sequence[Moments],
    is_eligible: Bool[Array, "S"],
    potential: Float32[Array, "S"],
) -> SiteDirections:
    """The directions of each layer's eligible seeds of highest potential, in place of all others.

    Seeds without potential, and directions that are zero or not finite, are left out.

    Args:
      layout: the static layout.
      before: what is replaced; it says how many rows there are.
      moments: of each site.
      is_eligible: seeds that may begin along directions.
      potential: the order among them.
    """
    after: list[Directions | None] = []
    first = 0
    for site, old, moment in zip(layout.sites, before, moments, strict=True):
        own = slice(first, first + site.num_seeds)
        if old is None:
            after.append(None)
        else:
            worth = jnp.where(is_eligible & (potential > 0), potential, -jnp.inf)[own]
            after.append(_best_directions(site, first, old.seed.shape, moment, worth))
        first += site.num_seeds
    return tuple(after)


def _best_directions(
    site: Site,
    first: int,
    shape: tuple[int, ...],
    moments: Moments,
    worth: Float32[Array, "s"],
) -> Directions:
    """The directions of the `shape[1]` best seeds of each of `shape[0]` layers."""

    def by_layer(leaf: Array) -> Array:
        inner = leaf.shape[-2:] if leaf.ndim > 2 else ()
        return leaf.reshape(shape[0], -1, *inner)

    def choose(rows: Moments, index: Array) -> Moments:
        return jax.tree.map(lambda leaf: leaf[index], rows)

    best, chunk = jax.lax.top_k(worth.reshape(site.num_layers, site.chunks), shape[1])
    along = directions(jax.vmap(choose)(jax.tree.map(by_layer, moments), chunk))
    is_known = (
        (best > -jnp.inf)
        & jnp.all(jnp.isfinite(along), axis=(-2, -1))
        & jnp.any(along != 0, axis=(-2, -1))
    )
    is_real = jnp.asarray(site.source.mask)[chunk] & is_known[..., None]
    layer = site.chunks * jnp.arange(site.num_layers, dtype=jnp.int32)[:, None]
    seed = first + layer + chunk.astype(jnp.int32)
    return Directions(
        seed=jnp.where(is_known, seed, NONE).astype(jnp.int32),
        along=jnp.where(is_real[..., None], along, 0.0),
    )


def consume_directions(
    layout: Layout,
    before: SiteDirections,
    is_born: Bool[Array, "S"],
    blueprint: Int8[Array, "S"],
) -> tuple[SiteDirections, Int32[Array, ""]]:
    """The directions without those of newborn adapters, and how many of these began along them.

    Directions serve one germination: the next adapter of the same seed meets another host.
    """
    can = jnp.asarray(np.array([b.init_along is not None for b in layout.blueprints]))
    after: list[Directions | None] = []
    count = jnp.int32(0)
    for old in before:
        if old is None:
            after.append(None)
            continue
        seed = jnp.maximum(old.seed, 0)
        is_used = (old.seed != NONE) & is_born[seed]
        count += jnp.sum(is_used & can[jnp.maximum(blueprint[seed], 0)], dtype=jnp.int32)
        after.append(old._replace(seed=jnp.where(is_used, NONE, old.seed)))
    return tuple(after), count


def clear_directions(before: SiteDirections, is_cleared: Bool[Array, ""]) -> SiteDirections:
    """No directions for any seed where `is_cleared`, else what was there."""

    def clear(old: Directions | None) -> Directions | None:
        if old is None:
            return None
        return old._replace(seed=jnp.where(is_cleared, NONE, old.seed))

    return tuple(clear(old) for old in before)
