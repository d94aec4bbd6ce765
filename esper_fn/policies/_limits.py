"""Rules that limit growth; they stand behind the ones that ask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._arguments import check_counts, check_numbers
from esper_fn._control import cond, vary_alike
from esper_fn._layout import Layout
from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.lifecycle import NONE, ON_ITS_WAY, is_in
from esper_fn.lifecycle._commands import Requests
from esper_fn.policies._base import (
    Observation,
    Policy,
    by_priority,
    can_germinate,
    if_germinating,
    refuse,
    rule,
)


@record
class LimitState(NamedTuple):
    """State of `max_concurrent` and `stop_after`."""

    limit: Int32[Array, ""]


def _serve_first(requests: Requests, observation: Observation, num_served: Array) -> Requests:
    """The requests with only their `num_served` most urgent germinations."""
    is_candidate = can_germinate(requests, observation)

    def is_late() -> Bool[Array, "S"]:
        order = by_priority(requests, is_candidate)
        rank = jnp.arange(order.size, dtype=jnp.int32)
        return jnp.zeros(is_candidate.shape, bool).at[order].set(rank >= num_served)

    # Ordering all seeds is what takes time: only where some are served and some are not.
    num_requested = jnp.sum(is_candidate, dtype=jnp.int32)
    is_refused = cond(
        (num_served > 0) & (num_served < num_requested),
        is_late,
        lambda: jnp.broadcast_to(num_served <= 0, is_candidate.shape),
    )
    return refuse(requests, is_refused & is_candidate)


def max_concurrent(limit: int) -> Policy:
    """Lets at most `limit` seeds be on their way (GERMINATED to FINE_TUNING) at once.

    Args:
      limit: seeds, at least 1.

    Returns:
      The policy.

    Raises:
      ValueError: `limit` is below 1.
    """
    check_counts(limit=limit)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")

    def decide(
        layout: Layout, state: LimitState, observation: Observation, requests: Requests, key: Key
    ) -> tuple[LimitState, Requests]:
        del layout, key
        num_on_their_way = jnp.sum(is_in(observation.seeds.stage, ON_ITS_WAY), dtype=jnp.int32)
        room = state.limit - num_on_their_way
        return state, if_germinating(
            requests, lambda requests: _serve_first(requests, observation, room)
        )

    return rule("max_concurrent", lambda layout: LimitState(jnp.int32(limit)), decide)


@record
class BudgetState(NamedTuple):
    """State of `budget`."""

    limit: Float32[Array, ""]


_CERTAINLY = 0.999


def budget(parameters: int) -> Policy:
    """Lets all living adapters, the requested ones included, have at most `parameters`.

    Requests are served by priority. One that does not fit is refused, and the next that fits is
    served. Rules before this one ask for adapters that fit, as long as there are any.

    Args:
      parameters: how many parameters all adapters together may have, not negative.

    Returns:
      The policy.

    Raises:
      ValueError: `parameters` is negative.
    """
    check_numbers(parameters=parameters)
    if parameters < 0:
        raise ValueError(f"parameters must not be negative, got {parameters!r}")

    def room(layout: Layout, state: BudgetState, observation: Observation) -> Float32[Array, ""]:
        tables = layout.tables
        costs = jnp.asarray(tables.costs[tables.slot_group, tables.slot_blueprint])
        return state.limit - jnp.sum(jnp.where(observation.owner != NONE, costs, 0.0))

    def admit(layout: Layout, state: BudgetState, observation: Observation) -> Bool[Array, "G B"]:
        return jnp.asarray(layout.tables.costs) <= room(layout, state, observation)

    def decide(
        layout: Layout, state: BudgetState, observation: Observation, requests: Requests, key: Key
    ) -> tuple[BudgetState, Requests]:
        del key
        left = room(layout, state, observation)

        def limit(requests: Requests) -> Requests:
            is_candidate = can_germinate(requests, observation)
            price = _prices(layout, requests, is_candidate)

            def some() -> Bool[Array, "S"]:
                order = by_priority(requests, is_candidate)
                is_served = _affordable(price[order], is_candidate[order], left)
                return jnp.zeros(is_candidate.shape, bool).at[order].set(~is_served)

            # Ordering all seeds is what takes time: neither where all of them fit, roundings
            # included, nor where none does.
            is_ample = jnp.sum(price) < left - (1 - _CERTAINLY) * state.limit
            is_hopeless = jnp.min(jnp.where(is_candidate, price, jnp.inf)) > left
            is_refused = cond(
                is_ample | is_hopeless,
                lambda: jnp.broadcast_to(is_hopeless, is_candidate.shape),
                some,
            )
            return refuse(requests, is_refused & is_candidate)

        return state, if_germinating(requests, limit)

    return rule("budget", lambda layout: BudgetState(jnp.float32(parameters)), decide, admit)


def _prices(
    layout: Layout, requests: Requests, is_candidate: Bool[Array, "S"]
) -> Float32[Array, "S"]:
    """Parameters of the adapter that each candidate would grow, 0 for the other seeds."""
    price = jnp.zeros(is_candidate.shape, jnp.float32)
    for index in range(len(layout.blueprints)):
        is_one = is_candidate & (jnp.maximum(requests.blueprint, 0) == index)
        price = jnp.where(is_one, layout.per_seed(layout.tables.costs[:, index]), price)
    return price


def _affordable(
    price: Float32[Array, "S"], is_candidate: Bool[Array, "S"], left: Float32[Array, ""]
) -> Bool[Array, "S"]:
    """Which candidates, served in turn, fit into what the ones before them leave.

    Each round refuses the first one that does not fit and every later one that costs as much, so
    there are no more rounds than different prices.
    """
    rank = jnp.arange(price.size, dtype=jnp.int32)

    def running(is_served: Bool[Array, "S"]) -> Float32[Array, "S"]:
        return jnp.cumsum(jnp.where(is_served, price, 0.0))

    def is_over(state: tuple[Array, Array]) -> Bool[Array, "S"]:
        return state[0] & (state[1] > left)

    def pass_over(state: tuple[Array, Array]) -> tuple[Array, Array]:
        is_served, total = state
        first = jnp.argmax(is_over(state)).astype(jnp.int32)
        rest = left - (total[first] - price[first])
        is_served &= (rank < first) | ((rank > first) & (price <= rest))
        return is_served, running(is_served)

    is_candidate = vary_alike(is_candidate, price, left)
    is_served, _ = jax.lax.while_loop(
        lambda state: jnp.any(is_over(state)), pass_over, (is_candidate, running(is_candidate))
    )
    return jnp.asarray(is_served)


def _count_germinated(is_requested: Bool[Array, "S"], observation: Observation) -> Int32[Array, ""]:
    """How many of the last step's requests hold a slot now; the others were refused later on."""
    owner = observation.owner
    return jnp.sum((owner != NONE) & is_requested[jnp.maximum(owner, 0)], dtype=jnp.int32)


@record
class CooldownState(NamedTuple):
    """State of `cooldown`."""

    steps: Int32[Array, ""]
    last: Int32[Array, ""]
    """Step of the last germination, or `NONE`."""
    is_requested: Bool[Array, "S"]
    """Germinations that passed this rule in the last step."""


def cooldown(steps: int) -> Policy:
    """Lets nothing germinate for some steps after a germination that passed this rule.

    Only germinations that took place count.

    Args:
      steps: length of the pause, not negative.

    Returns:
      The policy.

    Raises:
      ValueError: `steps` is negative.
    """
    check_counts(steps=steps)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps!r}")

    def decide(
        layout: Layout, state: CooldownState, observation: Observation, requests: Requests, key: Key
    ) -> tuple[CooldownState, Requests]:
        del layout, key
        step = observation.step
        has_germinated = _count_germinated(state.is_requested, observation) > 0
        last = jnp.where(has_germinated, step - 1, state.last)
        is_soon = (last >= 0) & (step - last < state.steps)
        after = refuse(requests, jnp.broadcast_to(is_soon, requests.kind.shape))
        return state._replace(last=last, is_requested=can_germinate(after, observation)), after

    def init(layout: Layout) -> CooldownState:
        none = jnp.zeros((layout.num_seeds,), bool)
        return CooldownState(jnp.int32(steps), jnp.int32(NONE), none)

    return rule("cooldown", init, decide)


@record
class MaxTotalState(NamedTuple):
    """State of `max_total`."""

    left: Int32[Array, ""]
    """Germinations that are still allowed."""
    is_requested: Bool[Array, "S"]
    """Germinations that passed this rule in the last step."""


def max_total(limit: int) -> Policy:
    """Lets at most `limit` seeds germinate over the whole run.

    Only germinations that passed this rule and took place count.

    Args:
      limit: germinations, not negative.

    Returns:
      The policy.

    Raises:
      ValueError: `limit` is negative.
    """
    check_counts(limit=limit)
    if limit < 0:
        raise ValueError(f"limit must not be negative, got {limit!r}")

    def decide(
        layout: Layout, state: MaxTotalState, observation: Observation, requests: Requests, key: Key
    ) -> tuple[MaxTotalState, Requests]:
        del layout, key
        left = state.left - _count_germinated(state.is_requested, observation)
        after = if_germinating(requests, lambda requests: _serve_first(requests, observation, left))
        return MaxTotalState(left=left, is_requested=can_germinate(after, observation)), after

    def init(layout: Layout) -> MaxTotalState:
        return MaxTotalState(jnp.int32(limit), jnp.zeros((layout.num_seeds,), bool))

    return rule("max_total", init, decide)


def stop_after(num_steps: int) -> Policy:
    """Lets nothing germinate after the first `num_steps` steps, so that what grows can finish.

    Args:
      num_steps: steps in which seeds may germinate.

    Returns:
      The policy.
    """
    check_counts(num_steps=num_steps)

    def decide(
        layout: Layout, state: Any, observation: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        del layout, key
        is_late = observation.step >= state.limit
        return state, refuse(requests, jnp.broadcast_to(is_late, requests.kind.shape))

    return rule("stop_after", lambda layout: LimitState(jnp.int32(num_steps)), decide)
