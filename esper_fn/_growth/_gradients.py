"""Gradients of a growing network, and the statistics of its seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from esper_fn._arguments import check_function
from esper_fn._control import vary_alike
from esper_fn._growth._checks import check_reached, check_state, loss_of, no_gradient
from esper_fn._growth._state import GrowthState, LossFn, Parts
from esper_fn._layout import slot_gains, statistics_of, view, zero_taps
from esper_fn._leaves import check_leaves, combine, partition
from esper_fn._sites import Visits
from esper_fn._typing import Adapters, Implementation, Params
from esper_fn.optim import AdapterGradients


def make_gradients(
    parts: Parts,
    adapters_at_once: int | None,
    implementation: Implementation,
    loss_fn: LossFn,
    *,
    has_aux: bool,
) -> Callable[..., Any]:
    """A function that differentiates; arguments and results as of `Growth.value_and_grad`."""
    check_function("loss_fn", loss_fn, "loss_fn(params, seeds, *args)")
    layout = parts.layout

    def value_and_grad(params: Params, state: GrowthState, *args: Any, **kwargs: Any) -> Any:
        check_state(parts, state, "(params, state, *args)")
        check_leaves("params", params)
        visits = Visits()
        learning, still = partition(params)
        gains = slot_gains(state.seeds, state.owner, state.settings)

        def loss(learning: Params, adapters: Adapters, taps: Any) -> Any:
            seeds = view(
                layout,
                state.owner,
                gains,
                adapters,
                taps,
                at_once=adapters_at_once,
                implementation=implementation,
                visits=visits,
            )
            value = loss_fn(combine(learning, still), seeds, *args, **kwargs)
            return loss_of(value, has_aux)

        value, (d_learning, d_adapters, d_taps) = jax.value_and_grad(
            loss, argnums=(0, 1, 2), has_aux=has_aux
        )(learning, state.adapters, vary_alike(zero_taps(layout), state.owner))
        check_reached(layout, visits)
        d_params = combine(d_learning, jax.tree.map(no_gradient, still))
        return value, (d_params, AdapterGradients(d_adapters)), statistics_of(d_taps)

    return value_and_grad
