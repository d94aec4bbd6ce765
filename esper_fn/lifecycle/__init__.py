"""The life of a seed: its stages, the table of transitions, gates and their thresholds.

>>> from esper_fn.lifecycle import TRANSITIONS, Stage
>>> bool(TRANSITIONS[Stage.DORMANT, Stage.GERMINATED])
True
"""

from esper_fn.lifecycle._gates import EDGES, GUARD_EDGES, Cause, Edge, Gate
from esper_fn.lifecycle._loss import LossTrack
from esper_fn.lifecycle._settings import Settings, settings
from esper_fn.lifecycle._stages import (
    ACTS,
    NUM_STAGES,
    ON_ITS_WAY,
    OWNS_ADAPTER,
    TRANSITIONS,
    Stage,
)
from esper_fn.lifecycle._state import FAST_STEPS, NONE, Seed, SeedState, Telemetry, is_in

__all__ = [
    "ACTS",
    "EDGES",
    "FAST_STEPS",
    "GUARD_EDGES",
    "NONE",
    "NUM_STAGES",
    "ON_ITS_WAY",
    "OWNS_ADAPTER",
    "TRANSITIONS",
    "Cause",
    "Edge",
    "Gate",
    "LossTrack",
    "Seed",
    "SeedState",
    "Settings",
    "Stage",
    "Telemetry",
    "is_in",
    "settings",
]
