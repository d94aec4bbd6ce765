"""Trees with one entry a bank: site -> blueprint -> value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from esper_fn._layout._layout import Layout
from esper_fn._typing import Array, Bool, Params

BankTree = Mapping[str, Mapping[str, Any]]


def map_banks(function: Callable[..., Any], *trees: BankTree) -> dict[str, dict[str, Any]]:
    """`function` of the values of each bank.

    Args:
      function: of one value from each tree.
      *trees: all with the banks of the first one.

    >>> map_banks(lambda a, b: a + b, {"hidden": {"low_rank": 1}}, {"hidden": {"low_rank": 2}})
    {'hidden': {'low_rank': 3}}
    """
    return {
        site: {name: function(*(tree[site][name] for tree in trees)) for name in trees[0][site]}
        for site in trees[0]
    }


def bank_indices(layout: Layout) -> dict[str, dict[str, int]]:
    """The index of each bank in `layout.tables.banks`."""
    indices: dict[str, dict[str, int]] = {site.name: {} for site in layout.sites}
    for index, bank in enumerate(layout.tables.banks):
        indices[layout.sites[bank.site].name][layout.names[bank.blueprint]] = index
    return indices


def split_by_bank(layout: Layout, flat: Array) -> dict[str, dict[str, Array]]:
    """`[Q, ...]` as a tree of `[P, ...]`, in the shape of the adapters.

    Args:
      layout: the static layout.
      flat: one row a slot.
    """

    def rows(index: int) -> Array:
        bank = layout.tables.banks[index]
        return jax.lax.slice_in_dim(flat, bank.start, bank.start + bank.num_slots)

    return map_banks(rows, bank_indices(layout))


def join_banks(layout: Layout, tree: BankTree) -> Array:
    """The inverse of `split_by_bank`."""
    banks = layout.tables.banks
    rows = [tree[layout.sites[bank.site].name][layout.names[bank.blueprint]] for bank in banks]
    return jnp.concatenate(rows)


def select_slots(is_first: Bool[Array, "P"], first: Params, second: Params) -> Params:
    """The rows of `first` where `is_first`, else those of `second`; trees of `[P, ...]`."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(is_first.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, first, second)
