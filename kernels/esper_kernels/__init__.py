"""GPU kernels, one folder an operation, each beside its reference.

`esper_kernels.jax` holds the operations for JAX, `esper_kernels.torch` those for torch; neither
loads the other's framework, and this package loads none. What both share is here: how a feature
axis is split (`Chunking`), the four gains of the rule, and the statistics that it measures.
"""

from esper_kernels._chunking import Chunking
from esper_kernels._dispatch import IMPLEMENTATIONS, Choice
from esper_kernels._errors import ArgumentError, KernelError, UnavailableError
from esper_kernels._records import (
    ACTIVATIONS,
    NUM_BACKWARD_STATISTICS,
    NUM_FORWARD_STATISTICS,
    NUM_GAINS,
    NUM_STATISTICS,
    Activation,
    Adapter,
    BackwardStatistics,
    ForwardStatistics,
    Gains,
    Statistics,
)

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "NUM_BACKWARD_STATISTICS",
    "NUM_FORWARD_STATISTICS",
    "NUM_GAINS",
    "NUM_STATISTICS",
    "Activation",
    "Adapter",
    "ArgumentError",
    "BackwardStatistics",
    "Choice",
    "Chunking",
    "ForwardStatistics",
    "Gains",
    "KernelError",
    "Statistics",
    "UnavailableError",
]
