"""The deterministic guard outside every policy."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_counts, check_numbers
from esper_fn._leaves import LARGEST
from esper_fn._typing import Array, Bool, Float32, Int8, Int32
from esper_fn.lifecycle import ACTS, FAST_STEPS, ON_ITS_WAY, LossTrack, SeedState, is_in


class Alarm(IntEnum):
    """What the governor saw."""

    CALM = 0
    NON_FINITE_LOSS = 1
    DIVERGENCE = 2
    DRIFT = 3


class Evidence(NamedTuple):
    """What the governor sees of a step."""

    seeds: SeedState
    loss: Float32[Array, ""]
    track: LossTrack
    drift: Float32[Array, "S"]
    """`|change of the adapter| / |adapter|`, 0 of an adapter that is zero."""


class Verdict(NamedTuple):
    """What it orders; nothing overrides it."""

    alarm: Int8[Array, ""]
    is_vetoing: Bool[Array, ""]
    """No germination now."""
    should_roll_back: Bool[Array, ""]
    """The caller is to restore the last good parameters (`esper_fn.rollback`)."""
    is_quarantined: Bool[Array, "S"]
    """Seeds to be rolled back and kept out for `settings(quarantine_steps=...)`, or until somebody
    releases them."""
    is_uneasy: Bool[Array, ""] | np.bool_ = np.bool_(False)
    """The loss is too high, not yet for long enough to be an alarm: the present is not to be kept
    as good."""


class Judge(Protocol):
    """One judgement."""

    def __call__(self, state: Any, evidence: Evidence) -> tuple[Any, Verdict]:
        """The next state and the verdict on this step."""
        ...


class Governor(NamedTuple):
    """`(state, judge)`; `state` holds the thresholds as arrays."""

    state: Any
    judge: Judge


class _State(NamedTuple):
    max_ratio: Float32[Array, ""]
    patience: Int32[Array, ""]
    max_drift: Float32[Array, ""]
    veto_steps: Int32[Array, ""]
    num_bad: Int32[Array, ""]
    """Steps in a row whose loss was too high."""
    veto_left: Int32[Array, ""]
    best: Float32[Array, ""]
    """Lowest slow average of the loss."""
    noise: Float32[Array, ""]
    """The loss's standard deviation then."""


NOISE_DEVIATIONS = 4.0


def standard(
    *,
    max_ratio: float = 3.0,
    patience: int = 20,
    max_drift: float = 10.0,
    veto_steps: int = 200,
) -> Governor:
    """Watches for a non-finite loss, divergence and drift.

    A non-finite loss, or a fast loss average above
    `best + (max_ratio - 1) |best| + NOISE_DEVIATIONS noise` for `patience` steps in a row, orders a
    roll-back and quarantines every seed that acts but is not a fossil. `best` is the best slow
    average (losses may be negative) and `noise` the loss's standard deviation then, without which
    a loss near zero would raise alarms by its noise alone. An adapter that changes by more than
    `max_drift` times its own size in one step is quarantined alone, but not for its first
    `lifecycle.FAST_STEPS` steps. After an alarm nothing germinates for `veto_steps`; after a
    divergence the best loss is learned anew from then on.

    Args:
      max_ratio: of the loss, above 1.
      patience: steps.
      max_drift: relative change of one adapter in one step.
      veto_steps: steps.
    """
    check_numbers(max_ratio=max_ratio, max_drift=max_drift)
    check_counts(patience=patience, veto_steps=veto_steps)
    if max_ratio <= 1 or patience < 1 or max_drift <= 0 or veto_steps < 0:
        raise ValueError(
            "need max_ratio > 1, patience >= 1, max_drift > 0, veto_steps >= 0; got "
            f"{max_ratio}, {patience}, {max_drift}, {veto_steps}"
        )
    state = _State(
        max_ratio=jnp.float32(max_ratio),
        patience=jnp.int32(patience),
        max_drift=jnp.float32(max_drift),
        veto_steps=jnp.int32(veto_steps),
        num_bad=jnp.int32(0),
        veto_left=jnp.int32(0),
        best=jnp.float32(LARGEST),
        noise=jnp.float32(0.0),
    )
    return Governor(state=state, judge=_judge)


def _judge(state: _State, evidence: Evidence) -> tuple[_State, Verdict]:
    track = evidence.track
    is_warm = track.num_steps >= state.patience
    # Forgotten after a divergence: nothing is judged until the veto is over, then what is usual
    # is learned anew. Else data that changed for good would be rolled back again and again.
    is_forgotten = (state.best >= LARGEST) & (state.veto_left > 0)
    is_best = is_warm & ~is_forgotten & (track.slow < state.best)
    best = jnp.where(is_best, track.slow, state.best)
    noise = jnp.where(is_best, jnp.sqrt(track.square), state.noise)
    bound = best + (state.max_ratio - 1) * jnp.abs(best) + NOISE_DEVIATIONS * noise
    is_bad = is_warm & (track.fast > bound)
    num_bad = jnp.where(is_bad, state.num_bad + 1, 0)
    has_diverged = num_bad >= state.patience
    is_non_finite = ~jnp.isfinite(evidence.loss)
    should_roll_back = is_non_finite | has_diverged

    acts_on_trial = is_in(evidence.seeds.stage, ACTS & ON_ITS_WAY) & (evidence.seeds.alpha > 0)
    # A newborn is zero where it matters, and learning rates warm up: its first steps are always
    # large beside what it is.
    is_newborn = evidence.seeds.telemetry.num_live_steps <= FAST_STEPS
    drifts = acts_on_trial & ~is_newborn & (evidence.drift > state.max_drift)
    is_quarantined = (acts_on_trial & should_roll_back) | drifts

    is_alarm = should_roll_back | jnp.any(drifts)
    veto_left = jnp.where(is_alarm, state.veto_steps, jnp.maximum(state.veto_left - 1, 0))
    alarm = jnp.where(
        is_non_finite,
        Alarm.NON_FINITE_LOSS,
        jnp.where(
            has_diverged,
            Alarm.DIVERGENCE,
            jnp.where(jnp.any(drifts), Alarm.DRIFT, Alarm.CALM),
        ),
    )
    verdict = Verdict(
        alarm=alarm.astype(jnp.int8),
        is_vetoing=veto_left > 0,
        should_roll_back=should_roll_back,
        is_quarantined=is_quarantined,
        is_uneasy=is_bad,
    )
    state = state._replace(
        num_bad=jnp.where(has_diverged, 0, num_bad),
        veto_left=veto_left,
        best=jnp.where(has_diverged, LARGEST, best),
        noise=noise,
    )
    return state, verdict


def lenient() -> Governor:
    """Never interferes; for controlled experiments."""

    def judge(state: Any, evidence: Evidence) -> tuple[Any, Verdict]:
        no = jnp.zeros((), bool)
        return state, Verdict(
            alarm=jnp.int8(Alarm.CALM),
            is_vetoing=no,
            should_roll_back=no,
            is_quarantined=jnp.zeros(evidence.seeds.stage.shape, bool),
        )

    return Governor(state=(), judge=judge)
