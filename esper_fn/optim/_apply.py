"""Adding updates to parameters of all kinds."""

from __future__ import annotations

import optax

from esper_fn._leaves import check_leaves, combine, filter_like, partition
from esper_fn._typing import Params


def apply_updates(params: Params, updates: Params) -> Params:
    """Adds updates to the parameters that learn, as `optax.apply_updates`, and leaves the others.

    Whole numbers, flags and random keys among the parameters have no gradient, and nothing can be
    added to a key.

    Args:
      params: any tree of arrays and numbers, `(params, state.adapters)` for instance.
      updates: of an optimiser, the same tree; what it holds for leaves that do not learn is not
        read.

    Returns:
      The new parameters, in the dtypes of the old ones.

    Raises:
      TypeError: a leaf of `params` is neither array nor number.

    >>> import jax.numpy as jnp
    >>> after = apply_updates({"w": jnp.ones(2), "n": 3}, {"w": jnp.ones(2), "n": 0})
    >>> after["w"].tolist(), after["n"]
    ([2.0, 2.0], 3)
    """
    check_leaves("params", params)
    learning, still = partition(params)
    return combine(optax.apply_updates(learning, filter_like(updates, params)), still)
