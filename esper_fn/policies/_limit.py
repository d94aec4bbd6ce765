"""Rules that hold growth back; they stand behind the ones that ask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from esper_fn._control import cond
from esper_fn._lattice import Lattice
from esper_fn._typing import Array, Bool, Float32, Int32, Key
from esper_fn.lifecycle import NONE, ON_ITS_WAY, is_in
from esper_fn.policies._base import (
    Observation,
    Policy,
    Proposal,
    by_priority,
    germinations,
    rule,
    strike,
    when_asked,
)


class _Limit(NamedTuple):
    limit: Int32[Array, ""]


def _keep_first(proposal: Proposal, num_kept: Array) -> Proposal:
    """The proposal with only its `num_kept` most urgent germinations."""
    asks = germinations(proposal)

    def is_late() -> Bool[Array, "S"]:
        order = by_priority(proposal)
        place = jnp.arange(order.size, dtype=jnp.int32)
        return jnp.zeros(asks.shape, bool).at[order].set(place >= num_kept)

    # Ordering all seeds is what takes time: only where some are kept and some are not.
    num_asked = jnp.sum(asks, dtype=jnp.int32)
    return strike(
        proposal,
        cond(
            (num_kept > 0) & (num_kept < num_asked),
            is_late,
            lambda: jnp.broadcast_to(num_kept <= 0, asks.shape),
        ),
    )


def concurrency(limit: int) -> Policy:
    """At most `limit` seeds on their way (GERMINATED to FINE_TUNING) at once."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")

    def decide(
        lattice: Lattice, state: _Limit, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Limit, Proposal]:
        del lattice, key
        num_on_their_way = jnp.sum(is_in(seen.seeds.stage, ON_ITS_WAY), dtype=jnp.int32)
        room = state.limit - num_on_their_way
        return state, when_asked(proposal, lambda same: _keep_first(same, room))

    return rule("concurrency", lambda lattice: _Limit(jnp.int32(limit)), decide)


class _Budget(NamedTuple):
    limit: Float32[Array, ""]


_CERTAINLY = 0.999


def budget(parameters: int) -> Policy:
    """At most `parameters` in all living bodies, the requested ones included."""
    if parameters < 0:
        raise ValueError(f"parameters must not be negative, got {parameters!r}")

    def decide(
        lattice: Lattice, state: _Budget, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Budget, Proposal]:
        del key
        tables = lattice.tables
        of_slot = jnp.asarray(tables.costs[tables.slot_group, tables.slot_blueprint])
        spent = jnp.sum(jnp.where(seen.owner != NONE, of_slot, 0.0))

        def narrow(same: Proposal) -> Proposal:
            asks = germinations(same)
            price = jnp.zeros(asks.shape, jnp.float32)
            for index in range(len(lattice.blueprints)):
                is_wanted = asks & (jnp.maximum(same.blueprint, 0) == index)
                price = jnp.where(is_wanted, lattice.per_seed(tables.costs[:, index]), price)

            def is_beyond() -> Bool[Array, "S"]:
                order = by_priority(same)
                is_over = spent + jnp.cumsum(price[order]) > state.limit
                return jnp.zeros(asks.shape, bool).at[order].set(is_over)

            # Ordering all seeds is what takes time: not where all of them fit, roundings included.
            is_ample = spent + jnp.sum(price) < state.limit * _CERTAINLY
            return strike(same, cond(is_ample, lambda: jnp.zeros(asks.shape, bool), is_beyond))

        return state, when_asked(proposal, narrow)

    return rule("budget", lambda lattice: _Budget(jnp.float32(parameters)), decide)


class _Cooldown(NamedTuple):
    steps: Int32[Array, ""]
    last: Int32[Array, ""]


def cooldown(steps: int) -> Policy:
    """No germination within `steps` steps after the last one that passed this rule."""
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps!r}")

    def decide(
        lattice: Lattice, state: _Cooldown, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Cooldown, Proposal]:
        del lattice, key
        is_hot = (state.last >= 0) & (seen.step - state.last < state.steps)
        cooled = strike(proposal, jnp.broadcast_to(is_hot, proposal.kind.shape))
        passes = jnp.any(germinations(cooled))
        return state._replace(last=jnp.where(passes, seen.step, state.last)), cooled

    return rule("cooldown", lambda lattice: _Cooldown(jnp.int32(steps), jnp.int32(NONE)), decide)


class _Quota(NamedTuple):
    left: Int32[Array, ""]


def quota(germinations_allowed: int) -> Policy:
    """At most so many germinations that passed this rule, over the whole run."""
    if germinations_allowed < 0:
        raise ValueError(f"must not be negative, got {germinations_allowed!r}")

    def decide(
        lattice: Lattice, state: _Quota, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[_Quota, Proposal]:
        del lattice, seen, key
        kept = when_asked(proposal, lambda same: _keep_first(same, state.left))
        used = jnp.sum(germinations(kept), dtype=jnp.int32)
        return _Quota(left=state.left - used), kept

    return rule("quota", lambda lattice: _Quota(jnp.int32(germinations_allowed)), decide)


def until(step: int) -> Policy:
    """No germination from step `step` on, so that what grows can still finish."""

    def decide(
        lattice: Lattice, state: Any, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[Any, Proposal]:
        del lattice, key
        is_late = seen.step >= state.limit
        return state, strike(proposal, jnp.broadcast_to(is_late, proposal.kind.shape))

    return rule("until", lambda lattice: _Limit(jnp.int32(step)), decide)
