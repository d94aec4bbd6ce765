"""The thresholds of the gates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_counts, check_numbers, describe
from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int32
from esper_fn.lifecycle._stages import ACTS, NUM_STAGES, Stage, as_stage


@record
class Settings(NamedTuple):
    """Thresholds of the gates: arrays in the state, so that a new value compiles nothing anew.

    An adapter is the identity when it is born, so by default it acts from its first step
    (GERMINATED is followed by GRAFTING) and learns from a loss that depends on it. With
    `train_first` it learns in TRAINING before it acts, while the host stays as it is, bit for bit.
    There the loss does not depend on its output `r`, so it descends
    `<dy, r> + damping/2 |r|^2` with `damping = |dy| / (trust |x|)`, at whose minimum `|r|` is at
    most `trust` times the size of its chunk `x`.
    """

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
    """Makes `Settings`; a step is a training step.

    Args:
      min_steps: shortest stays in stages, in steps; other stages keep their defaults.
      max_steps: longest stays in stages, in steps.
      max_training: number of seeds that may be in TRAINING at once; None for one a slot.
      embargo_steps: steps from a removal until the seed may germinate again.
      quarantine_steps: the same from a roll-back; None to wait for `commands.release`.
      max_errors: number of non-finite measurements that end EVALUATING.
      utility_variation: largest relative gap of the two utility averages that counts as settled.
      loss_variation: largest relative gap of the two loss averages that counts as settled.
      min_stability: share of calm steps, in [0, 1], that an adapter in EVALUATING must show.
      min_contribution: fall of the held-out loss for which an adapter is kept for good.
      min_surveys: number of ablations that a verdict needs.
      train_first: whether adapters learn behind the host before they act.
      trust: largest size of an adapter's output in TRAINING, as a share of its chunk's; positive.
      freeze: acting stages (GRAFTING to FOSSILIZED) in which adapters stand still.

    Raises:
      TypeError, ValueError: an argument of another kind, out of range, or no stage with a stay.

    >>> int(settings(max_steps={Stage.TRAINING: 500}).max_steps[Stage.TRAINING])
    500
    """
    shortest, longest = _stays(min_steps, max_steps)
    longest[Stage.ROLLED_BACK] = _whole("quarantine_steps", quarantine_steps, 1, 0)
    if not isinstance(train_first, int | np.bool_ | np.ndarray | jnp.ndarray):
        raise TypeError(f"train_first must be True or False, got {describe(train_first)}")
    return Settings(
        min_steps=jnp.asarray(shortest),
        max_steps=jnp.asarray(longest),
        max_training=jnp.int32(_whole("max_training", max_training, 1, _UNLIMITED)),
        embargo_steps=jnp.int32(_whole("embargo_steps", embargo_steps, 0)),
        max_errors=jnp.int32(_whole("max_errors", max_errors, 1)),
        utility_variation=_real("utility_variation", utility_variation),
        loss_variation=_real("loss_variation", loss_variation),
        min_stability=_real("min_stability", min_stability),
        min_contribution=_real("min_contribution", min_contribution),
        min_surveys=jnp.int32(_whole("min_surveys", min_surveys, 1)),
        train_first=jnp.bool_(train_first),
        trust=_real("trust", trust, is_positive=True),
        is_frozen=jnp.asarray(_frozen(freeze)),
    )


def _real(name: str, value: Any, *, is_positive: bool = False) -> Array:
    check_numbers(**{name: value})
    if is_positive and not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return jnp.float32(value)


def _whole(name: str, value: Any, least: int, unlimited: int | None = None) -> int:
    """A whole number of at least `least`; for None, where that is allowed, `unlimited`."""
    if value is None and unlimited is not None:
        return unlimited
    check_counts(**{name: value})
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def _stays(min_steps: Any, max_steps: Any) -> tuple[np.ndarray, np.ndarray]:
    """The shortest and the longest stay in every stage."""
    shortest, longest = np.zeros(NUM_STAGES, np.int32), np.zeros(NUM_STAGES, np.int32)
    for argument, stays, defaults, values in (
        ("min_steps", shortest, _MIN_STEPS, min_steps),
        ("max_steps", longest, _MAX_STEPS, max_steps),
    ):
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(
                f"{argument} must be a dict of stages and steps, `{{Stage.TRAINING: 50}}` for "
                f"instance, got {describe(values)}"
            )
        for name, value in {**defaults, **(values or {})}.items():
            stage = as_stage(name, argument)
            check_counts(**{f"{argument}[{stage.name}]": value})
            stays[stage] = value
    for stage in Stage:
        _check_stay(stage, shortest[stage], longest[stage])
    return shortest, longest


def _check_stay(stage: Stage, shortest: int, longest: int) -> None:
    if shortest < 0 or longest < 0:
        raise ValueError(f"the stay in {stage.name} must not be negative")
    if stage in _MAX_STEPS and not max(shortest, 1) <= longest:
        raise ValueError(
            f"max_steps[{stage.name}] is {longest} but must be at least 1 and at least "
            f"min_steps[{stage.name}] = {shortest}: every such stage has to end"
        )
    if stage not in _MAX_STEPS and (shortest or longest):
        raise ValueError(
            f"{stage.name} ends by no dwell; leave it out of min_steps and max_steps, which "
            f"serve {[name.name for name in _MAX_STEPS]} (for ROLLED_BACK set quarantine_steps)"
        )


def _frozen(freeze: Any) -> np.ndarray:
    """bool[11]: the stages in which adapters stand still."""
    if isinstance(freeze, str) or not isinstance(freeze, Collection):
        raise TypeError(
            f"freeze must be a list of stages, `freeze=[Stage.FOSSILIZED]` for instance, got "
            f"{freeze!r}"
        )
    acting = [stage for stage in Stage if ACTS[stage]]
    frozen = [as_stage(stage, "freeze") for stage in freeze]
    for stage in frozen:
        if stage not in acting:
            names = [stage.name for stage in acting]
            raise ValueError(f"freeze may name {names}, got {stage!r}")
    return np.isin(np.arange(NUM_STAGES), [int(stage) for stage in frozen])
