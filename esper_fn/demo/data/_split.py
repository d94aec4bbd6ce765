"""Splits labelled examples in a way that stays the same in every release of numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, Integer


def stratified_split(
    labels: Integer[np.ndarray, "N"], *, num_held_out: int, seed: int
) -> tuple[Int32[np.ndarray, "A"], Int32[np.ndarray, "B"]]:
    """Splits examples in two so that each class keeps its share to within one example.

    Class `k` with `n_k` examples gives `floor(n_k B / N)` to the held-out part; what
    rounding leaves over goes to the largest remainders.

    Args:
      labels: the class of each example.
      num_held_out: `B`, between 1 and `N - 1`.
      seed: at least 0; the same seed gives the same split everywhere.

    Returns:
      The indices of the rest (`A = N - B`) and of the held-out part, both ascending and disjoint.

    Raises:
      ValueError: `num_held_out` is out of bounds.
    """
    if not 0 < num_held_out < len(labels):
        raise ValueError(f"num_held_out={num_held_out} must be in [1, {len(labels) - 1}].")
    shuffled = np.random.PCG64(seed).random_raw(len(labels)).argsort(kind="stable")
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota, remainder = np.divmod(counts * num_held_out, len(labels))
    most_wanting = np.argsort(-remainder, kind="stable")[: num_held_out - quota.sum()]
    quota[most_wanting] += 1
    is_held_out = np.zeros(len(labels), bool)
    for k, share in enumerate(quota):
        members = shuffled[classes[shuffled] == k]
        is_held_out[members[:share]] = True
    rest, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return rest.astype(np.int32), held_out.astype(np.int32)
