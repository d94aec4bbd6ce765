"""The operations for torch. Loads no JAX."""

from esper_kernels.graft.torch import Calls, bind, explain, graft, watch

__all__ = ["Calls", "bind", "explain", "graft", "watch"]
