"""One step of every seed's life, in six phases.

`observe` averages the step's measurements, `judge` asks the governor and moves alphas, `propose`
asks the policy, `resolve` holds commands and requests against the table, `transition` moves seeds
and slots, `report` says what happened.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn import governors, grafting, policies
from esper_fn._growth._checks import check_commands, check_state, check_statistics, scalar_loss
from esper_fn._growth._state import GrowthState, Parts, StepInfo
from esper_fn._layout import Layout, allocate, free_slots, slot_gains
from esper_fn._sites import Statistics
from esper_fn._survey import SiteDirections, consume_directions
from esper_fn._typing import Array, Bool, Float32, Int8, Int32, Key, Scalar
from esper_fn.grafting._select import restart, start_alpha, update_alpha
from esper_fn.lifecycle._commands import Commands, Requests, no_commands, no_requests
from esper_fn.lifecycle._gates import Signals
from esper_fn.lifecycle._loss import LossTrack, loss_variation, track_loss
from esper_fn.lifecycle._moves import (
    Move,
    apply_moves,
    guard_moves,
    has_training_place,
    own_moves,
)
from esper_fn.lifecycle._resolve import Resolved, outcomes, resolve
from esper_fn.lifecycle._stages import OWNS_ADAPTER, Stage
from esper_fn.lifecycle._state import NONE, SeedState, is_in
from esper_fn.lifecycle._telemetry import SeedEvidence, update_telemetry


def advance(
    parts: Parts,
    state: GrowthState,
    statistics: Statistics,
    loss: Scalar,
    *,
    drift: Float32[Array, "S"],
    has_broken: Bool[Array, "S"],
    commands: Commands | None,
    reference_loss: Scalar | None = None,
) -> tuple[GrowthState, StepInfo, Key]:
    """One step of every seed's life, without the adapters' parameters.

    Arguments and results as of `Growth.advance`.
    """
    call = "advance(state, statistics, loss, drift=..., has_broken=..., commands=...)"
    check_state(parts, state, call, with_adapters=False)
    check_statistics(statistics)
    loss = scalar_loss(loss)
    commands = check_commands(commands)
    commands = no_commands(1) if commands is None else commands
    policy_key, birth_key, key = jax.random.split(state.key, 3)
    observed = _observe(state, statistics, loss, drift, has_broken)
    judged = _judge(parts, state, observed, _reference(reference_loss))
    policy, requests = _propose(parts, state, observed, judged, policy_key)
    resolved = resolve(
        judged.seeds,
        state.owner,
        commands,
        requests,
        num_grafts=len(parts.grafts),
        guard=judged.guard,
        forbids_germination=judged.verdict.forbids_germination,
        allocate=lambda owner, asks, blueprint: allocate(parts.layout, owner, asks, blueprint),
    )
    moved = _transition(parts, state, judged, resolved)
    after = state._replace(
        seeds=moved.seeds,
        owner=moved.owner,
        generation=state.generation + moved.is_born.astype(jnp.int32),
        loss=observed.track,
        grafts=moved.grafts,
        policy=policy,
        governor=judged.governor,
        key=key,
        step=state.step + 1,
        directions=moved.directions,
    )
    info = _report(parts.layout, after, observed, judged, commands, requests, resolved, moved)
    return after, info, birth_key


class _Observed(NamedTuple):
    """The measurements of the step."""

    loss: Float32[Array, ""]
    track: LossTrack
    is_spike: Bool[Array, ""]
    variation: Scalar
    drift: Float32[Array, "S"]
    seeds: SeedState
    """The rows with the telemetry of this step."""
    evidence: SeedEvidence


def _observe(
    state: GrowthState,
    statistics: Statistics,
    loss: Scalar,
    drift: Float32[Array, "S"],
    has_broken: Bool[Array, "S"],
) -> _Observed:
    """Averages the measurements of the step; they count as constants."""
    loss, statistics = jax.lax.stop_gradient((jnp.asarray(loss, jnp.float32), statistics))
    track, is_spike = track_loss(state.loss, loss)
    seeds, evidence = update_telemetry(state.seeds, statistics, is_spike, has_broken)
    return _Observed(
        loss=loss,
        track=track,
        is_spike=is_spike,
        variation=loss_variation(track),
        drift=drift,
        seeds=seeds,
        evidence=evidence,
    )


class _Judged(NamedTuple):
    """What nothing overrides."""

    governor: Any
    verdict: governors.Verdict
    grafts: tuple[Any, ...]
    seeds: SeedState
    """The rows with the alphas of this step."""
    signals: Signals
    guard: Move


def _reference(loss: Scalar | None) -> Float32[Array, ""]:
    """The loss of the last good parameters as a constant, NaN where it was not measured."""
    if loss is None:
        return jnp.float32(jnp.nan)
    return jax.lax.stop_gradient(jnp.asarray(scalar_loss(loss), jnp.float32))


def _judge(
    parts: Parts, state: GrowthState, observed: _Observed, reference_loss: Float32[Array, ""]
) -> _Judged:
    """Asks the governor, moves the alphas, and decides the moves of broken seeds."""
    governor, verdict = parts.governor.update(
        state.governor,
        governors.Observation(
            seeds=observed.seeds,
            loss=observed.loss,
            track=observed.track,
            drift=observed.drift,
            reference_loss=reference_loss,
        ),
    )
    grafts, seeds = _move_alpha(parts, state.grafts, observed)
    signals = Signals(
        has_error=observed.evidence.has_error,
        is_quarantined=verdict.is_quarantined,
        loss_variation=observed.variation,
        has_training_place=has_training_place(seeds, state.settings),
    )
    return _Judged(
        governor=governor,
        verdict=verdict,
        grafts=grafts,
        seeds=seeds,
        signals=signals,
        guard=guard_moves(seeds, signals, state.settings),
    )


def _move_alpha(
    parts: Parts, states: tuple[Any, ...], observed: _Observed
) -> tuple[tuple[Any, ...], SeedState]:
    """One step of the alpha schedule of every seed that is grafted."""
    seeds, track = observed.seeds, observed.track
    shape = seeds.stage.shape
    trend = (track.fast - track.slow) / (jnp.abs(track.slow) + 1e-12)
    is_grafted = (seeds.stage == Stage.GRAFTING) & ~seeds.is_paused
    states, alpha = update_alpha(
        parts.grafts,
        states,
        grafting.Observation(
            is_spike=jnp.broadcast_to(observed.is_spike, shape),
            loss_trend=jnp.broadcast_to(trend, shape),
            drift=observed.drift,
            gradient_ratio=observed.evidence.gradient_ratio,
            stability=seeds.stability,
        ),
        choice=seeds.graft,
        alpha=seeds.alpha,
        is_moving=is_grafted & ~observed.evidence.has_error,
    )
    return states, seeds._replace(alpha=alpha)


def _propose(
    parts: Parts, state: GrowthState, observed: _Observed, judged: _Judged, key: Key
) -> tuple[Any, Requests]:
    """Asks the policy: its next state, and its requests."""
    layout = parts.layout
    observation = policies.Observation(
        step=state.step,
        seeds=judged.seeds,
        owner=state.owner,
        loss=observed.track,
        step_loss=observed.loss,
    )
    policy, requests = parts.policy.decide(
        layout, state.policy, observation, no_requests(layout.num_seeds), key
    )
    return policy, requests


class _Moved(NamedTuple):
    """The seeds and slots after the step."""

    move: Move
    waiting_for: Int8[Array, "S"]
    seeds: SeedState
    grafts: tuple[Any, ...]
    owner: Int32[Array, "Q"]
    has_adapter: Bool[Array, "S"]
    is_born: Bool[Array, "Q"]
    directions: SiteDirections | None
    num_directed: Int32[Array, ""]


def _transition(parts: Parts, state: GrowthState, judged: _Judged, resolved: Resolved) -> _Moved:
    """Moves the seeds along the table, and the slots with them."""
    move, waiting_for = own_moves(resolved.move, resolved.seeds, judged.signals, state.settings)
    seeds = apply_moves(resolved.seeds, move, state.settings)
    enters_grafting = move.target == Stage.GRAFTING
    changes_graft = (seeds.stage == Stage.GRAFTING) & (seeds.graft != state.seeds.graft)
    grafts = restart(
        parts.grafts, judged.grafts, choice=seeds.graft, begins=enters_grafting | changes_graft
    )
    has_adapter = is_in(seeds.stage, OWNS_ADAPTER)
    seeds = seeds._replace(
        alpha=jnp.where(enters_grafting, start_alpha(parts.grafts, seeds.graft), seeds.alpha),
        slot=jnp.where(has_adapter, seeds.slot, NONE),
        blueprint=jnp.where(has_adapter, seeds.blueprint, jnp.int8(NONE)),
    )
    owner = free_slots(resolved.owner, has_adapter)
    directions, num_directed = state.directions, jnp.int32(0)
    if directions is not None:
        directions, num_directed = consume_directions(
            parts.layout, directions, resolved.is_born, seeds.blueprint
        )
    return _Moved(
        move=move,
        waiting_for=waiting_for,
        seeds=seeds,
        grafts=grafts,
        owner=owner,
        has_adapter=has_adapter,
        is_born=(owner != NONE) & resolved.is_born[jnp.maximum(owner, 0)],
        directions=directions,
        num_directed=num_directed,
    )


def _report(
    layout: Layout,
    state: GrowthState,
    observed: _Observed,
    judged: _Judged,
    commands: Commands,
    requests: Requests,
    resolved: Resolved,
    moved: _Moved,
) -> StepInfo:
    """What happened in the step that led to `state`."""
    before, seeds = resolved.seeds, moved.seeds
    evidence, is_measured = _stage_evidence(before, observed.variation)
    gains = slot_gains(seeds, state.owner, state.settings)
    tables = layout.tables
    of_slot = (tables.slot_group, tables.slot_blueprint)
    is_live = jnp.any(gains != 0, axis=-1)
    is_barren = (seeds.stage == Stage.DORMANT) & (seeds.num_potentials > 0) & (seeds.potential == 0)
    return StepInfo(
        loss=observed.loss,
        before=before.stage,
        stage=seeds.stage,
        cause=moved.move.cause,
        waiting_for=moved.waiting_for,
        evidence=evidence,
        is_measured=is_measured,
        alpha=seeds.alpha,
        blueprint=jnp.where(moved.has_adapter, seeds.blueprint, before.blueprint),
        request_code=resolved.code,
        requested_by=requests.requested_by,
        vetoed_by=requests.vetoed_by,
        outcomes=outcomes(commands, resolved.code, before.stage, seeds.stage),
        verdict=judged.verdict,
        steps_undone=jnp.int32(0),
        num_live=jnp.sum(is_live, dtype=jnp.int32),
        num_parameters=jnp.sum(
            jnp.where(gains[:, 0] != 0, jnp.asarray(tables.costs[of_slot]), 0.0)
        ),
        num_flops=jnp.sum(jnp.where(is_live, jnp.asarray(tables.flops[of_slot]), 0.0)),
        num_directed=moved.num_directed,
        num_barren=jnp.sum(is_barren, dtype=jnp.int32),
    )


def _stage_evidence(
    seeds: SeedState, variation: Scalar
) -> tuple[Float32[Array, "S"], Bool[Array, "S"]]:
    """The measurement that each seed's stage is judged by, and whether it is one."""
    stage = seeds.stage
    contribution = seeds.contribution, seeds.num_contributions > 0
    by_stage = {
        Stage.DORMANT: (seeds.potential, seeds.num_potentials > 0),
        Stage.TRAINING: (seeds.telemetry.utility, seeds.telemetry.num_live_steps > 0),
        Stage.GRAFTING: (seeds.alpha, jnp.ones(stage.shape, bool)),
        Stage.STABILIZATION: (variation, jnp.isfinite(variation)),
        Stage.EVALUATING: contribution,
        Stage.FINE_TUNING: contribution,
    }
    evidence, is_measured = jnp.zeros(stage.shape, jnp.float32), jnp.zeros(stage.shape, bool)
    for name, (value, is_known) in by_stage.items():
        evidence = jnp.where((stage == name) & is_known, value, evidence)
        is_measured = jnp.where(stage == name, is_known, is_measured)
    return evidence, is_measured
