"""What a governor is."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np

from esper_fn._typing import Array, Bool, Float32, Int8
from esper_fn.lifecycle import LossTrack, SeedState


class Alarm(IntEnum):
    """What a governor sees in a step."""

    CALM = 0
    NON_FINITE_LOSS = 1
    DIVERGENCE = 2
    DRIFT = 3
    DATA_CHANGED = 4
    """The loss is high, but the last good parameters would do no better on these data."""


class Observation(NamedTuple):
    """What a governor may react to in a step."""

    seeds: SeedState
    loss: Float32[Array, ""]
    track: LossTrack
    """Averages of the loss, this step's included."""
    drift: Float32[Array, "S"]
    """`|change of the adapter| / |adapter|`, 0 where the adapter is zero."""
    reference_loss: Float32[Array, ""] | np.float32 = np.float32("nan")
    """The loss that the last good parameters have on the batch of this step; NaN where it was not
    measured. `esper_fn.rollback` measures it once the loss is elevated."""


class Verdict(NamedTuple):
    """What a governor orders; no policy and no command overrides it."""

    alarm: Int8[Array, ""]
    """An `Alarm`."""
    forbids_germination: Bool[Array, ""]
    """No seed germinates in this step."""
    should_roll_back: Bool[Array, ""]
    """The caller restores the last good parameters (`esper_fn.rollback`)."""
    is_quarantined: Bool[Array, "S"]
    """Seeds that are rolled back, and stay out for `settings(quarantine_steps=...)` steps or until
    a command releases them."""
    is_elevated: Bool[Array, ""] | np.bool_ = np.bool_(False)
    """The loss is too high, but not for long enough to be an alarm: no snapshot is taken."""


class Init(Protocol):
    """The state of a governor."""

    def __call__(self, num_seeds: int) -> Any:
        """Any pytree of arrays, thresholds included: a new value compiles nothing anew."""
        ...


class Update(Protocol):
    """One step of a governor."""

    def __call__(self, state: Any, observation: Observation) -> tuple[Any, Verdict]:
        """The next state, of the same shapes and dtypes, and the verdict on this step."""
        ...


class Governor(NamedTuple):
    """The guard that no policy overrides: `(init, update)`."""

    init: Init
    update: Update
