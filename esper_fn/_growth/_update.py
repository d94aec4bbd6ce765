"""One step of every seed's life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from esper_fn import _execute, governors, grafting, lifecycle, policies, telemetry
from esper_fn._control import cond, once_if
from esper_fn._growth._births import spend
from esper_fn._growth._checks import (
    check_adapters,
    check_commands,
    check_state,
    check_statistics,
    scalar_loss,
)
from esper_fn._growth._state import GrowthState, StepInfo
from esper_fn._layout import give, give_birth, release, select_slots, slot_gains
from esper_fn._typing import Adapters, Array, Bool, Float32, Key, Params, Scalar
from esper_fn.commands import Commands, no_commands
from esper_fn.grafting._select import restart, start_alpha, update_alpha
from esper_fn.lifecycle import NONE, OWNS_ADAPTER, Gate, Move, SeedState, Stage, is_in
from esper_kernels import Statistics

if TYPE_CHECKING:
    from esper_fn._growth._growth import Growth


def update(
    growth: Growth,
    state: GrowthState,
    adapters: Adapters,
    statistics: Statistics,
    loss: Scalar,
    commands: Commands | None = None,
) -> tuple[GrowthState, StepInfo]:
    """`Growth.update`."""
    call = "update(state, adapters, statistics, loss, commands)"
    check_state(growth, state, call)
    check_adapters(growth, adapters, "adapters")
    kept, drift, adapter_error = _settle(growth, state, adapters)
    after, info, birth_key = advance(
        growth, state, statistics, loss, drift=drift, has_broken=adapter_error, commands=commands
    )
    born = give_birth(
        growth.layout,
        kept,
        after.generation != state.generation,
        birth_key,
        owner=after.owner,
        memory=state.memory,
    )
    return after._replace(adapters=born), info


def advance(
    growth: Growth,
    state: GrowthState,
    statistics: Statistics,
    loss: Scalar,
    *,
    drift: Float32[Array, "S"],
    has_broken: Bool[Array, "S"],
    commands: Commands | None,
) -> tuple[GrowthState, StepInfo, Key]:
    """`Growth.advance`."""
    call = "advance(state, statistics, loss, drift=..., has_broken=..., commands=...)"
    check_state(growth, state, call, with_adapters=False)
    check_statistics(statistics)
    loss = scalar_loss(loss)
    commands = check_commands(commands)
    commands = no_commands(1) if commands is None else commands
    policy_key, birth_key, key = jax.random.split(state.key, 3)
    loss, statistics = jax.lax.stop_gradient((jnp.asarray(loss, jnp.float32), statistics))
    track, is_spike = lifecycle.track_loss(state.loss, loss)
    seeds, shown = telemetry.take_in(state.seeds, statistics, is_spike, has_broken)
    judged, verdict = growth.governor.update(
        state.governor,
        governors.Observation(seeds=seeds, loss=loss, track=track, drift=drift),
    )
    variation = lifecycle.loss_variation(track)
    grafts, seeds = _move_alpha(growth, state.grafts, seeds, track, is_spike, drift, shown)
    signals = lifecycle.Signals(
        has_error=shown.has_error,
        is_quarantined=verdict.is_quarantined,
        loss_variation=variation,
        has_training_place=lifecycle.has_training_place(seeds, state.settings),
    )
    limits = state.settings

    stays = lifecycle.stay(growth.layout.num_seeds)
    move = cond(
        jnp.any(signals.has_error | signals.is_quarantined),
        lambda: lifecycle.follow(stays, seeds, signals, limits, lifecycle.GUARD_EDGES),
        lambda: stays,
    )
    policy, requests = growth.policy.decide(
        growth.layout,
        state.policy,
        policies.Observation(step=state.step, seeds=seeds, owner=state.owner, loss=track),
        policies.no_requests(growth.layout.num_seeds),
        policy_key,
    )
    done = _execute.execute(
        growth.layout,
        seeds,
        state.owner,
        _execute.merge(growth.layout, commands, requests),
        num_grafts=len(growth.grafts),
        guarded=move,
        is_vetoing=verdict.forbids_germination,
    )
    seeds, move = done.seeds, done.move
    own = lifecycle.follow(move, seeds, signals, limits, lifecycle.EDGES)
    waits = (move.target == NONE) & seeds.is_paused
    move = Move(*(jnp.where(waits, old, new) for old, new in zip(move, own, strict=True)))

    before = seeds.stage
    evidence, is_measured = _evidence(seeds, variation)
    waiting_for = jnp.where(
        move.target == NONE,
        lifecycle.waiting_for(seeds, signals, limits),
        jnp.int8(Gate.OPEN),
    )
    blueprint = seeds.blueprint
    seeds = lifecycle.enter(seeds, move, limits)
    begins_to_graft = (move.target == Stage.GRAFTING) | (
        (seeds.stage == Stage.GRAFTING) & (seeds.graft != state.seeds.graft)
    )
    seeds = seeds._replace(
        alpha=jnp.where(
            move.target == Stage.GRAFTING,
            start_alpha(growth.grafts, seeds.graft),
            seeds.alpha,
        ),
    )
    grafts = restart(growth.grafts, grafts, choice=seeds.graft, begins=begins_to_graft)
    holds = is_in(seeds.stage, OWNS_ADAPTER)
    owner = give(release(state.owner, holds), done.slot, done.is_born)
    seeds = seeds._replace(
        slot=jnp.where(holds, seeds.slot, NONE),
        blueprint=jnp.where(holds, seeds.blueprint, jnp.int8(NONE)),
    )
    is_born = (owner != NONE) & done.is_born[jnp.maximum(owner, 0)]
    memory, num_directed = state.memory, jnp.int32(0)
    if memory is not None:
        memory, num_directed = spend(growth.layout, memory, done.is_born, seeds.blueprint)
    after = state._replace(
        seeds=seeds,
        owner=owner,
        generation=state.generation + is_born.astype(jnp.int32),
        loss=track,
        grafts=grafts,
        policy=policy,
        governor=judged,
        key=key,
        step=state.step + 1,
        memory=memory,
    )
    gains = slot_gains(seeds, owner, limits)
    tables = growth.layout.tables
    of_slot = (tables.slot_group, tables.slot_blueprint)
    is_live = jnp.any(gains != 0, axis=-1)
    info = StepInfo(
        loss=loss,
        before=before,
        stage=seeds.stage,
        cause=move.cause,
        waiting_for=waiting_for,
        evidence=evidence,
        is_measured=is_measured,
        alpha=seeds.alpha,
        blueprint=jnp.where(holds, seeds.blueprint, blueprint),
        request_code=done.code,
        requested_by=requests.requested_by,
        vetoed_by=requests.vetoed_by,
        outcomes=_execute.answer(growth.layout, commands, done.code, before, seeds.stage),
        verdict=verdict,
        steps_undone=jnp.int32(0),
        num_live=jnp.sum(is_live, dtype=jnp.int32),
        num_parameters=jnp.sum(
            jnp.where(gains[:, 0] != 0, jnp.asarray(tables.costs[of_slot]), 0.0)
        ),
        num_flops=jnp.sum(jnp.where(is_live, jnp.asarray(tables.flops[of_slot]), 0.0)),
        num_directed=num_directed,
        num_barren=jnp.sum(
            (seeds.stage == Stage.DORMANT) & (seeds.num_potentials > 0) & (seeds.potential == 0),
            dtype=jnp.int32,
        ),
    )
    return after, info, birth_key


def _settle(
    growth: Growth, state: GrowthState, adapters: Adapters
) -> tuple[Adapters, Float32[Array, "S"], Bool[Array, "S"]]:
    """Parameters that may stand, how far each adapter moved, and which ones broke."""
    learns = slot_gains(state.seeds, state.owner, state.settings)[:, 1] != 0

    def take_in(still: tuple[Adapters, Array, Array]) -> tuple[Adapters, Array, Array]:
        kept: dict[str, dict[str, Any]] = {site: {} for site in adapters}
        drifts, errors = [], []
        for bank in growth.layout.tables.banks:
            site = growth.layout.sites[bank.site].name
            name = growth.layout.names[bank.blueprint]
            kept[site][name], drift, error = _take_in(
                still[0][site][name],
                adapters[site][name],
                learns[bank.start : bank.start + bank.num_slots],
            )
            drifts.append(drift)
            errors.append(error)
        return kept, jnp.concatenate(drifts), jnp.concatenate(errors)

    still = (state.adapters, jnp.zeros(learns.shape, jnp.float32), jnp.zeros_like(learns))
    kept, drifts, errors = once_if(jnp.any(learns), take_in, still)
    where = jnp.where(state.owner == NONE, growth.layout.num_seeds, state.owner)
    num_seeds = growth.layout.num_seeds
    # Constant, like all that is measured; the root has no derivative where nothing moved.
    drifts = jax.lax.stop_gradient(drifts)
    drift = jnp.zeros((num_seeds,), jnp.float32).at[where].set(drifts, mode="drop")
    error = jnp.zeros((num_seeds,), bool).at[where].set(errors, mode="drop")
    return kept, drift, error


def _move_alpha(
    growth: Growth,
    states: tuple[Any, ...],
    seeds: SeedState,
    track: lifecycle.LossTrack,
    is_spike: Bool[Array, ""],
    drift: Float32[Array, "S"],
    shown: telemetry.SeedEvidence,
) -> tuple[tuple[Any, ...], SeedState]:
    """One step of the alpha schedule of every seed that is grafted."""
    shape = seeds.stage.shape
    trend = (track.fast - track.slow) / (jnp.abs(track.slow) + 1e-12)
    states, alpha = update_alpha(
        growth.grafts,
        states,
        grafting.Observation(
            is_spike=jnp.broadcast_to(is_spike, shape),
            loss_trend=jnp.broadcast_to(trend, shape),
            drift=drift,
            gradient_ratio=shown.gradient_ratio,
            stability=seeds.stability,
        ),
        choice=seeds.graft,
        alpha=seeds.alpha,
        is_moving=(seeds.stage == Stage.GRAFTING) & ~seeds.is_paused & ~shown.has_error,
    )
    return states, seeds._replace(alpha=alpha)


def _square(leaf: Array) -> Float32[Array, "P"]:
    return jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim)))


def _evidence(seeds: SeedState, variation: Scalar) -> tuple[Float32[Array, "S"], Bool[Array, "S"]]:
    stage = seeds.stage
    contribution = seeds.contribution, seeds.num_contributions > 0
    measured = {
        Stage.DORMANT: (seeds.potential, seeds.num_potentials > 0),
        Stage.TRAINING: (seeds.telemetry.utility, seeds.telemetry.num_live_steps > 0),
        Stage.GRAFTING: (seeds.alpha, jnp.ones(stage.shape, bool)),
        Stage.STABILIZATION: (variation, jnp.isfinite(variation)),
        Stage.EVALUATING: contribution,
        Stage.FINE_TUNING: contribution,
    }
    told, is_measured = jnp.zeros(stage.shape, jnp.float32), jnp.zeros(stage.shape, bool)
    for of, (value, is_known) in measured.items():
        told = jnp.where((stage == of) & is_known, value, told)
        is_measured = jnp.where(stage == of, is_known, is_measured)
    return told, is_measured


def _take_in(
    old: Params, new: Params, learns: Bool[Array, "P"]
) -> tuple[Params, Float32[Array, "P"], Bool[Array, "P"]]:
    """One bank's new parameters where they may stand, how far they moved, and which ones broke."""
    if not jax.tree.leaves(old):
        return old, jnp.zeros(learns.shape, jnp.float32), jnp.zeros_like(learns)
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    moved = sum(_square(b.astype(jnp.float32) - a.astype(jnp.float32)) for a, b in pairs)
    size = sum(_square(a.astype(jnp.float32)) for a, _ in pairs)
    stands = learns & jnp.isfinite(moved)
    kept = jax.tree.map(lambda a, b: select_slots(stands, b, a), old, new)
    # An adapter of zero has no size to compare with.
    drift = jnp.sqrt(moved) / jnp.where(size > 0, jnp.sqrt(size), jnp.inf)
    return kept, jnp.where(stands, drift, 0.0), learns & ~stands
