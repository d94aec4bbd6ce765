"""Alpha schedules: how an adapter is blended into the host during GRAFTING.

A schedule is a value, an `AlphaSchedule`: make one with a factory and hand it to a growth as
`graft=`. One of your own is an `AlphaSchedule` with your `init` and `update`; `check` tells whether
it keeps the contract.
"""

from esper_fn.grafting._base import AlphaSchedule, Init, Observation, Update
from esper_fn.grafting._check import check
from esper_fn.grafting._schedules import (
    adaptive,
    drift_controlled,
    grad_norm_gated,
    linear,
    momentum,
    stability,
)

__all__ = [
    "AlphaSchedule",
    "Init",
    "Observation",
    "Update",
    "adaptive",
    "check",
    "drift_controlled",
    "grad_norm_gated",
    "linear",
    "momentum",
    "stability",
]
