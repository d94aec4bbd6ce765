"""The operations for torch. Loads no JAX."""

from esper_kernels.graft.torch import Calls, bind, explain, graft, graft_, watch
from esper_kernels.potential.torch import explain as explain_potential
from esper_kernels.potential.torch import potential

__all__ = ["Calls", "bind", "explain", "explain_potential", "graft", "graft_", "potential", "watch"]
