"""One growing network: the assembly of lattice, lifecycle, grafting, policy and governor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn import _execute, governors, grafting, lifecycle, policies, telemetry
from esper_fn._control import once_if
from esper_fn._lattice import (
    Lattice,
    Reading,
    Seeds,
    Visits,
    give,
    give_birth,
    init_bodies,
    per_slot_tree,
    readings_of,
    release,
    select_slots,
    slot_gains,
    view,
    zero_probes,
    zero_taps,
)
from esper_fn._typing import Array, Bodies, Bool, Float32, Int8, Int32, Key, Params, Scalar
from esper_fn.commands import Command, Commands, Outcomes, no_commands, pack
from esper_fn.errors import LatticeError
from esper_fn.lifecycle import NONE, OWNS_BODY, Gate, Move, SeedState, Stage, is_in
from esper_fn.optim import Slots

LossFn = Callable[..., Any]


class GrowthState(NamedTuple):
    """Everything that grows, as one pytree."""

    seeds: SeedState
    bodies: Bodies
    owner: Int32[Array, "Q"]
    """The seed that holds each slot, or `NONE`."""
    is_born: Bool[Array, "Q"]
    """Slots that got a newborn body in the last update."""
    loss: lifecycle.LossTrack
    settings: lifecycle.Settings
    grafts: tuple[Any, ...]
    """The grafting strategies' numbers."""
    policy: Any
    governor: Any
    key: Key
    step: Int32[Array, ""]


class Info(NamedTuple):
    """What happened in one step; nothing of it is needed for the next one."""

    loss: Float32[Array, ""]
    before: Int8[Array, "S"]
    """Stages at the start of the step."""
    stage: Int8[Array, "S"]
    """Stages after it."""
    cause: Int8[Array, "S"]
    """A `Cause` where the two differ."""
    waiting_for: Int8[Array, "S"]
    """The `Gate` that is closed on the seed's way forward."""
    evidence: Float32[Array, "S"]
    """The measurement the seed's stage is judged by: utility in TRAINING, alpha in GRAFTING, the
    loss variation in STABILIZATION, contribution in EVALUATING and FINE_TUNING, potential when
    DORMANT."""
    is_measured: Bool[Array, "S"]
    """Whether `evidence` is a measurement, which may be zero, or only not measured yet."""
    alpha: Float32[Array, "S"]
    blueprint: Int8[Array, "S"]
    request_code: Int8[Array, "S"]
    """A `Code` for what was asked of each seed, by command or policy."""
    asked_by: Int8[Array, "S"]
    """Index in `Policy.rules`, or `NONE`."""
    vetoed_by: Int8[Array, "S"]
    outcomes: Outcomes
    verdict: governors.Verdict
    num_live: Int32[Array, ""]
    """Bodies that compute in the next step."""
    num_parameters: Float32[Array, ""]
    """Parameters of bodies that act in the next step."""
    num_flops: Float32[Array, ""]
    """Forward operations of the live bodies on one example."""


class SurveyInfo(NamedTuple):
    """What a survey measured."""

    loss: Float32[Array, ""]
    raw_potential: Float32[Array, "S"]
    potential: Float32[Array, "S"]
    ablated: Int32[Array, "V"]
    """Seeds whose contribution was measured, or `NONE`."""
    contribution: Float32[Array, "V"]
    """Loss without the seed minus loss with it; 0 where `ablated` is `NONE`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """The static part of a growing network; its methods are pure. Make one with `growth`."""

    lattice: Lattice
    policy: policies.Policy
    grafts: tuple[grafting.Graft, ...]
    governor: governors.Governor
    settings: lifecycle.Settings
    bodies_at_once: int | None
    """Bodies of a bank computed in one round over the live ones; None for every slot."""
    max_ablations: int

    def init(self, key: Key) -> GrowthState:
        """All seeds dormant, all slots free."""
        body_key, key = jax.random.split(key)
        num_slots = self.lattice.num_slots
        state = GrowthState(
            seeds=lifecycle.seed_state(self.lattice.num_seeds),
            bodies=init_bodies(self.lattice, body_key),
            owner=jnp.full((num_slots,), NONE, jnp.int32),
            is_born=jnp.zeros((num_slots,), bool),
            loss=lifecycle.loss_track(),
            settings=self.settings,
            grafts=tuple(graft.hyper for graft in self.grafts),
            policy=self.policy.init(self.lattice),
            governor=self.governor.state,
            key=key,
            step=jnp.int32(0),
        )
        # A buffer of its own for every leaf, so that a step may donate the state.
        own: GrowthState = jax.tree.map(jnp.copy, state)
        return own

    def seeds(self, state: GrowthState) -> Seeds:
        """The seeds for a forward pass, as in an evaluation: `loss_fn(params, seeds, batch)`."""
        taps = zero_taps(self.lattice)
        return self._view(state, state.bodies, taps, at_once=self.bodies_at_once)

    def slots(self, state: GrowthState) -> Mapping[str, Mapping[str, Slots]]:
        """What `optim.per_body` must know of every slot."""
        born = per_slot_tree(self.lattice, state.is_born)
        learns = per_slot_tree(
            self.lattice, slot_gains(state.seeds, state.owner, state.settings)[:, 1] != 0
        )
        return {
            site: {
                name: Slots(is_born=at_site[name], learns=learns[site][name]) for name in at_site
            }
            for site, at_site in born.items()
        }

    def commands(self, commands: Sequence[Command] = (), size: int = 4) -> Commands:
        """Commands as arrays for `update`; see `esper_fn.commands.pack`."""
        return pack(self.lattice, [graft.name for graft in self.grafts], commands, size)

    def seed(self, state: GrowthState, index: int) -> lifecycle.Seed:
        """One seed to read; transfers a row from the device."""
        place, layer, chunk = self.lattice.locate(index)
        row = jax.device_get(jax.tree.map(lambda leaf: leaf[index], state.seeds))
        told = row.telemetry

        def known(value: Any, count: Any) -> float | None:
            return float(value) if count > 0 else None

        return lifecycle.Seed(
            index=index,
            site=place.name,
            layer=layer,
            chunk=chunk,
            stage=Stage(int(row.stage)),
            parent=Stage(int(row.parent)),
            steps_in_stage=int(row.steps_in_stage),
            blueprint=self.lattice.names[int(row.blueprint)] if row.blueprint >= 0 else None,
            slot=int(row.slot) if row.slot >= 0 else None,
            alpha=float(row.alpha),
            graft=self.grafts[int(row.graft)].name,
            embargo_steps=int(row.embargo_steps),
            error_count=int(row.error_count),
            stability=float(row.stability),
            utility=known(told.utility, told.num_live_steps),
            potential=known(row.potential, row.num_potentials),
            contribution=known(row.contribution, row.num_contributions),
        )

    def value_and_grad(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Like `jax.value_and_grad` of `loss_fn(params, seeds, *args)`, with the seeds measured.

        Each site loops over its live bodies, `bodies_at_once` in a round, so time and memory follow
        the number alive. Under `vmap` over states every round selects among whole activations: use
        `growth(bodies_at_once=None)` there.

        Args:
          loss_fn: pure; returns a scalar, or `(scalar, aux)` with `has_aux`.
          has_aux: whether it returns more than the loss.

        Returns:
          A function of `(params, state, *args, **kwargs)` that returns
          `(value, (d params, d bodies), readings)`.

        Raises:
          LatticeError: while tracing, where the loss function does not reach a site.
        """

        def run(params: Params, state: GrowthState, *args: Any, **kwargs: Any) -> Any:
            visits = Visits()

            def loss(params: Params, bodies: Bodies, taps: Any) -> Any:
                seeds = self._view(state, bodies, taps, at_once=self.bodies_at_once, visits=visits)
                return loss_fn(params, seeds, *args, **kwargs)

            value, (d_params, d_bodies, d_taps) = jax.value_and_grad(
                loss, argnums=(0, 1, 2), has_aux=has_aux
            )(params, state.bodies, zero_taps(self.lattice))
            missed = [site.name for site in self.lattice.sites if site.name not in visits.names]
            if missed:
                raise LatticeError(
                    f"the loss function never reaches site(s) {missed}; call "
                    f"`seeds.grow({missed[0]!r}, activation)` in the model or leave the site out "
                    "of the lattice"
                )
            return value, (d_params, d_bodies), readings_of(d_taps)

        return run

    def update(
        self,
        state: GrowthState,
        bodies: Bodies,
        readings: Reading,
        loss: Scalar,
        commands: Commands | None = None,
    ) -> tuple[GrowthState, Info]:
        """One step of every seed's life.

        Args:
          state: before the step.
          bodies: parameters after the optimiser's update; bodies that do not learn keep their old
            ones whatever stands here, bit for bit, and so does one that became non-finite.
          readings: from `value_and_grad`.
          loss: the training loss of the step.
          commands: what people ask, from `commands`.

        Returns:
          The state for the next step, and what happened.
        """
        if commands is None:
            commands = no_commands(1)
        policy_key, birth_key, key = jax.random.split(state.key, 3)
        loss = jnp.asarray(loss, jnp.float32)

        kept, drift, body_error = self._settle(state, bodies)
        track, is_spike = lifecycle.track_loss(state.loss, loss)
        seeds, shown = telemetry.take_in(state.seeds, readings, is_spike, body_error)
        judged, verdict = self.governor.judge(
            state.governor,
            governors.Evidence(seeds=seeds, loss=loss, track=track, drift=drift),
        )
        variation = lifecycle.loss_variation(track)
        seeds = self._ramp(seeds, state.grafts, track, is_spike, drift, shown)
        signals = lifecycle.Signals(
            has_error=shown.has_error,
            is_quarantined=verdict.is_quarantined,
            loss_variation=variation,
            has_training_place=lifecycle.has_training_place(seeds, state.settings),
        )
        limits = state.settings

        stays = lifecycle.stay(self.lattice.num_seeds)
        move = jax.lax.cond(
            jnp.any(signals.has_error | signals.is_quarantined),
            lambda: lifecycle.follow(stays, seeds, signals, limits, lifecycle.GUARD_EDGES),
            lambda: stays,
        )
        policy, proposal = self.policy.decide(
            self.lattice,
            state.policy,
            policies.Observation(step=state.step, seeds=seeds, owner=state.owner, loss=track),
            policies.no_proposal(self.lattice.num_seeds),
            policy_key,
        )
        done = _execute.execute(
            self.lattice,
            seeds,
            state.owner,
            _execute.merge(self.lattice, commands, proposal),
            num_grafts=len(self.grafts),
            guarded=move,
            is_vetoing=verdict.is_vetoing,
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
            graft_memory=jax.lax.cond(
                jnp.any(begins_to_graft),
                lambda of: jnp.where(
                    begins_to_graft[:, None], grafting.start_memory(self.grafts, seeds.graft), of
                ),
                lambda of: of,
                seeds.graft_memory,
            )
        )
        holds = is_in(seeds.stage, OWNS_BODY)
        owner = give(release(state.owner, holds), done.slot, done.is_born)
        seeds = seeds._replace(
            slot=jnp.where(holds, seeds.slot, NONE),
            blueprint=jnp.where(holds, seeds.blueprint, jnp.int8(NONE)),
        )
        is_born = (owner != NONE) & done.is_born[jnp.maximum(owner, 0)]
        after = state._replace(
            seeds=seeds,
            bodies=give_birth(self.lattice, kept, is_born, birth_key),
            owner=owner,
            is_born=is_born,
            loss=track,
            policy=policy,
            governor=judged,
            key=key,
            step=state.step + 1,
        )
        gains = slot_gains(seeds, owner, limits)
        tables = self.lattice.tables
        of_slot = (tables.slot_group, tables.slot_blueprint)
        is_live = jnp.any(gains != 0, axis=-1)
        info = Info(
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
            asked_by=proposal.asked_by,
            vetoed_by=proposal.vetoed_by,
            outcomes=_execute.answer(self.lattice, commands, done.code, before, seeds.stage),
            verdict=verdict,
            num_live=jnp.sum(is_live, dtype=jnp.int32),
            num_parameters=jnp.sum(
                jnp.where(gains[:, 0] != 0, jnp.asarray(tables.costs[of_slot]), 0.0)
            ),
            num_flops=jnp.sum(jnp.where(is_live, jnp.asarray(tables.flops[of_slot]), 0.0)),
        )
        return after, info

    def survey(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Measures where growth would pay and what living seeds are worth.

        Growth potential of every chunk from the gradient's second moments, and, for up to
        `max_ablations` seeds in EVALUATING or FINE_TUNING, the loss without each of them minus the
        loss with it; one that is not finite counts as an error of the seed. Give it held-out
        batches.

        Args:
          loss_fn: as in `value_and_grad`; deterministic.
          has_aux: whether it returns more than the loss.

        Returns:
          A function of `(params, state, *args, **kwargs)` that returns `(state, SurveyInfo)`.
        """

        def run(
            params: Params, state: GrowthState, *args: Any, **kwargs: Any
        ) -> tuple[GrowthState, SurveyInfo]:
            taps = zero_taps(self.lattice)

            # Under the `vmap` of the ablations every round would select among whole activations.
            def loss(gains: Array, probes: Any) -> Scalar:
                at_once = None if probes is None else self.bodies_at_once
                seeds = self._view(
                    state, state.bodies, taps, probes=probes, gains=gains, at_once=at_once
                )
                value = loss_fn(params, seeds, *args, **kwargs)
                return jnp.asarray(value[0] if has_aux else value, jnp.float32)

            gains = slot_gains(state.seeds, state.owner, state.settings)
            with_all, moments = jax.value_and_grad(loss, argnums=1)(
                gains, zero_probes(self.lattice)
            )
            scores = [telemetry.potentials(moment) for moment in moments]
            raw = jnp.concatenate([score.raw.reshape(-1) for score in scores])
            white = jnp.concatenate([score.whitened.reshape(-1) for score in scores])
            reached = jnp.concatenate([moment.num_rows.reshape(-1) for moment in moments]) > 0
            is_measured = reached & jnp.isfinite(white)

            seeds = state.seeds
            on_trial = is_in(seeds.stage, [Stage.EVALUATING, Stage.FINE_TUNING])
            urgency = jnp.where(on_trial, -seeds.num_contributions.astype(jnp.float32), -jnp.inf)
            count = min(self.max_ablations, self.lattice.num_seeds)
            urgent, chosen = jax.lax.top_k(urgency, count)
            is_chosen = urgent > -jnp.inf

            def without(index: Array) -> Scalar:
                is_out = (state.owner == index) & (state.owner != NONE)
                return loss(jnp.where(is_out[:, None], 0.0, gains), None)

            missing = jax.lax.cond(
                jnp.any(is_chosen),
                lambda: jax.vmap(without)(chosen.astype(jnp.int32)),
                lambda: jnp.zeros((count,), jnp.float32),
            )
            worth = missing - with_all
            is_known = is_chosen & jnp.isfinite(worth)
            rows = jnp.where(is_known, chosen, self.lattice.num_seeds)
            failed = jnp.where(is_chosen & ~is_known, chosen, self.lattice.num_seeds)
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
            return state._replace(seeds=seeds), SurveyInfo(
                loss=with_all,
                raw_potential=raw,
                potential=white,
                ablated=jnp.where(is_known, chosen, NONE).astype(jnp.int32),
                contribution=jnp.where(is_known, worth, 0.0),
            )

        return run

    # --- parts ---------------------------------------------------------------------------------

    def _view(
        self,
        state: GrowthState,
        bodies: Bodies,
        taps: Any,
        *,
        probes: Any = None,
        gains: Array | None = None,
        at_once: int | None = None,
        visits: Visits | None = None,
    ) -> Seeds:
        if gains is None:
            gains = slot_gains(state.seeds, state.owner, state.settings)
        return view(
            self.lattice,
            state.owner,
            gains,
            bodies,
            taps,
            probes=probes,
            at_once=at_once,
            visits=visits,
        )

    def _settle(
        self, state: GrowthState, bodies: Bodies
    ) -> tuple[Bodies, Float32[Array, "S"], Bool[Array, "S"]]:
        """Parameters that may stand, how far each body moved, and which ones broke."""
        learns = slot_gains(state.seeds, state.owner, state.settings)[:, 1] != 0

        def take_in(still: tuple[Bodies, Array, Array]) -> tuple[Bodies, Array, Array]:
            kept: dict[str, dict[str, Any]] = {site: {} for site in bodies}
            drifts, errors = [], []
            for bank in self.lattice.tables.banks:
                site = self.lattice.sites[bank.site].name
                name = self.lattice.names[bank.blueprint]
                kept[site][name], drift, error = _take_in(
                    still[0][site][name],
                    bodies[site][name],
                    learns[bank.start : bank.start + bank.num_slots],
                )
                drifts.append(drift)
                errors.append(error)
            return kept, jnp.concatenate(drifts), jnp.concatenate(errors)

        still = (state.bodies, jnp.zeros(learns.shape, jnp.float32), jnp.zeros_like(learns))
        kept, drifts, errors = once_if(jnp.any(learns), take_in, still)
        where = jnp.where(state.owner == NONE, self.lattice.num_seeds, state.owner)
        num_seeds = self.lattice.num_seeds
        drift = jnp.zeros((num_seeds,), jnp.float32).at[where].set(drifts, mode="drop")
        error = jnp.zeros((num_seeds,), bool).at[where].set(errors, mode="drop")
        return kept, drift, error

    def _ramp(
        self,
        seeds: SeedState,
        hypers: tuple[Any, ...],
        track: lifecycle.LossTrack,
        is_spike: Bool[Array, ""],
        drift: Float32[Array, "S"],
        shown: telemetry.SeedEvidence,
    ) -> SeedState:
        shape = seeds.stage.shape
        trend = (track.fast - track.slow) / (jnp.abs(track.slow) + 1e-12)
        alpha, memory = grafting.ramp(
            self.grafts,
            hypers,
            grafting.Evidence(
                is_spike=jnp.broadcast_to(is_spike, shape),
                loss_trend=jnp.broadcast_to(trend, shape),
                drift=drift,
                gradient_ratio=shown.gradient_ratio,
                stability=seeds.stability,
            ),
            chosen=seeds.graft,
            memory=seeds.graft_memory,
            alpha=seeds.alpha,
            is_moving=(seeds.stage == Stage.GRAFTING) & ~seeds.is_paused & ~shown.has_error,
        )
        return seeds._replace(alpha=alpha, graft_memory=memory)


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
    drift = jnp.sqrt(moved) / (jnp.sqrt(size) + 1e-12)
    return kept, jnp.where(stands, drift, 0.0), learns & ~stands


def growth(
    lattice: Lattice,
    *,
    policy: policies.Policy | None = None,
    graft: grafting.Graft | Sequence[grafting.Graft] | None = None,
    governor: governors.Governor | None = None,
    settings: lifecycle.Settings | None = None,
    bodies_at_once: int | None = 1,
    max_ablations: int = 8,
) -> Growth:
    """Assembles a growing network.

    Args:
      lattice: where and what can grow.
      policy: who asks for growth; `policies.plateau()` when left out.
      graft: the grafting strategy, or several of different names of which the first is the default
        and a command may choose another; `grafting.linear()` when left out.
      governor: the guard; `governors.standard()` when left out.
      settings: the gates' thresholds; `lifecycle.settings()` when left out.
      bodies_at_once: live bodies of a bank that a site computes in one round of its loop. One at a
        time needs the least memory and is fastest on a CPU; on a GPU, where a round waits for the
        host, try more. None computes every slot, dead or alive, without a loop: for `vmap` over
        whole states.
      max_ablations: seeds measured by ablation in one survey.

    Raises:
      ValueError: bodies_at_once or max_ablations below 1; strategies of one name; a grafting
        strategy that cannot end within the longest stay in GRAFTING.
    """
    grafts = (
        (grafting.linear(),)
        if graft is None
        else (graft,)
        if isinstance(graft, grafting.Graft)
        else tuple(graft)
    )
    if not grafts or len({one.name for one in grafts}) != len(grafts):
        raise ValueError(
            f"graft needs strategies of different names, got {[one.name for one in grafts]}"
        )
    limits = lifecycle.settings() if settings is None else settings
    longest = int(limits.max_steps[Stage.GRAFTING])
    for one in grafts:
        if float(one.max_step) * longest < 1 - grafting.ROUNDING:
            raise ValueError(
                f"graft {one.name!r} needs {1 / float(one.max_step):.0f} steps at least, but "
                f"every seed is culled after max_steps[GRAFTING] = {longest}; give it fewer "
                "num_steps, or "
                "settings=lifecycle.settings(max_steps={Stage.GRAFTING: ...}) more"
            )
    if bodies_at_once is not None and bodies_at_once < 1:
        raise ValueError(
            f"bodies_at_once must be at least 1, or None for every slot, got {bodies_at_once!r}"
        )
    if max_ablations < 1:
        raise ValueError(f"max_ablations must be at least 1, got {max_ablations!r}")
    return Growth(
        lattice=lattice,
        policy=policies.plateau() if policy is None else policy,
        grafts=grafts,
        governor=governors.standard() if governor is None else governor,
        settings=limits,
        bodies_at_once=bodies_at_once,
        max_ablations=max_ablations,
    )
