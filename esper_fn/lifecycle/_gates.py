"""The rules by which a seed moves on by itself: one table of edges, one table of gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._typing import Array, Bool, Scalar
from esper_fn.lifecycle._settings import Settings
from esper_fn.lifecycle._stages import Stage
from esper_fn.lifecycle._state import FAST_STEPS, SeedState, per_stage


class Gate(IntEnum):
    """What a seed waits for; the code of a refusal."""

    OPEN = 0
    MIN_STEPS = 1
    MAX_STEPS = 2
    TRAINING_PLACE = 3
    UTILITY_MEASURED = 4
    UTILITY_POSITIVE = 5
    UTILITY_SETTLED = 6
    ALPHA_FULL = 7
    LOSS_SETTLED = 8
    CONTRIBUTION_MEASURED = 9
    CONTRIBUTION_POSITIVE = 10
    CONTRIBUTION_NOT_POSITIVE = 11
    CONTRIBUTION_HIGH = 12
    STABILITY_HIGH = 13
    ERRORS_MANY = 14
    EMBARGO_OVER = 15
    NON_FINITE = 16
    QUARANTINED = 17
    PAUSED = 18
    """A command holds the seed; of no edge."""
    ACTS_AT_ONCE = 19
    """The settings let adapters act from their first step."""
    TRAINS_FIRST = 20
    """The settings send adapters through TRAINING."""
    CONTRIBUTION_UNKNOWN = 21
    """Too few surveys in this stage for a verdict, and none that speaks against the seed."""


class Cause(IntEnum):
    """Why a seed changed its stage in this step."""

    NONE = 0
    COMMAND = 1
    POLICY = 2
    NON_FINITE = 3
    GOVERNOR = 4
    GATE = 5
    """Every gate of a regular edge was open."""
    DWELL_LIMIT = 6
    """The longest stay in the stage was over."""
    MEASURED_WORTHLESS = 7
    ERRORS = 8


class Signals(NamedTuple):
    """What a step measured that is not already averaged in the seed's row."""

    has_error: Bool[Array, "S"]
    """The adapter produced something non-finite from finite input in this step."""
    is_quarantined: Bool[Array, "S"]
    """The governor asks for this seed's roll-back."""
    loss_variation: Scalar
    """Relative gap between the fast and the slow average of the training loss; infinite where it
    is not known yet."""
    has_training_place: Bool[Array, "S"]


Test = Callable[[SeedState, Signals, Settings], Bool[Array, "S"]]


def _is_utility_settled(seeds: SeedState, signals: Signals, limits: Settings) -> Bool[Array, "S"]:
    fast, slow = seeds.telemetry.utility, seeds.telemetry.utility_slow
    variation = jnp.abs(fast - slow) / (jnp.abs(slow) + 1e-12)
    is_known = seeds.telemetry.num_live_steps > FAST_STEPS
    return is_known & (variation <= limits.utility_variation)


def _longest_stay_over(seeds: SeedState, signals: Signals, limits: Settings) -> Bool[Array, "S"]:
    longest = per_stage(limits.max_steps, seeds.stage)
    return (longest > 0) & (seeds.steps_in_stage >= longest)


TESTS: Mapping[Gate, Test] = MappingProxyType(
    {
        Gate.MIN_STEPS: lambda s, _, t: s.steps_in_stage >= per_stage(t.min_steps, s.stage),
        Gate.MAX_STEPS: _longest_stay_over,
        Gate.TRAINING_PLACE: lambda s, m, t: m.has_training_place,
        Gate.UTILITY_MEASURED: lambda s, m, t: s.telemetry.num_live_steps > 0,
        Gate.UTILITY_POSITIVE: lambda s, m, t: s.telemetry.utility > 0,
        Gate.UTILITY_SETTLED: _is_utility_settled,
        Gate.ALPHA_FULL: lambda s, m, t: s.alpha >= 1,
        Gate.LOSS_SETTLED: lambda s, m, t: jnp.broadcast_to(
            m.loss_variation <= t.loss_variation, s.stage.shape
        ),
        Gate.CONTRIBUTION_MEASURED: lambda s, m, t: s.num_contributions >= t.min_surveys,
        Gate.CONTRIBUTION_POSITIVE: lambda s, m, t: s.contribution > 0,
        Gate.CONTRIBUTION_NOT_POSITIVE: lambda s, m, t: s.contribution <= 0,
        Gate.CONTRIBUTION_HIGH: lambda s, m, t: s.contribution > t.min_contribution,
        Gate.STABILITY_HIGH: lambda s, m, t: s.stability >= t.min_stability,
        Gate.ERRORS_MANY: lambda s, m, t: s.error_count >= t.max_errors,
        Gate.EMBARGO_OVER: lambda s, m, t: s.embargo_steps <= 0,
        Gate.NON_FINITE: lambda s, m, t: m.has_error,
        Gate.QUARANTINED: lambda s, m, t: m.is_quarantined,
        Gate.ACTS_AT_ONCE: lambda s, m, t: jnp.broadcast_to(~t.train_first, s.stage.shape),
        Gate.TRAINS_FIRST: lambda s, m, t: jnp.broadcast_to(t.train_first, s.stage.shape),
        Gate.CONTRIBUTION_UNKNOWN: lambda s, m, t: (
            (s.num_contributions < t.min_surveys)
            & ((s.num_contributions == 0) | (s.contribution > 0))
        ),
    }
)


class Edge(NamedTuple):
    """A seed in `source` goes to `target` by itself once every gate is open."""

    source: Stage
    target: Stage
    gates: tuple[Gate, ...]
    cause: Cause


_ROLLED_BACK_FROM = (
    Stage.TRAINING,
    Stage.GRAFTING,
    Stage.STABILIZATION,
    Stage.EVALUATING,
    Stage.FINE_TUNING,
)

GUARD_EDGES: tuple[Edge, ...] = (
    *(Edge(s, Stage.ROLLED_BACK, (Gate.NON_FINITE,), Cause.NON_FINITE) for s in _ROLLED_BACK_FROM),
    *(Edge(s, Stage.ROLLED_BACK, (Gate.QUARANTINED,), Cause.GOVERNOR) for s in _ROLLED_BACK_FROM),
    Edge(Stage.GERMINATED, Stage.CANCELLED, (Gate.NON_FINITE,), Cause.NON_FINITE),
    Edge(Stage.GERMINATED, Stage.CANCELLED, (Gate.QUARANTINED,), Cause.GOVERNOR),
)
"""Edges that nothing overrides, neither a command nor a policy."""

_UTILITY = (Gate.UTILITY_MEASURED, Gate.UTILITY_POSITIVE)

EDGES: tuple[Edge, ...] = (
    # The first edge of a stage that the settings allow is its way forward: its first closed gate is
    # why a seed waits.
    Edge(Stage.GERMINATED, Stage.GRAFTING, (Gate.ACTS_AT_ONCE, Gate.MIN_STEPS), Cause.GATE),
    Edge(
        Stage.GERMINATED,
        Stage.TRAINING,
        (Gate.TRAINS_FIRST, Gate.MIN_STEPS, Gate.TRAINING_PLACE),
        Cause.GATE,
    ),
    Edge(Stage.GERMINATED, Stage.CANCELLED, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
    Edge(
        Stage.TRAINING,
        Stage.GRAFTING,
        (Gate.MIN_STEPS, *_UTILITY, Gate.UTILITY_SETTLED),
        Cause.GATE,
    ),
    Edge(Stage.TRAINING, Stage.GRAFTING, (Gate.MAX_STEPS, *_UTILITY), Cause.DWELL_LIMIT),
    Edge(Stage.TRAINING, Stage.CULLED, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
    Edge(Stage.GRAFTING, Stage.STABILIZATION, (Gate.MIN_STEPS, Gate.ALPHA_FULL), Cause.GATE),
    Edge(Stage.GRAFTING, Stage.CULLED, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
    Edge(Stage.STABILIZATION, Stage.EVALUATING, (Gate.MIN_STEPS, Gate.LOSS_SETTLED), Cause.GATE),
    Edge(Stage.STABILIZATION, Stage.EVALUATING, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
    Edge(
        Stage.EVALUATING,
        Stage.FINE_TUNING,
        (
            Gate.MIN_STEPS,
            Gate.CONTRIBUTION_MEASURED,
            Gate.CONTRIBUTION_POSITIVE,
            Gate.STABILITY_HIGH,
        ),
        Cause.GATE,
    ),
    Edge(
        Stage.EVALUATING,
        Stage.CULLED,
        (Gate.MIN_STEPS, Gate.CONTRIBUTION_MEASURED, Gate.CONTRIBUTION_NOT_POSITIVE),
        Cause.MEASURED_WORTHLESS,
    ),
    Edge(Stage.EVALUATING, Stage.CULLED, (Gate.ERRORS_MANY,), Cause.ERRORS),
    # What nothing speaks against is not removed: without surveys an adapter goes on to the end.
    Edge(
        Stage.EVALUATING,
        Stage.FINE_TUNING,
        (Gate.MAX_STEPS, Gate.CONTRIBUTION_UNKNOWN),
        Cause.DWELL_LIMIT,
    ),
    Edge(Stage.EVALUATING, Stage.CULLED, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
    Edge(
        Stage.FINE_TUNING,
        Stage.FOSSILIZED,
        (Gate.MIN_STEPS, Gate.CONTRIBUTION_MEASURED, Gate.CONTRIBUTION_HIGH),
        Cause.GATE,
    ),
    Edge(
        Stage.FINE_TUNING,
        Stage.CULLED,
        (Gate.MIN_STEPS, Gate.CONTRIBUTION_MEASURED, Gate.CONTRIBUTION_NOT_POSITIVE),
        Cause.MEASURED_WORTHLESS,
    ),
    Edge(
        Stage.FINE_TUNING,
        Stage.FOSSILIZED,
        (Gate.MAX_STEPS, Gate.CONTRIBUTION_UNKNOWN),
        Cause.DWELL_LIMIT,
    ),
    Edge(Stage.FINE_TUNING, Stage.CULLED, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
    Edge(Stage.CULLED, Stage.DORMANT, (Gate.EMBARGO_OVER,), Cause.GATE),
    Edge(Stage.CANCELLED, Stage.DORMANT, (Gate.EMBARGO_OVER,), Cause.GATE),
    Edge(Stage.ROLLED_BACK, Stage.DORMANT, (Gate.MAX_STEPS,), Cause.DWELL_LIMIT),
)
"""In order of precedence: the first edge of the seed's stage whose gates are all open is taken."""

OPTIONS = frozenset({Gate.ACTS_AT_ONCE, Gate.TRAINS_FIRST})
"""Gates that the settings alone open: the edges behind the others are not a stage's way forward."""
