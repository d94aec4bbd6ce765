"""The operations for torch. Loads no JAX."""

from esper_kernels.graft._analysis import analyse_kernels_once
from esper_kernels.graft.torch import Calls, bind, explain, graft, watch

__all__ = ["Calls", "analyse_kernels_once", "bind", "explain", "graft", "watch"]
