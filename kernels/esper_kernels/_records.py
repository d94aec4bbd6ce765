"""The words of the rule that all packages share. Loads neither jax nor torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Activation = Literal["none", "relu", "gelu", "silu", "gated"]
"""What stands between the two matrices of an adapter; `gelu` is the one by tanh."""
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu", "silu", "gated")


class Adapter(NamedTuple):
    """The matrices of P slots, or their gradients; arrays of jax or of torch."""

    down: Any
    """[P, F, R]"""
    up: Any
    """[P, R, F]"""
    bias: Any = None
    """[P, R], or None"""
    gate: Any = None
    """[P, F, R] exactly for `gated`, else None"""


class Gains(NamedTuple):
    """The four gains of the rule, each a float32 array with one number a seed or a slot.

    For the chunk `x` an adapter writes to, its input `u`, its output `r` and the incoming gradient
    `dy`::

        y       = x + output_scale * r
        d theta = param_grad_scale * (d r / d theta)^T (dy + output_damping * r)
        d u     = input_grad_scale * (d r / d u)^T dy
    """

    output_scale: Any
    param_grad_scale: Any
    input_grad_scale: Any
    output_damping: Any

    @classmethod
    def from_columns(cls, columns: Any) -> Gains:
        """The gains of an array `[..., 4]`, the form in which they are stored and passed.

        >>> import numpy as np
        >>> Gains.from_columns(np.asarray([[1.0, 0.5, 1.0, 0.0]])).param_grad_scale.tolist()
        [0.5]
        """
        return cls(*(columns[..., index] for index in range(NUM_GAINS)))


class ForwardStatistics(NamedTuple):
    """What the forward pass measures of each chunk of the activation; sums over rows."""

    num_values: Any
    """Entries of the chunk seen; 0 means the site was not reached."""
    total: Any
    """Sum of x."""
    square: Any
    """Sum of x^2."""
    num_features: Any
    """Features times calls."""
    num_dead: Any
    """Features that were zero for a whole call."""


class BackwardStatistics(NamedTuple):
    """What the backward pass measures of each chunk; all but the first only of live adapters."""

    gradient_square: Any
    """Sum of dy^2."""
    num_live: Any
    """Calls in which the seed had an adapter at work."""
    output_square: Any
    """Sum of r^2."""
    utility: Any
    """Sum of -dy * r."""
    num_errors: Any
    """Calls in which finite input gave non-finite output or adapter gradients."""


class Statistics(NamedTuple):
    """What one step measured of each seed, summed over all calls of its site; float32 arrays.

    The fields of `ForwardStatistics`, then those of `BackwardStatistics`; stored as the columns
    of one array `[..., 10]`.
    """

    num_values: Any
    total: Any
    square: Any
    num_features: Any
    num_dead: Any
    gradient_square: Any
    num_live: Any
    output_square: Any
    utility: Any
    num_errors: Any

    @classmethod
    def from_columns(cls, columns: Any) -> Statistics:
        """The statistics of an array `[..., 10]`."""
        return cls(*(columns[..., index] for index in range(NUM_STATISTICS)))


NUM_GAINS = len(Gains._fields)
NUM_FORWARD_STATISTICS = len(ForwardStatistics._fields)
NUM_BACKWARD_STATISTICS = len(BackwardStatistics._fields)
NUM_STATISTICS = len(Statistics._fields)
