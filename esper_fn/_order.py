"""Random orders of examples that stay the same in every release of numpy.

Numpy promises the raw stream of a bit generator for good, but not the permutations that
`numpy.random.Generator` draws from it, so an order here is the order of raw 64-bit numbers.
"""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from jaxtyping import Int32


def batch_indices(
    inputs: Sized, targets: Sized, *, batch_size: int, num_steps: int, seed: int
) -> Int32[np.ndarray, "num_steps batch_size"]:
    """Draws the examples of each training step, epoch by epoch without replacement.

    Epochs of `N` shuffled indices follow each other without a gap and are cut into batches: no
    example comes twice in an epoch, none is left out, and a batch may reach from one epoch into
    the next. More steps only append rows.

    Args:
      inputs: `N` examples; only their number is read.
      targets: `N` targets; only their number is read.
      batch_size: examples a step, at least 1.
      num_steps: training steps, at least 0.
      seed: at least 0; the same seed gives the same batches everywhere.

    Returns:
      Indices into the first axis of `inputs`.

    Raises:
      ValueError: A size is out of bounds, or inputs and targets differ in number.

    >>> steps = batch_indices(range(6), range(6), batch_size=3, num_steps=4, seed=0)
    >>> steps.shape, sorted(steps[:2].ravel().tolist())
    ((4, 3), [0, 1, 2, 3, 4, 5])
    """
    num_examples = len(inputs)
    if len(targets) != num_examples or not num_examples:
        raise ValueError(
            f"inputs hold {num_examples} examples and targets {len(targets)}; they must be as "
            f"many, and at least 1."
        )
    for argument, value, least in (
        ("batch_size", batch_size, 1),
        ("num_steps", num_steps, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{argument}={value} must be at least {least}.")
    num_epochs = -(-num_steps * batch_size // num_examples)
    raw = np.random.PCG64(seed).random_raw(num_epochs * num_examples)
    epochs = raw.reshape(num_epochs, num_examples).argsort(axis=1, kind="stable")
    indices = epochs.ravel()[: num_steps * batch_size]
    return indices.reshape(num_steps, batch_size).astype(np.int32)
