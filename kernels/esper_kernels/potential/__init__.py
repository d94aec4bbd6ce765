"""How much a chunk's gradient could gain from an adapter: the size of `x^T dy` per chunk.

    potential_c = sum_fg (sum_n x[n, f] dy[n, g])^2        f, g in chunk c

(the raw score of GradMax: Evci et al., ICLR 2022). `esper_kernels.potential.jax` and
`esper_kernels.potential.torch` are its two faces.
"""

from esper_kernels.potential._case import PotentialCase, check

__all__ = ["PotentialCase", "check"]
