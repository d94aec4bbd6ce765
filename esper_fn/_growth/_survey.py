"""What a survey measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from esper_fn import lifecycle, telemetry
from esper_fn._arguments import check_function
from esper_fn._control import vary_alike, vary_as_after
from esper_fn._growth._births import remember
from esper_fn._growth._checks import check_state, loss_of
from esper_fn._growth._state import GrowthState, LossFn, SurveyInfo
from esper_fn._layout import slot_gains, view, zero_probes, zero_taps
from esper_fn._leaves import check_leaves
from esper_fn._sites import Moments
from esper_fn._typing import Array, Bool, Float32, Int32, Params, Scalar
from esper_fn.lifecycle import NONE, Stage, is_in

if TYPE_CHECKING:
    from esper_fn._growth._growth import Growth


def survey(growth: Growth, loss_fn: LossFn, *, has_aux: bool) -> Callable[..., Any]:
    """`Growth.survey`."""
    check_function("loss_fn", loss_fn, "loss_fn(params, seeds, *args)")

    def run(
        params: Params, state: GrowthState, *args: Any, **kwargs: Any
    ) -> tuple[GrowthState, SurveyInfo]:
        check_state(growth, state, "(params, state, *args)")
        check_leaves("params", params)
        taps = zero_taps(growth.layout)
        # What a survey measures counts as constant.
        fixed, adapters = jax.lax.stop_gradient((params, state.adapters))

        # Under the `vmap` of the ablations every round would select among whole activations.
        def loss(gains: Array, probes: Any) -> Scalar:
            at_once = None if probes is None else growth.adapters_at_once
            seeds = view(
                growth.layout,
                state.owner,
                gains,
                adapters,
                taps,
                probes=probes,
                at_once=at_once,
                implementation=growth.implementation if probes is not None else "loops",
            )
            value = loss_of(loss_fn(fixed, seeds, *args, **kwargs), has_aux)
            return jnp.asarray(value[0] if has_aux else value, jnp.float32)

        gains = slot_gains(state.seeds, state.owner, state.settings)
        with_all, moments = jax.value_and_grad(loss, argnums=1)(
            gains, vary_alike(zero_probes(growth.layout), state.owner)
        )
        chosen, is_chosen = on_trial(growth, state)

        def without(index: Array) -> Scalar:
            is_out = (state.owner == index) & (state.owner != NONE)
            return loss(jnp.where(is_out[:, None], 0.0, gains), None)

        missing = _for_the_first(without, chosen, jnp.sum(is_chosen, dtype=jnp.int32))
        return conclude(growth, state, moments, with_all, chosen, is_chosen, missing)

    return run


_ABLATIONS_AT_ONCE = 8


def _for_the_first(
    measure: Callable[[Array], Scalar], chosen: Int32[Array, "V"], count: Int32[Array, ""]
) -> Float32[Array, "V"]:
    """`measure` of the first `count` seeds, a few at once; 0 for the others."""
    size = min(_ABLATIONS_AT_ONCE, chosen.size)
    padded = jnp.pad(chosen, (0, -chosen.size % size))

    def block(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start, measured = carry
        values = jax.vmap(measure)(jax.lax.dynamic_slice(padded, (start,), (size,)))
        return start + size, jax.lax.dynamic_update_slice(measured, values, (start,))

    begun = (jnp.zeros_like(count), jnp.zeros(padded.shape, jnp.float32))
    begun = vary_as_after(block, begun)
    _, measured = jax.lax.while_loop(lambda carry: carry[0] < count, block, begun)
    return measured[: chosen.size]


def on_trial(growth: Growth, state: GrowthState) -> tuple[Int32[Array, "V"], Bool[Array, "V"]]:
    """`Growth.on_trial`."""
    seeds = state.seeds
    awaits = is_in(seeds.stage, [Stage.EVALUATING, Stage.FINE_TUNING])
    urgency = jnp.where(awaits, -seeds.num_contributions.astype(jnp.float32), -jnp.inf)
    count = min(growth.max_ablations, growth.layout.num_seeds)
    urgent, chosen = jax.lax.top_k(urgency, count)
    return chosen.astype(jnp.int32), urgent > -jnp.inf


def conclude(
    growth: Growth,
    state: GrowthState,
    moments: Sequence[Moments],
    loss: Scalar,
    chosen: Int32[Array, "V"],
    is_chosen: Bool[Array, "V"],
    missing: Float32[Array, "V"],
) -> tuple[GrowthState, SurveyInfo]:
    """`Growth.conclude`."""
    seeds = state.seeds
    scores = [telemetry.potentials(moment) for moment in moments]
    raw = jnp.concatenate([score.raw.reshape(-1) for score in scores])
    white = jnp.concatenate([score.whitened.reshape(-1) for score in scores])
    reached = jnp.concatenate([moment.num_rows.reshape(-1) for moment in moments]) > 0
    is_measured = reached & jnp.isfinite(white) & jnp.isfinite(loss)
    worth = missing - loss
    is_known = is_chosen & jnp.isfinite(worth)
    # What may be rounding says nothing for or against an adapter.
    rounding = 4 * jnp.finfo(jnp.float32).eps * jnp.abs(loss)
    worth = jnp.where(jnp.abs(worth) <= rounding, 0.0, worth)
    rows = jnp.where(is_known, chosen, growth.layout.num_seeds)
    # Only where the loss is finite without it has the adapter broken it, not the batch or the host.
    is_broken = is_chosen & jnp.isfinite(missing) & ~jnp.isfinite(loss)
    failed = jnp.where(is_broken, chosen, growth.layout.num_seeds)
    seen = seeds.num_contributions[chosen]
    averaged = jnp.where(
        seen > 0, lifecycle.average(seeds.contribution[chosen], worth, seen, 4.0), worth
    )
    seeds = seeds._replace(
        potential=jnp.where(is_measured, white, seeds.potential),
        num_potentials=seeds.num_potentials + is_measured.astype(jnp.int32),
        contribution=seeds.contribution.at[rows].set(averaged, mode="drop"),
        num_contributions=seeds.num_contributions.at[rows].add(1, mode="drop"),
        error_count=seeds.error_count.at[failed].add(1, mode="drop"),
    )
    memory = state.memory
    if memory is not None:
        is_eligible = is_measured & (seeds.stage == Stage.DORMANT)
        memory = remember(growth.layout, memory, moments, is_eligible, white)
    return state._replace(seeds=seeds, memory=memory), SurveyInfo(
        loss=loss,
        raw_potential=raw,
        potential=white,
        ablated=jnp.where(is_known, chosen, NONE).astype(jnp.int32),
        contribution=jnp.where(is_known, worth, 0.0),
    )
