"""The leaves of a tree: which of them learn, and of which type they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import describe

LARGEST = float(np.finfo(np.float32).max)
"""In place of infinity in a state, which `jax_debug_infs` would take for a fault."""


def is_learned(leaf: Any) -> bool:
    """Whether a leaf has a gradient: whole numbers, flags and random keys have none."""
    return bool(jnp.issubdtype(_dtype(leaf), jnp.inexact))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def check_leaves(argument: str, tree: Any) -> None:
    """Raises `TypeError` where a leaf is neither array nor number, naming it."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise TypeError(
                f"{argument}{jax.tree_util.keystr(path)} must be an array or a number, got "
                f"{describe(leaf)}; keep what is neither out of the tree (with NNX "
                "`nnx.split(model, nnx.Param, ...)`)"
            )


def partition(tree: Any) -> tuple[Any, Any]:
    """The leaves that learn and those that do not, with None for the others."""
    return (
        jax.tree.map(lambda leaf: leaf if is_learned(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if is_learned(leaf) else leaf, tree),
    )


def filter_like(tree: Any, model: Any) -> Any:
    """The leaves of `tree` where the leaf of `model` learns, None elsewhere."""
    return jax.tree.map(lambda own, leaf: leaf if is_learned(own) else None, model, tree)


def combine(learning: Any, still: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, learning, still, is_leaf=lambda leaf: leaf is None
    )


def strengthen(tree: Any) -> Any:
    """The tree with arrays for numbers and no weak types: a step's result has none.

    A leaf whose type changes from one step to the next would compile the step anew.
    """

    def strengthen_leaf(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False):
            return leaf
        return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(_dtype(leaf)))

    return jax.tree.map(strengthen_leaf, tree)
