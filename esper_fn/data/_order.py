"""Shuffles that stay the same in every numpy release, and what is built from them.

Numpy promises the raw stream of a bit generator for good, but not the permutations that
``numpy.random.Generator`` draws from it, so an order here is the order of raw 64-bit numbers.
"""

from collections.abc import Sized

import numpy as np
from jaxtyping import Int32, Integer


def batch_indices(
    inputs: Sized, targets: Sized, *, batch_size: int, num_steps: int, seed: int
) -> Int32[np.ndarray, "num_steps batch_size"]:
    """Return which examples each training step takes.

    Epochs of ``N`` shuffled indices follow each other without a gap and are cut into batches:
    no example comes twice in an epoch, none is left out, and a batch may reach from one epoch into
    the next. More steps only append rows.

    Args:
        inputs: ``N`` examples; only their number is read.
        targets: As many targets.
        batch_size: Examples in a step, at least 1.
        num_steps: Training steps, at least 0.
        seed: At least 0; the same seed gives the same batches everywhere.

    Returns:
        Indices into the first axis of ``inputs``.

    Raises:
        ValueError: When a size is out of bounds, or inputs and targets differ in number.

    Example:
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
    taken = epochs.ravel()[: num_steps * batch_size]
    return taken.reshape(num_steps, batch_size).astype(np.int32)


def stratified_split(
    labels: Integer[np.ndarray, "N"], *, num_held_out: int, seed: int
) -> tuple[Int32[np.ndarray, "A"], Int32[np.ndarray, "B"]]:
    """Split examples in two so that each class keeps its share to within one example.

    Class ``k`` with ``n_k`` examples gives ``floor(n_k B / N)`` to the held-out part; the places
    that rounding leaves open go to the largest remainders.

    Args:
        labels: The class of each example.
        num_held_out: ``B``, between 1 and ``N - 1``.
        seed: At least 0; the same seed gives the same split everywhere.

    Returns:
        The indices kept (``A = N - B``) and those held out, both ascending and disjoint.

    Raises:
        ValueError: When ``num_held_out`` is out of bounds.
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
    kept, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return kept.astype(np.int32), held_out.astype(np.int32)
