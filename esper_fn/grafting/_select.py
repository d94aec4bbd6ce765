"""Several schedules side by side, of which each seed follows one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from esper_fn._control import cond
from esper_fn._typing import Array, Bool, Float32, Int8
from esper_fn.grafting._base import AlphaSchedule, Observation

ROUNDING = 1e-5
"""A sum of float32 steps of 1/n may end a rounding short of 1: the last step takes the rest."""


def init_states(schedules: Sequence[AlphaSchedule], num_seeds: int) -> tuple[Any, ...]:
    """The states of all schedules, in their order."""
    return tuple(schedule.init(num_seeds) for schedule in schedules)


def update_alpha(
    schedules: Sequence[AlphaSchedule],
    states: Sequence[Any],
    observation: Observation,
    *,
    choice: Int8[Array, "S"],
    alpha: Float32[Array, "S"],
    is_moving: Bool[Array, "S"],
) -> tuple[tuple[Any, ...], Float32[Array, "S"]]:
    """Moves the seeds in `is_moving` by one step of their own schedule, and leaves the others.

    Args:
      schedules: all there are.
      states: theirs, in the same order.
      observation: of this step.
      choice: the index of each seed's schedule.
      alpha: of each seed.
      is_moving: the seeds that are grafted in this step.

    Returns:
      The states and alphas after the step.
    """
    after = []
    result = alpha
    for index, (schedule, state) in enumerate(zip(schedules, states, strict=True)):
        new_state, new_alpha = schedule.update(state, observation, alpha)
        new_alpha = jnp.clip(jnp.where(new_alpha > 1 - ROUNDING, 1.0, new_alpha), 0.0, 1.0)
        is_served = is_moving & (choice == index)
        result = jnp.where(is_served, new_alpha, result)
        after.append(_select_rows(is_served, new_state, state))
    return tuple(after), result


def restart(
    schedules: Sequence[AlphaSchedule],
    states: Sequence[Any],
    *,
    choice: Int8[Array, "S"],
    begins: Bool[Array, "S"],
) -> tuple[Any, ...]:
    """The states, in which the seeds that begin to graft have the rows of `init`."""

    def fresh(states: tuple[Any, ...]) -> tuple[Any, ...]:
        inits = init_states(schedules, begins.shape[0])
        return tuple(
            _select_rows(begins & (choice == index), new, old)
            for index, (new, old) in enumerate(zip(inits, states, strict=True))
        )

    states = tuple(states)
    if all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(states)):
        return states
    return cond(jnp.any(begins), fresh, lambda states: states, states)


def start_alpha(
    schedules: Sequence[AlphaSchedule], choice: Int8[Array, "S"]
) -> Float32[Array, "S"]:
    """The alpha with which each seed's schedule begins."""
    alpha = jnp.full(choice.shape, schedules[0].start_alpha, jnp.float32)
    for index in range(1, len(schedules)):
        alpha = jnp.where(choice == index, jnp.float32(schedules[index].start_alpha), alpha)
    return alpha


def _select_rows(mask: Bool[Array, "S"], new: Any, old: Any) -> Any:
    """The rows of `new` where `mask` is set; numbers, which have no rows, as they were."""

    def select(new: Array, old: Array) -> Array:
        if jnp.ndim(old) == 0:
            return old
        return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(old) - 1)), new, old)

    return jax.tree.map(select, new, old)
