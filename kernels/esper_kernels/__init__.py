"""GPU kernels, one folder an operation, each beside its reference.

`esper_kernels.jax` holds the operations for JAX, `esper_kernels.torch` those for torch; neither
loads the other's framework, and this package loads none.
"""

from esper_kernels._dispatch import IMPLEMENTATIONS, Choice
from esper_kernels._errors import ArgumentError, KernelError, UnavailableError
from esper_kernels.graft import Adapter

__all__ = [
    "IMPLEMENTATIONS",
    "Adapter",
    "ArgumentError",
    "Choice",
    "KernelError",
    "UnavailableError",
]
