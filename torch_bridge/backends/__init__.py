"""What computes a site: one protocol, and its implementations in order of preference.

`BACKENDS` is asked from the front; the last one, the definition, serves everything. To add one,
write a class with the methods of `SiteBackend`, put an instance into `BACKENDS` and its name into
`tests/bridge/test_backends.py`, which holds every backend to the definition.
"""

from torch_bridge.backends._base import Adapters, Residual, SiteBackend, SiteGradients
from torch_bridge.backends._dense_cpu import DenseCpu
from torch_bridge.backends._passes import BACKENDS, backward, forward, select
from torch_bridge.backends._reference import Reference
from torch_bridge.backends._triton import Triton

__all__ = [
    "BACKENDS",
    "Adapters",
    "DenseCpu",
    "Reference",
    "Residual",
    "SiteBackend",
    "SiteGradients",
    "Triton",
    "backward",
    "forward",
    "select",
]
