"""Where a run's batches come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from esper_fn._arguments import describe
from esper_fn._order import batch_indices

Batches = Callable[[int, int], Any]
"""`batches(first_step, count)`: a pytree of arrays with a leading axis of `count` steps."""


def array_batches(
    inputs: Any, targets: Any, *, batch_size: int, num_steps: int, seed: int
) -> Batches:
    """Batches `(inputs, targets)` drawn from arrays in memory, epoch by epoch without replacement.

    Args:
      inputs: `[N, ...]`.
      targets: `[N, ...]`.
      batch_size: examples a step.
      num_steps: of the whole run.
      seed: of the order.

    Returns:
      `batches(first_step, count)`, a function of the step, so a run that goes on gets the same.
    """
    order = batch_indices(inputs, targets, batch_size=batch_size, num_steps=num_steps, seed=seed)

    def take(first: int, count: int) -> Any:
        rows = order[first : first + count]
        return inputs[rows], targets[rows]

    return take


def checked_batches(batches: Batches) -> Batches:
    """The same, which raises `ValueError` where it returns another number of steps.

    Raises:
      TypeError: it is no function.
    """
    if not callable(batches):
        raise TypeError(
            "batches must be a function of (first_step, count), which `runtime.array_batches` "
            f"makes of arrays, got {describe(batches)}"
        )

    def take(first: int, count: int) -> Any:
        batch = batches(first, count)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if np.ndim(leaf) == 0 or np.shape(leaf)[0] != count:
                raise ValueError(
                    f"batches({first}, {count}) must give arrays with a leading axis of {count} "
                    f"steps, got shape {np.shape(leaf)} at batch{jax.tree_util.keystr(path)}; has "
                    "it fewer steps than the run?"
                )
        return batch

    return take
