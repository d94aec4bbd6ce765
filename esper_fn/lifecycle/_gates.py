"""The rules by which a seed moves on by itself: one table of edges, one table of gates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_counts, check_numbers, described
from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int32, Scalar
from esper_fn.lifecycle._stages import ACTS, NUM_STAGES, Stage, as_stage
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


@record
class Settings(NamedTuple):
    """Thresholds of the gates: arrays in the state, so tuning one never recompiles."""

    min_steps: Int32[Array, "11"]
    max_steps: Int32[Array, "11"]
    """Longest stay; 0 means for ever (DORMANT, FOSSILIZED) or until the embargo is over (CULLED,
    CANCELLED). That of ROLLED_BACK is the quarantine."""
    max_training: Int32[Array, ""]
    """Seeds that may be in TRAINING at once."""
    embargo_steps: Int32[Array, ""]
    max_errors: Int32[Array, ""]
    utility_variation: Float32[Array, ""]
    """Largest relative gap between the fast and the slow utility average that counts as settled."""
    loss_variation: Float32[Array, ""]
    """The same for the training loss."""
    min_stability: Float32[Array, ""]
    min_contribution: Float32[Array, ""]
    """What a seed must be worth (in units of the loss) to be kept for good."""
    min_surveys: Int32[Array, ""]
    """Ablations a verdict needs."""
    train_first: Bool[Array, ""]
    """Whether adapters learn in TRAINING, behind the host, before they act."""
    trust: Float32[Array, ""]
    """Size of an adapter's output, as a share of its chunk's, to which TRAINING leads at most."""
    is_frozen: Bool[Array, "11"]
    """Stages whose adapters stand still."""


_MIN_STEPS: Mapping[Stage, int] = MappingProxyType(
    {
        Stage.GERMINATED: 1,
        Stage.TRAINING: 30,
        Stage.STABILIZATION: 20,
        Stage.EVALUATING: 5,
        Stage.FINE_TUNING: 50,
    }
)
_MAX_STEPS: Mapping[Stage, int] = MappingProxyType(
    {
        Stage.GERMINATED: 500,
        Stage.TRAINING: 150,
        Stage.GRAFTING: 600,
        Stage.STABILIZATION: 150,
        Stage.EVALUATING: 400,
        Stage.FINE_TUNING: 600,
    }
)

_UNLIMITED = np.iinfo(np.int32).max


def settings(
    *,
    min_steps: Mapping[Stage, int] | None = None,
    max_steps: Mapping[Stage, int] | None = None,
    max_training: int | None = None,
    embargo_steps: int = 100,
    quarantine_steps: int | None = 500,
    max_errors: int = 3,
    utility_variation: float = 0.25,
    loss_variation: float = 0.05,
    min_stability: float = 0.8,
    min_contribution: float = 0.0,
    min_surveys: int = 2,
    train_first: bool = False,
    trust: float = 0.1,
    freeze: Collection[Stage] = (),
) -> Settings:
    """The gates' thresholds.

    An adapter is the identity when it is born, so by default it acts from its first step
    (GERMINATED is followed by GRAFTING) and learns from a loss that answers to it, in every stage
    until it is judged and after. With `train_first` it learns in TRAINING before, while the host
    stays as it is, bit for bit. There the loss does not answer to its output `r`; so it descends
    `<dy, r> + damping/2 |r|^2` with `damping = |dy| / (trust |x|)`, at whose minimum `|r|` is at
    most `trust` times the size of its chunk `x`.

    Args:
      min_steps: shortest stays, of the stages to change, in training steps.
      max_steps: longest stays, of the stages to change, in training steps.
      max_training: seeds that may be in TRAINING at once; None for as many as have a slot.
      embargo_steps: training steps from a removal until the seed may germinate again.
      quarantine_steps: training steps from a roll-back until the seed may germinate again; with
        None it waits for `commands.release`, which ends a quarantine at any time.
      max_errors: non-finite measurements after which an adapter in EVALUATING is removed.
      utility_variation: largest relative gap between the fast and the slow utility average that
        counts as settled.
      loss_variation: the same for the training loss.
      min_stability: share of calm steps, in [0, 1], that an adapter in EVALUATING must show.
      min_contribution: fall of the held-out loss that an adapter must be worth to be kept for good.
      min_surveys: ablations that a verdict needs.
      train_first: whether adapters learn behind the host before they act.
      trust: see above.
      freeze: stages in which adapters stand still: some of GRAFTING, STABILIZATION, EVALUATING,
        FINE_TUNING and FOSSILIZED.

    Returns:
      The settings, arrays that are part of the state: changing one never recompiles.

    Raises:
      TypeError: an argument that is no number, or no dictionary or list of stages.
      UnknownNameError: a stage that is none, its name as a string for instance.
      ValueError: a stay that is negative, a longest stay shorter than the shortest, no longest
        stay for a stage that holds an adapter on its way (a seed could hang there for ever), a stay
        for any other stage, a count that is too small to mean anything, a `trust` that is not
        positive, or a stage to freeze in which adapters do not act.

    >>> int(settings(max_steps={Stage.TRAINING: 500}).max_steps[Stage.TRAINING])
    500
    """
    shortest = np.zeros(NUM_STAGES, np.int32)
    longest = np.zeros(NUM_STAGES, np.int32)
    for argument, target, usual, values in (
        ("min_steps", shortest, _MIN_STEPS, min_steps),
        ("max_steps", longest, _MAX_STEPS, max_steps),
    ):
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(
                f"{argument} must be a dict of stages and steps, `{{Stage.TRAINING: 50}}` for "
                f"instance, got {described(values)}"
            )
        for stage, value in {**usual, **(values or {})}.items():
            known = as_stage(stage, argument)
            check_counts(**{f"{argument}[{known.name}]": value})
            target[known] = value
    for stage in Stage:
        if shortest[stage] < 0 or longest[stage] < 0:
            raise ValueError(f"the stay in {stage.name} must not be negative")
        if stage in _MAX_STEPS and not max(shortest[stage], 1) <= longest[stage]:
            raise ValueError(
                f"max_steps[{stage.name}] is {longest[stage]} but must be at least 1 and at least "
                f"min_steps[{stage.name}] = {shortest[stage]}: every such stage has to end"
            )
        if stage not in _MAX_STEPS and (shortest[stage] or longest[stage]):
            raise ValueError(
                f"{stage.name} ends by no dwell; leave it out of min_steps and max_steps, which "
                f"serve {[of.name for of in _MAX_STEPS]} (for ROLLED_BACK set quarantine_steps)"
            )
    for name, value, least in (
        ("max_training", 1 if max_training is None else max_training, 1),
        ("embargo_steps", embargo_steps, 0),
        ("quarantine_steps", 1 if quarantine_steps is None else quarantine_steps, 1),
        ("max_errors", max_errors, 1),
        ("min_surveys", min_surveys, 1),
    ):
        check_counts(**{name: value})
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")
    check_numbers(
        utility_variation=utility_variation,
        loss_variation=loss_variation,
        min_stability=min_stability,
        min_contribution=min_contribution,
        trust=trust,
    )
    if not isinstance(train_first, int | np.bool_ | np.ndarray | jnp.ndarray):
        raise TypeError(f"train_first must be True or False, got {described(train_first)}")
    if not trust > 0:
        raise ValueError(f"trust must be positive, got {trust!r}")
    if isinstance(freeze, str) or not isinstance(freeze, Collection):
        raise TypeError(
            f"freeze must be a list of stages, `freeze=[Stage.FOSSILIZED]` for instance, got "
            f"{freeze!r}"
        )
    acting = [stage for stage in Stage if ACTS[stage]]
    frozen = [as_stage(stage, "freeze") for stage in freeze]
    for stage in frozen:
        if stage not in acting:
            raise ValueError(f"freeze may name {[one.name for one in acting]}, got {stage!r}")
    longest[Stage.ROLLED_BACK] = quarantine_steps or 0
    return Settings(
        min_steps=jnp.asarray(shortest),
        max_steps=jnp.asarray(longest),
        max_training=jnp.int32(_UNLIMITED if max_training is None else max_training),
        embargo_steps=jnp.int32(embargo_steps),
        max_errors=jnp.int32(max_errors),
        utility_variation=jnp.float32(utility_variation),
        loss_variation=jnp.float32(loss_variation),
        min_stability=jnp.float32(min_stability),
        min_contribution=jnp.float32(min_contribution),
        min_surveys=jnp.int32(min_surveys),
        train_first=jnp.bool_(train_first),
        trust=jnp.float32(trust),
        is_frozen=jnp.asarray(np.isin(np.arange(NUM_STAGES), [int(one) for one in frozen])),
    )


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
