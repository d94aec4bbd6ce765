"""The operations for JAX. Loads no torch."""

from esper_kernels.graft.jax import (
    backward,
    backward_in_place,
    explain,
    forward,
    forward_in_place,
    graft,
)

__all__ = [
    "backward",
    "backward_in_place",
    "explain",
    "forward",
    "forward_in_place",
    "graft",
]
