"""The operations for JAX. Loads no torch."""

from esper_kernels.graft.jax import (
    backward,
    backward_in_place,
    explain,
    forward,
    forward_in_place,
    graft,
)
from esper_kernels.potential.jax import explain as explain_potential
from esper_kernels.potential.jax import potential

__all__ = [
    "backward",
    "backward_in_place",
    "explain",
    "explain_potential",
    "forward",
    "forward_in_place",
    "graft",
    "potential",
]
