"""The operations for JAX. Loads no torch."""

from esper_kernels.graft.jax import backward, explain, forward, forward_in_place, graft
from esper_kernels.potential.jax import potential

__all__ = ["backward", "explain", "forward", "forward_in_place", "graft", "potential"]
