"""What computes a site: one protocol, and its implementations in order of preference.

The first backend of `BACKENDS` that serves a site computes it; the last one serves everything. To
add one, write a class with the methods of `SiteBackend` and insert an instance; to keep it here,
list what it does not serve in `tests/bridge/test_backends.py`, which holds every backend to the
rule.

>>> class Mine(Reference):
...     name = "mine"
...
...     def serves(self, plan, adapters, x):
...         return x.shape[-1] == 12345
>>> BACKENDS.insert(0, Mine())
>>> [backend.name for backend in BACKENDS]
['mine', 'triton', 'dense_cpu', 'reference']
>>> del BACKENDS[0]
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
