"""What a growing network is made of, and what a step of it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from esper_fn import governors, grafting, policies
from esper_fn._layout import Layout
from esper_fn._records import record
from esper_fn._survey import SiteDirections
from esper_fn._typing import Adapters, Array, Bool, Float32, Int8, Int32, Key
from esper_fn.lifecycle import LossTrack, SeedState, Settings
from esper_fn.lifecycle._commands import Outcomes

LossFn = Callable[..., Any]


class Parts(NamedTuple):
    """What a step needs of a growth; static."""

    layout: Layout
    policy: policies.Policy
    grafts: tuple[grafting.AlphaSchedule, ...]
    governor: governors.Governor


@record
class GrowthState(NamedTuple):
    """Everything that grows, as one pytree."""

    seeds: SeedState
    adapters: Adapters
    owner: Int32[Array, "Q"]
    """The seed that holds each slot, or `NONE`."""
    generation: Int32[Array, "Q"]
    """Adapters born in each slot so far: by this number an optimiser knows a new one."""
    loss: LossTrack
    settings: Settings
    grafts: tuple[Any, ...]
    """The alpha schedules' states."""
    policy: Any
    governor: Any
    key: Key
    step: Int32[Array, ""]
    directions: SiteDirections | None = None
    """Directions for adapters to come, of the last survey; None without `directed_births`."""


class StepInfo(NamedTuple):
    """What happened in one step; nothing of it is needed for the next one."""

    loss: Float32[Array, ""]
    before: Int8[Array, "S"]
    """Stages at the start of the step."""
    stage: Int8[Array, "S"]
    """Stages after it."""
    cause: Int8[Array, "S"]
    """A `Cause` where the two differ."""
    waiting_for: Int8[Array, "S"]
    """The `Gate` that is closed on the seed's way forward."""
    evidence: Float32[Array, "S"]
    """The measurement the seed's stage is judged by: utility in TRAINING, alpha in GRAFTING, the
    loss variation in STABILIZATION, contribution in EVALUATING and FINE_TUNING, potential when
    DORMANT."""
    is_measured: Bool[Array, "S"]
    """Whether `evidence` is a measurement, which may be zero, or only not measured yet."""
    alpha: Float32[Array, "S"]
    blueprint: Int8[Array, "S"]
    request_code: Int8[Array, "S"]
    """A `Code` for what was asked of each seed, by command or policy."""
    requested_by: Int8[Array, "S"]
    """Index in `Policy.rules`, or `NONE`."""
    vetoed_by: Int8[Array, "S"]
    outcomes: Outcomes
    verdict: governors.Verdict
    steps_undone: Int32[Array, ""]
    """Steps that `rollback.update` undid; 0 for none, and from `Growth.update` itself."""
    num_live: Int32[Array, ""]
    """Adapters that compute in the next step."""
    num_parameters: Float32[Array, ""]
    """Parameters of adapters that act in the next step."""
    num_flops: Float32[Array, ""]
    """Forward operations of the live adapters on one example."""
    num_directed: Int32[Array, ""]
    """Adapters born along a survey's directions in this step."""
    num_barren: Int32[Array, ""]
    """Dormant seeds whose measured potential is exactly zero: their chunk is dead or no gradient
    reaches it, and no policy that goes by a measurement will ask for them."""
