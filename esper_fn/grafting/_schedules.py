"""The schedules of the library."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from esper_fn._arguments import check_numbers, is_count
from esper_fn._records import record
from esper_fn._typing import Array, Float32
from esper_fn.grafting._base import AlphaSchedule, Observation
from esper_fn.grafting._select import ROUNDING


def _check_num_steps(num_steps: int) -> None:
    if not is_count(num_steps):
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
    if num_steps > 1 / ROUNDING:
        raise ValueError(f"num_steps must be at most {1 / ROUNDING:.0f}, got {num_steps!r}")


def _check_positive(**values: float) -> None:
    check_numbers(**values)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


@record
class LinearState(NamedTuple):
    """State of `linear`."""

    step: Float32[Array, ""]


def linear(num_steps: int = 100) -> AlphaSchedule:
    """Adds `1 / num_steps` to alpha in every step.

    Args:
      num_steps: steps from 0 to 1, at most 100,000. With one step alpha begins at 1.

    Returns:
      The schedule.

    Raises:
      ValueError: `num_steps` is no int in that range.

    >>> linear(num_steps=4).max_step
    0.25
    """
    _check_num_steps(num_steps)

    def init(num_seeds: int) -> LinearState:
        del num_seeds
        return LinearState(step=jnp.float32(1 / num_steps))

    def update(
        state: LinearState, observation: Observation, alpha: Array
    ) -> tuple[LinearState, Array]:
        del observation
        return state, alpha + state.step

    start = 1.0 if num_steps == 1 else 0.0
    return AlphaSchedule("linear", init, update, 1 / num_steps, start_alpha=start)


@record
class DriftControlledState(NamedTuple):
    """State of `drift_controlled`."""

    step: Float32[Array, ""]
    max_drift: Float32[Array, ""]


def drift_controlled(num_steps: int = 100, max_drift: float = 0.05) -> AlphaSchedule:
    """Moves as `linear` does, and stands still while the adapter changes too fast.

    Args:
      num_steps: steps from 0 to 1 where the adapter is calm.
      max_drift: relative change of the adapter in one step up to which alpha moves.

    Returns:
      The schedule.

    Raises:
      ValueError: `num_steps` as in `linear`, or `max_drift` is not positive.
    """
    _check_num_steps(num_steps)
    _check_positive(max_drift=max_drift)

    def init(num_seeds: int) -> DriftControlledState:
        del num_seeds
        return DriftControlledState(jnp.float32(1 / num_steps), jnp.float32(max_drift))

    def update(
        state: DriftControlledState, observation: Observation, alpha: Array
    ) -> tuple[DriftControlledState, Array]:
        is_calm = observation.drift <= state.max_drift
        return state, alpha + jnp.where(is_calm, state.step, 0.0)

    return AlphaSchedule("drift_controlled", init, update, 1 / num_steps)


@record
class MomentumState(NamedTuple):
    """State of `momentum`."""

    step: Float32[Array, ""]
    gain: Float32[Array, ""]
    max_speed: Float32[Array, ""]
    speed: Float32[Array, "S"]
    """Between 1 and `max_speed`."""


def momentum(num_steps: int = 100, gain: float = 0.1, max_speed: float = 3.0) -> AlphaSchedule:
    """Moves as `linear` does, times a speed that rises while the loss falls.

    The speed starts at 1. It is multiplied by `1 + gain` where the loss falls and divided by it
    elsewhere, within [1, max_speed]; a spike of the loss sets it to 1.

    Args:
      num_steps: steps from 0 to 1 at speed 1.
      gain: relative change of the speed in one step.
      max_speed: the largest speed, at least 1.

    Returns:
      The schedule.

    Raises:
      ValueError: `num_steps` as in `linear`, `gain` is not positive, or `max_speed` is below 1.
    """
    _check_num_steps(num_steps)
    _check_positive(gain=gain)
    check_numbers(max_speed=max_speed)
    if max_speed < 1:
        raise ValueError(f"max_speed must be at least 1, got {max_speed!r}")

    def init(num_seeds: int) -> MomentumState:
        return MomentumState(
            step=jnp.float32(1 / num_steps),
            gain=jnp.float32(gain),
            max_speed=jnp.float32(max_speed),
            speed=jnp.ones((num_seeds,), jnp.float32),
        )

    def update(
        state: MomentumState, observation: Observation, alpha: Array
    ) -> tuple[MomentumState, Array]:
        factor = 1 + state.gain
        speed = jnp.where(observation.loss_trend < 0, state.speed * factor, state.speed / factor)
        speed = jnp.clip(speed, 1.0, state.max_speed)
        speed = jnp.where(observation.is_spike, 1.0, speed)
        return state._replace(speed=speed), alpha + state.step * speed

    return AlphaSchedule("momentum", init, update, max_speed / num_steps)


@record
class StabilityState(NamedTuple):
    """State of `stability`."""

    step: Float32[Array, ""]
    hold_steps: Float32[Array, ""]
    back_steps: Float32[Array, ""]
    countdown: Float32[Array, "S"]
    """Steps left of going back and holding."""


def stability(num_steps: int = 100, hold_steps: int = 10, back_steps: int = 5) -> AlphaSchedule:
    """Moves as `linear` does, times the share of calm steps, and goes back after a spike.

    After a spike of the loss alpha falls by one step for `back_steps` steps, then holds for
    `hold_steps` steps, then goes on.

    Args:
      num_steps: steps from 0 to 1 where every step is calm.
      hold_steps: steps for which alpha holds after a spike.
      back_steps: steps for which it falls before that.

    Returns:
      The schedule.

    Raises:
      ValueError: `num_steps` as in `linear`, or one of the others is negative.
    """
    _check_num_steps(num_steps)
    check_numbers(hold_steps=hold_steps, back_steps=back_steps)
    if hold_steps < 0 or back_steps < 0:
        raise ValueError(
            f"hold_steps and back_steps must not be negative: {hold_steps, back_steps}"
        )

    def init(num_seeds: int) -> StabilityState:
        return StabilityState(
            step=jnp.float32(1 / num_steps),
            hold_steps=jnp.float32(hold_steps),
            back_steps=jnp.float32(back_steps),
            countdown=jnp.zeros((num_seeds,), jnp.float32),
        )

    def update(
        state: StabilityState, observation: Observation, alpha: Array
    ) -> tuple[StabilityState, Array]:
        countdown = jnp.where(
            observation.is_spike,
            state.hold_steps + state.back_steps,
            jnp.maximum(state.countdown - 1, 0.0),
        )
        pace = jnp.clip(observation.stability, 0.1, 1.0)
        onward = jnp.where(countdown > 0, 0.0, state.step * pace)
        change = jnp.where(countdown > state.hold_steps, -state.step, onward)
        return state._replace(countdown=countdown), alpha + change

    return AlphaSchedule("stability", init, update, 1 / num_steps)


@record
class GradNormGatedState(NamedTuple):
    """State of `grad_norm_gated`."""

    step: Float32[Array, ""]
    low: Float32[Array, ""]
    high: Float32[Array, ""]


def grad_norm_gated(num_steps: int = 100, low: float = 0.25, high: float = 4.0) -> AlphaSchedule:
    """Moves as `linear` does, and stands still where the gradient norm is unusual.

    Args:
      num_steps: steps from 0 to 1 where every gradient norm is usual.
      low: the least gradient norm, over its average, with which alpha moves.
      high: the largest.

    Returns:
      The schedule.

    Raises:
      ValueError: `num_steps` as in `linear`, a bound is not positive, or `low` is not below `high`.
    """
    _check_num_steps(num_steps)
    _check_positive(low=low, high=high)
    if not low < high:
        raise ValueError(f"low must be below high, got {low!r} and {high!r}")

    def init(num_seeds: int) -> GradNormGatedState:
        del num_seeds
        return GradNormGatedState(
            step=jnp.float32(1 / num_steps), low=jnp.float32(low), high=jnp.float32(high)
        )

    def update(
        state: GradNormGatedState, observation: Observation, alpha: Array
    ) -> tuple[GradNormGatedState, Array]:
        ratio = observation.gradient_ratio
        is_usual = (ratio >= state.low) & (ratio <= state.high)
        return state, alpha + jnp.where(is_usual, state.step, 0.0)

    return AlphaSchedule("grad_norm_gated", init, update, 1 / num_steps)


@record
class AdaptiveState(NamedTuple):
    """State of `adaptive`."""

    momentum: MomentumState
    stability: StabilityState
    max_drift: Float32[Array, ""]
    calm_steps: Float32[Array, ""]
    countdown: Float32[Array, "S"]
    """Steps left of following `stability`."""


def adaptive(
    num_steps: int = 100,
    max_drift: float = 0.05,
    gain: float = 0.1,
    max_speed: float = 3.0,
    calm_steps: int = 20,
) -> AlphaSchedule:
    """Follows `momentum`, and `stability` for some steps after a spike of the loss.

    While it follows `momentum`, it stands still where the adapter changes too fast.

    Args:
      num_steps: as in both.
      max_drift: as in `drift_controlled`.
      gain: as in `momentum`.
      max_speed: as in `momentum`.
      calm_steps: steps after a spike in which `stability` decides.

    Returns:
      The schedule.

    Raises:
      ValueError: as in those, or `calm_steps` is not positive.
    """
    fast = momentum(num_steps, gain, max_speed)
    careful = stability(num_steps)
    _check_positive(max_drift=max_drift, calm_steps=calm_steps)

    def init(num_seeds: int) -> AdaptiveState:
        return AdaptiveState(
            momentum=fast.init(num_seeds),
            stability=careful.init(num_seeds),
            max_drift=jnp.float32(max_drift),
            calm_steps=jnp.float32(calm_steps),
            countdown=jnp.zeros((num_seeds,), jnp.float32),
        )

    def update(
        state: AdaptiveState, observation: Observation, alpha: Array
    ) -> tuple[AdaptiveState, Array]:
        countdown = jnp.where(
            observation.is_spike, state.calm_steps, jnp.maximum(state.countdown - 1, 0.0)
        )
        momentum_state, quick = fast.update(state.momentum, observation, alpha)
        quick = jnp.where(observation.drift <= state.max_drift, quick, alpha)
        stability_state, slow = careful.update(state.stability, observation, alpha)
        state = state._replace(
            momentum=momentum_state, stability=stability_state, countdown=countdown
        )
        return state, jnp.where(countdown > 0, slow, quick)

    return AlphaSchedule("adaptive", init, update, fast.max_step)
