"""Governors: the guard against non-finite losses, divergence and drift, outside every policy.

A governor is a value, a `Governor`: make one with a factory and hand it to a growth as `governor=`.
One of your own is a `Governor` with your `init` and `update`; `check` tells whether it keeps the
contract.
"""

from esper_fn.governors._base import Alarm, Governor, Init, Observation, Update, Verdict
from esper_fn.governors._check import check
from esper_fn.governors._standard import disabled, standard

__all__ = [
    "Alarm",
    "Governor",
    "Init",
    "Observation",
    "Update",
    "Verdict",
    "check",
    "disabled",
    "standard",
]
