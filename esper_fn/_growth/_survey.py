"""A survey: where growth would pay, and what living adapters are worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn._arguments import check_function
from esper_fn._control import vary_alike
from esper_fn._growth._checks import check_state, loss_of
from esper_fn._growth._state import GrowthState, LossFn, Parts
from esper_fn._layout import slot_gains, view, zero_probes, zero_taps
from esper_fn._leaves import check_leaves
from esper_fn._survey import Ablations, SurveyInfo, apply_survey, losses_without, seeds_to_ablate
from esper_fn._typing import Array, Implementation, Params, Scalar
from esper_fn.lifecycle._state import NONE


class SurveyOptions(NamedTuple):
    """How a survey computes; static. See `Growth`."""

    adapters_at_once: int | None
    implementation: Implementation
    max_ablations: int


def make_survey(
    parts: Parts, options: SurveyOptions, loss_fn: LossFn, *, has_aux: bool
) -> Callable[..., tuple[GrowthState, SurveyInfo]]:
    """A function that surveys; arguments and results as of `Growth.survey`."""
    check_function("loss_fn", loss_fn, "loss_fn(params, seeds, *args)")
    layout = parts.layout

    def survey(
        params: Params, state: GrowthState, *args: Any, **kwargs: Any
    ) -> tuple[GrowthState, SurveyInfo]:
        check_state(parts, state, "(params, state, *args)")
        check_leaves("params", params)
        taps = zero_taps(layout)
        # What a survey measures counts as constant.
        fixed, adapters = jax.lax.stop_gradient((params, state.adapters))

        def loss(gains: Array, probes: Any) -> Scalar:
            # Under the `vmap` of the ablations every round would select among whole activations.
            is_ablation = probes is None
            seeds = view(
                layout,
                state.owner,
                gains,
                adapters,
                taps,
                probes=probes,
                at_once=None if is_ablation else options.adapters_at_once,
                implementation="loops" if is_ablation else options.implementation,
            )
            value = loss_of(loss_fn(fixed, seeds, *args, **kwargs), has_aux)
            return jnp.asarray(value[0] if has_aux else value, jnp.float32)

        gains = slot_gains(state.seeds, state.owner, state.settings)
        with_all, moments = jax.value_and_grad(loss, argnums=1)(
            gains, vary_alike(zero_probes(layout), state.owner)
        )
        chosen, is_chosen = seeds_to_ablate(state.seeds, options.max_ablations)

        def loss_without(seed: Array) -> Scalar:
            is_left_out = (state.owner == seed) & (state.owner != NONE)
            return loss(jnp.where(is_left_out[:, None], 0.0, gains), None)

        losses = losses_without(loss_without, chosen, jnp.sum(is_chosen, dtype=jnp.int32))
        ablations = Ablations(seed=chosen, is_measured=is_chosen, loss=losses)
        seeds, directions, info = apply_survey(
            layout, state.seeds, state.directions, moments, with_all, ablations
        )
        return state._replace(seeds=seeds, directions=directions), info

    return survey
