"""Published ways to keep a network plastic, as methods of `benchmarks._plastic_network`.

A method that resets a unit draws its incoming weights anew, sets its bias and outgoing weights to
zero, and clears the moments *and step counts* of all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks._plastic_network import (
    Hyper,
    Method,
    Params,
    State,
    forget,
    hidden_numbers,
    init_params,
    reset_units,
    sizes,
)


def plain() -> Method:
    """Does nothing; with `hyper.l2` it is L2 regularisation towards zero, through the loss."""
    return Method(lambda params: (), lambda state, hidden, hyper: state)


def shrink_and_perturb() -> Method:
    """`params <- (1 - shrink) params + noise fresh`, in every step, `fresh` a new initialisation.

    Ash & Adams, NeurIPS 2020, who do it where new data arrive; in every step no task need be known
    (Dohare et al., Nature 632:768, 2024).
    """

    def update(state: State, hidden: Sequence[jax.Array], hyper: Hyper) -> State:
        del hidden
        fresh = init_params(jax.random.fold_in(state.key, state.step), sizes(state.params))
        params = jax.tree.map(
            lambda p, f: (1 - hyper.shrink) * p + hyper.noise * f, state.params, fresh
        )
        return state._replace(params=params)

    return Method(lambda params: (), update)


def full_reset(task_steps: int) -> Method:
    """Starts anew with each task: an oracle, for it knows when they end."""

    def update(state: State, hidden: Sequence[jax.Array], hyper: Hyper) -> State:
        del hidden, hyper
        is_over = state.step % task_steps == 0
        fresh = init_params(jax.random.fold_in(state.key, state.step), sizes(state.params))
        params = jax.tree.map(lambda f, p: jnp.where(is_over, f, p), fresh, state.params)
        is_new = jax.tree.map(lambda p: jnp.broadcast_to(is_over, p.shape), params)
        return state._replace(params=params, moments=forget(state.moments, is_new))

    return Method(lambda params: (), update)


_ACTIVITY_DECAY = 0.99


def redo() -> Method:
    """Every `period` steps resets the units with at most `dormant` of their layer's mean activity.

    Sokar et al., ICML 2023. Activity is `|h|`, averaged over the batch and, since a batch may be a
    single example, over about the last 100 steps.
    """

    def update(state: State, hidden: Sequence[jax.Array], hyper: Hyper) -> State:
        activity = [
            _ACTIVITY_DECAY * a + (1 - _ACTIVITY_DECAY) * jnp.mean(jnp.abs(h), axis=0)
            for a, h in zip(state.statistics, hidden, strict=True)
        ]
        is_due = (state.step % hyper.period == 0) & (hyper.dormant > 0)
        is_reset = [is_due & (a <= hyper.dormant * jnp.mean(a)) for a in activity]
        return reset_units(state._replace(statistics=activity), is_reset)

    return Method(hidden_numbers, update)


class Worth(NamedTuple):
    """What continual backprop knows of the units of each hidden layer."""

    utility: list[jax.Array]
    activation: list[jax.Array]
    """Running mean of `h`."""
    age: list[jax.Array]
    due: list[jax.Array]
    """Units to replace, a fraction that is saved up."""


_UTILITY_DECAY = 0.99


def continual_backprop() -> Method:
    """Replaces the units of least utility, few in each step (Dohare et al., Nature 632:768, 2024).

    The utility of a unit is a running mean of `|h| sum |outgoing weights|`. In each step
    `replacement` of the units older than `maturity` are due, and as many whole units as are due go.
    What a unit adds on average moves into the biases of the next layer, as in the published code.
    """

    def init(params: Params) -> Worth:
        zeros = hidden_numbers(params)
        return Worth(utility=zeros, activation=zeros, age=zeros, due=[jnp.zeros(()) for _ in zeros])

    def update(state: State, hidden: Sequence[jax.Array], hyper: Hyper) -> State:
        worth, params = state.statistics, list(state.params)
        new: tuple[list[jax.Array], ...] = ([], [], [], [])
        is_reset = []
        for k, h in enumerate(hidden):
            out, bias = params[k + 1]
            decay = _UTILITY_DECAY
            age = worth.age[k] + 1
            amount = jnp.mean(jnp.abs(h), axis=0) * jnp.sum(jnp.abs(out), axis=1)
            utility = decay * worth.utility[k] + (1 - decay) * amount
            activation = decay * worth.activation[k] + (1 - decay) * jnp.mean(h, axis=0)
            is_mature = age > hyper.maturity
            due = worth.due[k] + hyper.replacement * jnp.sum(is_mature)
            count = jnp.floor(due)
            ranks = _ranks(jnp.where(is_mature, utility / (1 - decay**age), jnp.inf))
            gone = is_mature & (ranks < count)
            average = jnp.where(gone, activation / (1 - decay**age), 0.0)
            params[k + 1] = (out, bias + average @ out)
            is_reset.append(gone)
            values = (utility, activation, age)
            for column, value in zip(new, values, strict=False):
                column.append(jnp.where(gone, 0.0, value))
            new[3].append(due - count)
        state = state._replace(params=params, statistics=Worth(*new))
        return reset_units(state, is_reset)

    return Method(init, update)


def _ranks(values: jax.Array) -> jax.Array:
    """The rank of each value, 0 for the least."""
    return jnp.argsort(jnp.argsort(values, stable=True), stable=True)


class Silence(NamedTuple):
    """What self-normalised resets know of the units of each hidden layer."""

    silent: list[jax.Array]
    """Steps since a unit fired."""
    counts: list[jax.Array]
    """`[units, bins]`, how often a silence was how long."""
    threshold: list[jax.Array]
    """Steps of silence that reset a unit."""


_BINS = 64
_FIRST_THRESHOLD = 64.0
_LONGEST = 2.0 ** (_BINS / 4)


def self_normalised_resets() -> Method:
    """Resets a unit that is silent for longer than it has usually been (Farias & Jozefiak, 2025).

    A unit fires in a step where any example of the batch activates it. A silence longer than the
    unit's own `percentile` resets it. As in the published code the threshold moves every `period`
    steps: down to the percentile of the silences since, or, where that is not below it, to its
    double. Silences are counted in bins of a quarter octave. ICLR 2025.
    """

    def init(params: Params) -> Silence:
        return Silence(
            silent=hidden_numbers(params),
            counts=[jnp.zeros((*units.shape, _BINS)) for units in hidden_numbers(params)],
            threshold=hidden_numbers(params, _FIRST_THRESHOLD),
        )

    def update(state: State, hidden: Sequence[jax.Array], hyper: Hyper) -> State:
        known, is_reset = state.statistics, []
        new: tuple[list[jax.Array], ...] = ([], [], [])
        is_due = state.step % hyper.period == 0
        for h, silent, past, threshold in zip(hidden, *known, strict=True):
            fires = jnp.any(h > 0, axis=0)
            length = silent + 1  # a unit that fires in every step has silences of 1
            gone = ~fires & (length > threshold)
            bins = jnp.clip(jnp.ceil(4 * jnp.log2(length)), 0, _BINS - 1).astype(jnp.int32)
            ends = (fires | gone).astype(jnp.float32)[:, None]
            counts = past + ends * jax.nn.one_hot(bins, _BINS)
            moved = _next_threshold(counts, threshold, hyper.percentile)
            new[0].append(jnp.where(fires | gone, 0.0, length))
            new[1].append(jnp.where(is_due, 0.0, counts))
            new[2].append(jnp.where(is_due, moved, threshold))
            is_reset.append(gone)
        return reset_units(state._replace(statistics=Silence(*new)), is_reset)

    return Method(init, update)


def _next_threshold(counts: jax.Array, threshold: jax.Array, percentile: jax.Array) -> jax.Array:
    """Moves thresholds `[units]` by the silences `[units, bins]` since the last move."""
    sums = jnp.cumsum(counts, axis=1)
    is_enough = (sums >= percentile * sums[:, -1:]) & (sums[:, -1:] > 0)
    usual = 2.0 ** (jnp.argmax(is_enough, axis=1) / 4)
    is_known = jnp.any(is_enough, axis=1) & (usual < threshold)
    return jnp.where(is_known, usual, jnp.minimum(2 * threshold, _LONGEST))
