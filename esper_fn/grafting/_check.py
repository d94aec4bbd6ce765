"""Whether an alpha schedule keeps the contract."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_kind
from esper_fn._contract import Contract
from esper_fn._typing import Array
from esper_fn.grafting._base import AlphaSchedule, Observation
from esper_fn.grafting._select import ROUNDING, update_alpha

_NUM_SEEDS = 5


def check(schedule: AlphaSchedule) -> None:
    """Runs a schedule and raises where it breaks its contract.

    The state must be arrays, each without axes or with one row a seed. An update must keep the
    state's shapes and dtypes and its numbers, move alpha by at most `max_step`, and compute each
    seed's alpha from that seed's row alone. Alpha must reach 1 in calm steps.

    Args:
      schedule: any one.

    Raises:
      TypeError: it is no `AlphaSchedule`.
      ValueError: it breaks the contract; the message says how.

    >>> from esper_fn import grafting
    >>> check(grafting.linear(num_steps=10))
    """
    check_kind("schedule", schedule, AlphaSchedule, "call its factory: `linear(num_steps=100)`")
    contract = Contract(f"alpha schedule {schedule.name!r}")
    if not schedule.max_step > 0 or not 0 <= schedule.start_alpha <= 1:
        contract.fail(
            "max_step must be positive and start_alpha between 0 and 1, got "
            f"{schedule.max_step} and {schedule.start_alpha}",
        )
    state = schedule.init(_NUM_SEEDS)
    contract.check_state(state)
    for path, leaf in jax.tree.leaves_with_path(state):
        if leaf.ndim and leaf.shape[0] != _NUM_SEEDS:
            contract.fail(
                f"init: the state's leaf {jax.tree_util.keystr(path) or '(root)'} must have no "
                f"axes, or one row for each of the {_NUM_SEEDS} seeds, got shape {leaf.shape}"
            )
    # Compiled once: what depends on a value must be array code.
    update = jax.jit(schedule.update)
    rng = np.random.default_rng(0)
    for _ in range(20):
        observation = _draw(rng)
        alpha = jnp.asarray(rng.uniform(size=_NUM_SEEDS), jnp.float32)
        result = update(state, observation, alpha)
        contract.check_pair("update", result, "alpha")
        contract.check_same_form("update", state, result[0])
        _check_update(contract, schedule, state, alpha, result)
        _check_rows(contract, update, state, observation, alpha)
        state = result[0]
    _check_end(contract, schedule)


def _draw(rng: np.random.Generator) -> Observation:
    shape = (_NUM_SEEDS,)
    return Observation(
        is_spike=jnp.asarray(rng.uniform(size=shape) < 0.2),
        loss_trend=jnp.asarray(rng.normal(size=shape), jnp.float32),
        drift=jnp.asarray(np.exp(rng.normal(-3, 3, size=shape)), jnp.float32),
        gradient_ratio=jnp.asarray(np.exp(rng.normal(0, 3, size=shape)), jnp.float32),
        stability=jnp.asarray(rng.uniform(size=shape), jnp.float32),
    )


def _check_update(
    contract: Contract, schedule: AlphaSchedule, state: Any, alpha: Array, result: Any
) -> None:
    after, moved = result
    if moved.shape != alpha.shape or moved.dtype != alpha.dtype:
        form = f"{moved.dtype}{list(moved.shape)}"
        contract.fail(f"update must return alpha as float32[S], got {form}")
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if old.ndim == 0 and not np.array_equal(old, new):
            contract.fail(f"update must leave its numbers as they are, got {new} for {old}")
    change = np.abs(np.clip(np.asarray(moved), 0, 1) - np.asarray(alpha)).max()
    if not change <= schedule.max_step + ROUNDING:
        contract.fail(f"alpha moves by {change} in one step, max_step is {schedule.max_step}")


def _check_rows(
    contract: Contract, update: Any, state: Any, observation: Observation, alpha: Array
) -> None:
    order = np.arange(_NUM_SEEDS)[::-1]
    turned = jax.tree.map(lambda x: x[order] if x.ndim else x, (state, observation, alpha))
    if not np.array_equal(update(*turned)[1], update(state, observation, alpha)[1][order]):
        contract.fail("a seed's alpha must depend on that seed's row alone")


def _check_end(contract: Contract, schedule: AlphaSchedule) -> None:
    calm = Observation(
        is_spike=jnp.zeros((1,), bool),
        loss_trend=jnp.full((1,), -0.01, jnp.float32),
        drift=jnp.zeros((1,), jnp.float32),
        gradient_ratio=jnp.ones((1,), jnp.float32),
        stability=jnp.ones((1,), jnp.float32),
    )
    most = 100 * math.ceil(1 / schedule.max_step)

    def step(carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        states, alpha, count = carry
        states, alpha = update_alpha(
            [schedule],
            states,
            calm,
            choice=jnp.zeros((1,), jnp.int8),
            alpha=alpha,
            is_moving=jnp.ones((1,), bool),
        )
        return states, alpha, count + 1

    alpha = jnp.full((1,), schedule.start_alpha, jnp.float32)
    start = ((schedule.init(1),), alpha, jnp.int32(0))
    _, alpha, _ = jax.lax.while_loop(
        lambda carry: (carry[1][0] < 1) & (carry[2] < most), step, start
    )
    if float(alpha[0]) < 1:
        contract.fail(f"alpha must reach 1 in calm steps, it is {alpha[0]} after {most}")
