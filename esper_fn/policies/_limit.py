"""Rules that hold growth back; they stand behind the ones that ask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._arguments import check_counts, check_numbers
from esper_fn._control import cond, vary_alike
from esper_fn._layout import Layout
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.lifecycle import NONE, ON_ITS_WAY, is_in
from esper_fn.policies._base import (
    Observation,
    Policy,
    Requests,
    by_priority,
    rule,
    servable,
    strike,
    when_asked,
)


class _Limit(NamedTuple):
    limit: Int32[Array, ""]


def _keep_first(requests: Requests, seen: Observation, num_kept: Array) -> Requests:
    """The requests with only its `num_kept` most urgent germinations."""
    asks = servable(requests, seen)

    def is_late() -> Bool[Array, "S"]:
        order = by_priority(requests, asks)
        place = jnp.arange(order.size, dtype=jnp.int32)
        return jnp.zeros(asks.shape, bool).at[order].set(place >= num_kept)

    # Ordering all seeds is what takes time: only where some are kept and some are not.
    num_asked = jnp.sum(asks, dtype=jnp.int32)
    is_struck = cond(
        (num_kept > 0) & (num_kept < num_asked),
        is_late,
        lambda: jnp.broadcast_to(num_kept <= 0, asks.shape),
    )
    return strike(requests, is_struck & asks)


def concurrency(limit: int) -> Policy:
    """At most `limit` seeds on their way (GERMINATED to FINE_TUNING) at once."""
    check_counts(limit=limit)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")

    def decide(
        layout: Layout, state: _Limit, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Limit, Requests]:
        del layout, key
        num_on_their_way = jnp.sum(is_in(seen.seeds.stage, ON_ITS_WAY), dtype=jnp.int32)
        room = state.limit - num_on_their_way
        return state, when_asked(requests, lambda same: _keep_first(same, seen, room))

    return rule("concurrency", lambda layout: _Limit(jnp.int32(limit)), decide)


class _Budget(NamedTuple):
    limit: Float32[Array, ""]


_CERTAINLY = 0.999


def budget(parameters: int) -> Policy:
    """At most `parameters` in all living adapters, the requested ones included.

    Requests are served in their order; one that does not fit is passed over, and the next that
    fits is taken. Rules before this one ask for adapters that fit, as long as there are any.
    """
    check_numbers(parameters=parameters)
    if parameters < 0:
        raise ValueError(f"parameters must not be negative, got {parameters!r}")

    def room(layout: Layout, state: _Budget, seen: Observation) -> Float32[Array, ""]:
        tables = layout.tables
        of_slot = jnp.asarray(tables.costs[tables.slot_group, tables.slot_blueprint])
        return state.limit - jnp.sum(jnp.where(seen.owner != NONE, of_slot, 0.0))

    def admit(layout: Layout, state: _Budget, seen: Observation) -> Bool[Array, "G B"]:
        return jnp.asarray(layout.tables.costs) <= room(layout, state, seen)

    def decide(
        layout: Layout, state: _Budget, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Budget, Requests]:
        del key
        left = room(layout, state, seen)

        def narrow(same: Requests) -> Requests:
            asks = servable(same, seen)
            price = jnp.zeros(asks.shape, jnp.float32)
            for index in range(len(layout.blueprints)):
                is_wanted = asks & (jnp.maximum(same.blueprint, 0) == index)
                price = jnp.where(is_wanted, layout.per_seed(layout.tables.costs[:, index]), price)

            def some() -> Bool[Array, "S"]:
                order = by_priority(same, asks)
                is_served = _affordable(price[order], asks[order], left)
                return jnp.zeros(asks.shape, bool).at[order].set(~is_served)

            # Ordering all seeds is what takes time: neither where all of them fit, roundings
            # included, nor where none does.
            is_ample = jnp.sum(price) < left - (1 - _CERTAINLY) * state.limit
            is_hopeless = jnp.min(jnp.where(asks, price, jnp.inf)) > left
            is_struck = cond(
                is_ample | is_hopeless, lambda: jnp.broadcast_to(is_hopeless, asks.shape), some
            )
            return strike(same, is_struck & asks)

        return state, when_asked(requests, narrow)

    return rule("budget", lambda layout: _Budget(jnp.float32(parameters)), decide, admit)


def _affordable(
    price: Float32[Array, "S"], asks: Bool[Array, "S"], left: Float32[Array, ""]
) -> Bool[Array, "S"]:
    """Which requests, served in turn, fit into what the ones before them leave.

    Each round strikes out the first one that does not fit and every later one as dear as that;
    so there are no more rounds than different prices.
    """
    place = jnp.arange(price.size, dtype=jnp.int32)

    def running(is_served: Bool[Array, "S"]) -> Float32[Array, "S"]:
        return jnp.cumsum(jnp.where(is_served, price, 0.0))

    def is_over(state: tuple[Array, Array]) -> Bool[Array, "S"]:
        return state[0] & (state[1] > left)

    def pass_over(state: tuple[Array, Array]) -> tuple[Array, Array]:
        is_served, total = state
        first = jnp.argmax(is_over(state)).astype(jnp.int32)
        rest = left - (total[first] - price[first])
        is_served &= (place < first) | ((place > first) & (price <= rest))
        return is_served, running(is_served)

    asks = vary_alike(asks, price, left)
    served, _ = jax.lax.while_loop(
        lambda state: jnp.any(is_over(state)), pass_over, (asks, running(asks))
    )
    return jnp.asarray(served)


def _births(requested: Bool[Array, "S"], seen: Observation) -> Int32[Array, ""]:
    """How many of the last step's requests hold a slot now: the others were refused later on."""
    is_born = (seen.owner != NONE) & requested[jnp.maximum(seen.owner, 0)]
    return jnp.sum(is_born, dtype=jnp.int32)


class _Cooldown(NamedTuple):
    steps: Int32[Array, ""]
    last: Int32[Array, ""]
    requested: Bool[Array, "S"]


def cooldown(steps: int) -> Policy:
    """No germination within `steps` steps after the last that passed this rule and took place."""
    check_counts(steps=steps)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps!r}")

    def decide(
        layout: Layout, state: _Cooldown, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Cooldown, Requests]:
        del layout, key
        last = jnp.where(_births(state.requested, seen) > 0, seen.step - 1, state.last)
        is_hot = (last >= 0) & (seen.step - last < state.steps)
        cooled = strike(requests, jnp.broadcast_to(is_hot, requests.kind.shape))
        return state._replace(last=last, requested=servable(cooled, seen)), cooled

    def init(layout: Layout) -> _Cooldown:
        nobody = jnp.zeros((layout.num_seeds,), bool)
        return _Cooldown(jnp.int32(steps), jnp.int32(NONE), nobody)

    return rule("cooldown", init, decide)


class _Quota(NamedTuple):
    left: Int32[Array, ""]
    requested: Bool[Array, "S"]


def quota(germinations_allowed: int) -> Policy:
    """At most so many germinations that passed this rule and took place, over the whole run."""
    check_counts(germinations_allowed=germinations_allowed)
    if germinations_allowed < 0:
        raise ValueError(f"germinations_allowed must not be negative, got {germinations_allowed!r}")

    def decide(
        layout: Layout, state: _Quota, seen: Observation, requests: Requests, key: Key
    ) -> tuple[_Quota, Requests]:
        del layout, key
        left = state.left - _births(state.requested, seen)
        kept = when_asked(requests, lambda same: _keep_first(same, seen, left))
        return _Quota(left=left, requested=servable(kept, seen)), kept

    def init(layout: Layout) -> _Quota:
        nobody = jnp.zeros((layout.num_seeds,), bool)
        return _Quota(jnp.int32(germinations_allowed), nobody)

    return rule("quota", init, decide)


def until(step: int) -> Policy:
    """No germination from step `step` on, so that what grows can still finish."""
    check_counts(step=step)

    def decide(
        layout: Layout, state: Any, seen: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        del layout, key
        is_late = seen.step >= state.limit
        return state, strike(requests, jnp.broadcast_to(is_late, requests.kind.shape))

    return rule("until", lambda layout: _Limit(jnp.int32(step)), decide)
