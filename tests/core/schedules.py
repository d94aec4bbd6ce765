"""The six alpha schedules, with the same number of steps, and what their tests share."""

from __future__ import annotations

import esper_fn as ef

NAMES = ("linear", "drift_controlled", "momentum", "adaptive", "stability", "grad_norm_gated")
MONOTONE = ("linear", "drift_controlled", "momentum", "grad_norm_gated")
NUM_STEPS = 50
SCHEDULES = {name: getattr(ef.grafting, name)(NUM_STEPS) for name in NAMES}
LARGEST = dict.fromkeys(NAMES, 1 / NUM_STEPS) | dict.fromkeys(
    ("momentum", "adaptive"), 3 / NUM_STEPS
)
