"""Schedules that move alpha from 0 to 1 while an adapter is grafted in."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from esper_fn._arguments import check_numbers
from esper_fn._typing import Array, Bool, Float32
from esper_fn.lifecycle import GRAFT_MEMORY


class Evidence(NamedTuple):
    """What a schedule may react to; one value a seed."""

    is_spike: Bool[Array, "S"]
    """The training loss left its usual band in this step, or was not finite."""
    loss_trend: Float32[Array, "S"]
    """`(fast - slow) / |slow|` of the loss averages; negative while the loss falls."""
    drift: Float32[Array, "S"]
    """`|change of the adapter| / |adapter|` in this step."""
    gradient_ratio: Float32[Array, "S"]
    """This step's gradient norm over its average; 1 is usual."""
    stability: Float32[Array, "S"]
    """Averaged share of calm steps."""


Memory = Float32[Array, "S 4"]


class Update(Protocol):
    """One step of a schedule."""

    def __call__(
        self, hyper: Any, memory: Memory, alpha: Float32[Array, "S"], evidence: Evidence
    ) -> tuple[Float32[Array, "S"], Memory]:
        """The next alpha in [0, 1], at most the stated largest step away, and the next memory."""
        ...


class Graft(NamedTuple):
    """A schedule: its numbers (arrays, so tuning one never recompiles), and how it moves.

    A seed that begins to graft starts with `start_alpha`, and `start` as its memory.
    """

    name: str
    hyper: Any
    start: tuple[float, float, float, float]
    update: Update
    max_step: Float32[Array, ""]
    """No update changes alpha by more (but for `ROUNDING`, in the step that ends at 1)."""
    start_alpha: float = 0.0


ROUNDING = 1e-5
_ZEROS = (0.0, 0.0, 0.0, 0.0)


def _step(num_steps: int) -> Float32[Array, ""]:
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
    if num_steps > 1 / ROUNDING:
        raise ValueError(f"num_steps must be at most {1 / ROUNDING:.0f}, got {num_steps!r}")
    return jnp.asarray(1.0 / num_steps, jnp.float32)


def _positive(**values: float) -> None:
    check_numbers(**values)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


def _move(alpha: Array, step: Array) -> Array:
    # A sum of float32 steps of 1/n may end a rounding short of 1: the last step takes the rest.
    moved = alpha + step
    return jnp.clip(jnp.where(moved > 1 - ROUNDING, 1.0, moved), 0.0, 1.0)


class _Ramp(NamedTuple):
    step: Float32[Array, ""]


def linear(num_steps: int = 100) -> Graft:
    """`alpha += 1 / num_steps`, whatever happens; with one step alpha is 1 from the first one on.

    >>> float(linear(num_steps=4).max_step)
    0.25
    """
    step = _step(num_steps)

    def update(hyper: Any, memory: Memory, alpha: Array, evidence: Evidence) -> Any:
        del evidence
        return _move(alpha, hyper.step), memory

    return Graft(
        "linear", _Ramp(step=step), _ZEROS, update, step, start_alpha=1.0 if num_steps == 1 else 0.0
    )


class _Drift(NamedTuple):
    step: Float32[Array, ""]
    max_drift: Float32[Array, ""]


def drift_controlled(num_steps: int = 100, max_drift: float = 0.05) -> Graft:
    """Linear, but stands still while the adapter changes by more than `max_drift` a step."""
    step = _step(num_steps)
    _positive(max_drift=max_drift)

    def update(hyper: Any, memory: Memory, alpha: Array, evidence: Evidence) -> Any:
        is_calm = evidence.drift <= hyper.max_drift
        return _move(alpha, jnp.where(is_calm, hyper.step, 0.0)), memory

    return Graft(
        "drift_controlled",
        _Drift(step=step, max_drift=jnp.float32(max_drift)),
        _ZEROS,
        update,
        step,
    )


class _Momentum(NamedTuple):
    step: Float32[Array, ""]
    gain: Float32[Array, ""]
    max_speed: Float32[Array, ""]


def momentum(num_steps: int = 100, gain: float = 0.1, max_speed: float = 3.0) -> Graft:
    """Linear with a speed: times `1 + gain` while the loss falls, else back towards 1.

    A spike resets the speed to 1. Memory 0 is the speed, between 1 and `max_speed`.
    """
    step = _step(num_steps)
    _positive(gain=gain)
    check_numbers(max_speed=max_speed)
    if max_speed < 1:
        raise ValueError(f"max_speed must be at least 1, got {max_speed!r}")

    def update(hyper: Any, memory: Memory, alpha: Array, evidence: Evidence) -> Any:
        speed = memory[:, 0]
        is_better = evidence.loss_trend < 0
        changed = jnp.where(is_better, speed * (1 + hyper.gain), speed / (1 + hyper.gain))
        changed = jnp.where(evidence.is_spike, 1.0, jnp.clip(changed, 1.0, hyper.max_speed))
        return _move(alpha, hyper.step * changed), memory.at[:, 0].set(changed)

    hyper = _Momentum(step=step, gain=jnp.float32(gain), max_speed=jnp.float32(max_speed))
    return Graft("momentum", hyper, (1.0, 0.0, 0.0, 0.0), update, step * max_speed)


class _Stability(NamedTuple):
    step: Float32[Array, ""]
    hold_steps: Float32[Array, ""]
    back_steps: Float32[Array, ""]


def stability(num_steps: int = 100, hold_steps: int = 10, back_steps: int = 5) -> Graft:
    """Linear at a pace of `stability`; a spike makes it step back, then hold, then go on.

    After a spike alpha falls by one step (at most) for `back_steps`, then rests `hold_steps`.
    Memory 0 counts down what is left of both.
    """
    step = _step(num_steps)
    check_numbers(hold_steps=hold_steps, back_steps=back_steps)
    if hold_steps < 0 or back_steps < 0:
        raise ValueError(
            f"hold_steps and back_steps must not be negative: {hold_steps, back_steps}"
        )

    def update(hyper: Any, memory: Memory, alpha: Array, evidence: Evidence) -> Any:
        rest = jnp.where(
            evidence.is_spike,
            hyper.hold_steps + hyper.back_steps,
            jnp.maximum(memory[:, 0] - 1, 0.0),
        )
        pace = jnp.clip(evidence.stability, 0.1, 1.0)
        change = jnp.where(
            rest > hyper.hold_steps,
            -hyper.step,
            jnp.where(rest > 0, 0.0, hyper.step * pace),
        )
        return _move(alpha, change), memory.at[:, 0].set(rest)

    hyper = _Stability(
        step=step, hold_steps=jnp.float32(hold_steps), back_steps=jnp.float32(back_steps)
    )
    return Graft("stability", hyper, _ZEROS, update, step)


class _Gated(NamedTuple):
    step: Float32[Array, ""]
    low: Float32[Array, ""]
    high: Float32[Array, ""]


def grad_norm_gated(num_steps: int = 100, low: float = 0.25, high: float = 4.0) -> Graft:
    """Linear, but stands still while the gradient norm is not within [low, high] of its average."""
    step = _step(num_steps)
    _positive(low=low, high=high)
    if not low < high:
        raise ValueError(f"low must be below high, got {low!r} and {high!r}")

    def update(hyper: Any, memory: Memory, alpha: Array, evidence: Evidence) -> Any:
        ratio = evidence.gradient_ratio
        is_usual = (ratio >= hyper.low) & (ratio <= hyper.high)
        return _move(alpha, jnp.where(is_usual, hyper.step, 0.0)), memory

    hyper = _Gated(step=step, low=jnp.float32(low), high=jnp.float32(high))
    return Graft("grad_norm_gated", hyper, _ZEROS, update, step)


class _Adaptive(NamedTuple):
    momentum: Any
    stability: Any
    max_drift: Float32[Array, ""]
    calm_steps: Float32[Array, ""]


def adaptive(
    num_steps: int = 100,
    max_drift: float = 0.05,
    gain: float = 0.1,
    max_speed: float = 3.0,
    calm_steps: int = 20,
) -> Graft:
    """Switches on evidence: `stability` for `calm_steps` after a spike, else `momentum`.

    Where `momentum` rules, drift beyond `max_drift` makes it pause as `drift_controlled` does.
    Memory 0 is `momentum`'s, memory 1 `stability`'s, memory 2 counts the calm steps still missing.
    """
    fast = momentum(num_steps, gain, max_speed)
    careful = stability(num_steps)
    _positive(max_drift=max_drift, calm_steps=calm_steps)

    def update(hyper: Any, memory: Memory, alpha: Array, evidence: Evidence) -> Any:
        wary = jnp.where(evidence.is_spike, hyper.calm_steps, jnp.maximum(memory[:, 2] - 1, 0.0))
        quick, speed = fast.update(hyper.momentum, memory, alpha, evidence)
        quick = jnp.where(evidence.drift <= hyper.max_drift, quick, alpha)
        slow, rest = careful.update(hyper.stability, memory[:, 1:2], alpha, evidence)
        chosen = jnp.where(wary > 0, slow, quick)
        kept = jnp.stack([speed[:, 0], rest[:, 0], wary, memory[:, 3]], axis=-1)
        return chosen, kept

    hyper = _Adaptive(
        momentum=fast.hyper,
        stability=careful.hyper,
        max_drift=jnp.float32(max_drift),
        calm_steps=jnp.float32(calm_steps),
    )
    return Graft("adaptive", hyper, fast.start, update, fast.max_step)


def ramp(
    grafts: tuple[Graft, ...],
    hypers: tuple[Any, ...],
    evidence: Evidence,
    *,
    chosen: Array,
    memory: Memory,
    alpha: Array,
    is_moving: Bool[Array, "S"],
) -> tuple[Array, Memory]:
    """One step of every seed's own schedule, where `is_moving`; the others keep what they have."""
    new_alpha, new_memory = alpha, memory
    for index, (graft, hyper) in enumerate(zip(grafts, hypers, strict=True)):
        moved, remembered = graft.update(hyper, memory, alpha, evidence)
        is_mine = is_moving & (chosen == index)
        new_alpha = jnp.where(is_mine, moved, new_alpha)
        new_memory = jnp.where(is_mine[:, None], remembered, new_memory)
    return new_alpha, new_memory


def start_alpha(grafts: tuple[Graft, ...], chosen: Array) -> Array:
    """The alpha with which each seed's schedule begins."""
    alpha = jnp.full(chosen.shape, grafts[0].start_alpha, jnp.float32)
    for index in range(1, len(grafts)):
        alpha = jnp.where(chosen == index, jnp.float32(grafts[index].start_alpha), alpha)
    return alpha


def start_memory(grafts: tuple[Graft, ...], chosen: Array) -> Memory:
    """The memory with which each seed's schedule begins."""
    rows = jnp.asarray([graft.start for graft in grafts], jnp.float32)
    assert rows.shape[1] == GRAFT_MEMORY  # noqa: S101 -- a table of this file
    memory = jnp.broadcast_to(rows[0], (*chosen.shape, GRAFT_MEMORY))
    for index in range(1, len(grafts)):
        memory = jnp.where((chosen >= index)[..., None], rows[index], memory)
    return memory
