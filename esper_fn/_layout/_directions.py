"""What a survey remembers for adapters to come."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._layout._layout import Bank, Layout, serves
from esper_fn._records import record
from esper_fn._sites import Site
from esper_fn._typing import Array, Bool, Float32, Int32
from esper_fn.lifecycle import NONE


@record
class Directions(NamedTuple):
    """Where adapters of a few seeds of one site may begin to look, one row a layer."""

    seed: Int32[Array, "L N"]
    """Whose directions these are, or `NONE`."""
    along: Float32[Array, "L N F U"]
    """Columns for a first matrix (`esper_fn.base.InitAlong`); whatever, where `seed` is nobody."""


Memory = tuple[Directions | None, ...]
"""One entry a site; None where no blueprint that serves it is born along directions."""


def has_directed(layout: Layout, site: Site) -> bool:
    """Whether some blueprint at the site is born along directions."""
    return any(b.init_along is not None and serves(b, site) for b in layout.blueprints)


def no_directions(layout: Layout, num_seeds: int, num_directions: int) -> Memory:
    """An empty memory.

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


def of_slots(
    bank: Bank, owner: Int32[Array, "Q"], memory: Directions
) -> tuple[Bool[Array, "P"], Float32[Array, "P F U"]]:
    """Which slots of a bank belong to a remembered seed, and its directions; some row elsewhere."""
    here = owner[bank.start : bank.start + bank.num_slots]
    is_own = (here[:, None] == memory.seed.reshape(1, -1)) & (here != NONE)[:, None]
    rows = memory.along.reshape(-1, *memory.along.shape[2:])
    return jnp.any(is_own, axis=1), rows[jnp.argmax(is_own, axis=1)]
