"""Small networks that can grow at a seed.

A blueprint is a value: make one with a factory and hand it to `esper_fn.Growth`. One of your own
is a `Blueprint` with your `init`, `apply` and `cost`; `check` tells whether it keeps the contract.
"""

from esper_fn.blueprints._base import (
    TOPOLOGIES,
    AdapterSpec,
    ApplyAdapter,
    Blueprint,
    Cost,
    CostAdapter,
    InitAdapter,
    InitAlong,
    Topology,
)
from esper_fn.blueprints._bottleneck import bottleneck
from esper_fn.blueprints._check import check
from esper_fn.blueprints._dense import gated, low_rank, noop, normalised, scale_shift
from esper_fn.blueprints._spatial import (
    bottleneck_conv,
    depthwise_conv,
    self_attention,
    squeeze_excite,
)

__all__ = [
    "TOPOLOGIES",
    "AdapterSpec",
    "ApplyAdapter",
    "Blueprint",
    "Cost",
    "CostAdapter",
    "InitAdapter",
    "InitAlong",
    "Topology",
    "bottleneck",
    "bottleneck_conv",
    "check",
    "depthwise_conv",
    "gated",
    "low_rank",
    "noop",
    "normalised",
    "scale_shift",
    "self_attention",
    "squeeze_excite",
]
