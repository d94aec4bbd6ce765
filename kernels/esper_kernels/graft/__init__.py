"""One site of a growing network: forward with statistics, and backward. See the README here.

`esper_kernels.graft.jax` and `esper_kernels.graft.torch` are its two faces.
"""

from esper_kernels._records import ACTIVATIONS, Activation, Adapter
from esper_kernels.graft._case import Case, check

__all__ = ["ACTIVATIONS", "Activation", "Adapter", "Case", "check"]
