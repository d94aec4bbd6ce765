"""The governor of the library, and none."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._arguments import check_counts, check_numbers
from esper_fn._leaves import LARGEST
from esper_fn._records import record
from esper_fn._typing import Array, Float32, Int32
from esper_fn.governors._base import Alarm, Governor, Observation, Verdict
from esper_fn.lifecycle import ACTS, FAST_STEPS, ON_ITS_WAY, is_in
from esper_fn.lifecycle._state import SLOW_STEPS


@record
class StandardState(NamedTuple):
    """Thresholds and counters of `standard`."""

    max_ratio: Float32[Array, ""]
    patience: Int32[Array, ""]
    max_drift: Float32[Array, ""]
    veto_steps: Int32[Array, ""]
    num_bad: Int32[Array, ""]
    """Steps in a row whose loss was too high through the parameters' fault."""
    num_changed: Int32[Array, ""]
    """The same through the data's."""
    settling_left: Int32[Array, ""]
    """Steps until the averages have followed data that changed."""
    veto_left: Int32[Array, ""]
    best: Float32[Array, ""]
    """Lowest slow average of the loss."""
    noise: Float32[Array, ""]
    """The loss's standard deviation then."""


_NOISE_DEVIATIONS = 4.0
_SETTLING_STEPS = 2 * SLOW_STEPS


def standard(
    *,
    max_ratio: float = 3.0,
    patience: int = 20,
    max_drift: float = 10.0,
    veto_steps: int = 200,
) -> Governor:
    """Watches for a non-finite loss, for divergence and for drift.

    The loss has diverged when its fast average has been above `best + (max_ratio - 1) |best| + 4
    noise` for `patience` steps in a row. Here `best` is the lowest slow average so far, which may
    be negative, and `noise` is the loss's standard deviation at that time: without it a loss near
    zero would raise alarms by noise alone. After a divergence the governor learns `best` anew.

    Data that change are no divergence: a step does not count if the last good parameters have half
    of the excess over `best` on its batch too (`Observation.reference_loss`). `patience` such steps
    make the governor learn `best` anew.

    A non-finite or diverged loss orders a roll-back and quarantines every seed whose adapter acts,
    except fossils. An adapter that changes by more than `max_drift` times its own size in one step
    is quarantined alone, but not in its first `lifecycle.FAST_STEPS` steps. After any of these
    nothing germinates for `veto_steps` steps.

    Args:
      max_ratio: of the loss to its best, above 1.
      patience: steps in a row for which the loss must be too high.
      max_drift: relative change of one adapter in one step, positive.
      veto_steps: steps without germination after an alarm.

    Returns:
      The governor.

    Raises:
      TypeError: an argument is no number.
      ValueError: an argument is out of its range.
    """
    check_numbers(max_ratio=max_ratio, max_drift=max_drift)
    check_counts(patience=patience, veto_steps=veto_steps)
    if max_ratio <= 1 or patience < 1 or max_drift <= 0 or veto_steps < 0:
        raise ValueError(
            "need max_ratio > 1, patience >= 1, max_drift > 0, veto_steps >= 0; got "
            f"{max_ratio}, {patience}, {max_drift}, {veto_steps}"
        )

    def init(num_seeds: int) -> StandardState:
        del num_seeds
        return StandardState(
            max_ratio=jnp.float32(max_ratio),
            patience=jnp.int32(patience),
            max_drift=jnp.float32(max_drift),
            veto_steps=jnp.int32(veto_steps),
            num_bad=jnp.int32(0),
            num_changed=jnp.int32(0),
            settling_left=jnp.int32(0),
            veto_left=jnp.int32(0),
            best=jnp.float32(LARGEST),
            noise=jnp.float32(0.0),
        )

    return Governor(init=init, update=_update)


def _update(state: StandardState, observation: Observation) -> tuple[StandardState, Verdict]:
    track = observation.track
    is_warm = track.num_steps >= state.patience
    # After a divergence there is no best loss until the veto is over, then it is learned anew. Else
    # data that changed for good would be rolled back again and again.
    is_waiting = (state.veto_left > 0) | (state.settling_left > 0)
    has_no_best = (state.best >= LARGEST) & is_waiting
    is_best = is_warm & ~has_no_best & (track.slow < state.best)
    best = jnp.where(is_best, track.slow, state.best)
    noise = jnp.where(is_best, jnp.sqrt(track.square), state.noise)
    bound = best + (state.max_ratio - 1) * jnp.abs(best) + _NOISE_DEVIATIONS * noise
    is_bad = is_warm & (track.fast > bound)
    # A comparison with NaN is false: what was not measured excuses nothing.
    is_excused = 2 * (observation.reference_loss - best) > observation.loss - best
    num_bad = jnp.where(is_bad, state.num_bad + (~is_excused).astype(jnp.int32), 0)
    num_changed = jnp.where(is_bad & is_excused, state.num_changed + 1, 0)
    has_diverged = num_bad >= state.patience
    has_changed = num_changed >= state.patience
    is_non_finite = ~jnp.isfinite(observation.loss)
    should_roll_back = is_non_finite | has_diverged

    seeds = observation.seeds
    acts_on_trial = is_in(seeds.stage, ACTS & ON_ITS_WAY) & (seeds.alpha > 0)
    # A newborn is zero where it matters, and learning rates warm up: its first steps are always
    # large beside what it is.
    is_newborn = seeds.telemetry.num_live_steps <= FAST_STEPS
    drifts = acts_on_trial & ~is_newborn & (observation.drift > state.max_drift)
    is_quarantined = (acts_on_trial & should_roll_back) | drifts

    is_alarm = should_roll_back | jnp.any(drifts)
    veto_left = jnp.where(is_alarm, state.veto_steps, jnp.maximum(state.veto_left - 1, 0))
    alarm = jnp.int8(Alarm.CALM)
    for is_raised, name in (
        (has_changed, Alarm.DATA_CHANGED),
        (jnp.any(drifts), Alarm.DRIFT),
        (has_diverged, Alarm.DIVERGENCE),
        (is_non_finite, Alarm.NON_FINITE_LOSS),
    ):
        alarm = jnp.where(is_raised, jnp.int8(name), alarm)
    verdict = Verdict(
        alarm=alarm,
        forbids_germination=veto_left > 0,
        should_roll_back=should_roll_back,
        is_quarantined=is_quarantined,
        is_elevated=is_bad,
    )
    state = state._replace(
        num_bad=jnp.where(has_diverged, 0, num_bad),
        num_changed=jnp.where(has_changed, 0, num_changed),
        settling_left=jnp.where(
            has_changed, _SETTLING_STEPS, jnp.maximum(state.settling_left - 1, 0)
        ),
        veto_left=veto_left,
        best=jnp.where(has_diverged | has_changed, LARGEST, best),
        noise=noise,
    )
    return state, verdict


def disabled() -> Governor:
    """Never interferes; for controlled experiments."""

    def init(num_seeds: int) -> tuple[()]:
        del num_seeds
        return ()

    def update(state: tuple[()], observation: Observation) -> tuple[tuple[()], Verdict]:
        no = jnp.zeros((), bool)
        return state, Verdict(
            alarm=jnp.int8(Alarm.CALM),
            forbids_germination=no,
            should_roll_back=no,
            is_quarantined=jnp.zeros(observation.seeds.stage.shape, bool),
        )

    return Governor(init=init, update=update)
