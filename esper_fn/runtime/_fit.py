"""The ready training loop: segments of compiled steps, and what happens between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn import rollback
from esper_fn._growth import Growth, GrowthState, LossFn, StepInfo
from esper_fn._leaves import check_leaves, partition, strengthen
from esper_fn._typing import Key, Params
from esper_fn.commands import Command, Commands
from esper_fn.lifecycle import Stage
from esper_fn.runtime._batches import Batches, checked_batches
from esper_fn.runtime._events import (
    lifecycle_events,
    rollback_reports,
    warn_of_barren,
    warn_of_blind,
)
from esper_fn.runtime._loop import Loop, check_finite, segment_length
from esper_fn.runtime._options import FitOptions, Hooks, steered
from esper_fn.runtime._packing import unpack
from esper_fn.runtime._program import Program, compile_fit, compile_fit_host
from esper_fn.runtime._records import Fit, Listener, Segment
from esper_fn.runtime._saving import Checkpoints, settings_of
from esper_fn.runtime._step import TrainState, check_survey_batch, init

if TYPE_CHECKING:
    from esper_fn.runtime._steering import Steering


def fit(
    growth: Growth,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    batches: Batches,
    *,
    num_steps: int,
    key: Key,
    survey_batch: Any = None,
    start: GrowthState | TrainState | None = None,
    options: FitOptions | None = None,
    program: Program | None = None,
    commands: Callable[[int], Sequence[Command]] | None = None,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoints: Checkpoints | None = None,
    steering: Steering | None = None,
) -> Fit:
    """Trains and grows, in compiled segments of steps.

    Commands are applied and results reported between segments, never inside one. A segment of one
    step is two programs, and commands are applied between them.

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a pure scalar.
      optimizer: from `optim.per_adapter`.
      params: of the host.
      batches: `batches(first_step, count)`; see `array_batches`.
      num_steps: in all.
      key: for adapters and policies.
      survey_batch: a held-out batch for surveys, needless without them.
      start: the growth, or a whole state, to start from; `growth.init(key)` when left out.
      options: intervals and limits; `FitOptions()` when left out.
      program: from `compile_fit`, to share one compilation between runs.
      commands: `commands(step)` gives the commands of that step; they are applied at its end.
      listener: called after each segment.
      should_stop: called after each segment; True ends the run. See `termination`.
      checkpoints: saves, and resumes from what was saved: bit for bit the run that was never
        stopped. Numbers of the state are those saved, whatever the arguments say.
      steering: from `steer`, opened: commands come and reports go over a bus, between segments.

    Returns:
      The last state and the record of the run.

    Raises:
      ResumeError: the folder holds a run with other settings; names the first that differs.
      NoCheckpointError: it holds steps, but none is sound.
      NonFiniteLossError: the loss is not finite, and a roll-back is impossible or did not help.
    """
    hooks = Hooks(commands, listener, should_stop, checkpoints)
    options = options or FitOptions()
    if steering is not None:
        options = replace(options, max_commands=steering.max_commands)
        hooks = steered(hooks, steering)
    program = program or compile_fit(growth, loss_fn, optimizer, survey_every=options.survey_every)
    state = _first_state(growth, optimizer, params, key, start, options)
    run = _make_run(growth, program, batches, survey_batch, options, hooks, num_steps, state)
    return Loop(run.advance, run.settings(state.ring), hooks, num_steps, state).run()


@jax.jit
def _copied(tree: Any) -> Any:
    """A copy of all leaves, as one program."""
    return jax.tree.map(jnp.copy, tree)


def _first_state(
    growth: Growth,
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    key: Key,
    start: GrowthState | TrainState | None,
    options: FitOptions,
) -> TrainState:
    """A copy, as segments donate their state; the caller keeps the parameters."""
    start = growth.init(key) if start is None else start
    if isinstance(start, TrainState):
        start = unpack(start)
    start = _copied(strengthen(start))
    if isinstance(start, TrainState):
        return start
    check_leaves("params", params)
    return init(
        optimizer,
        _copied(strengthen(params)),
        start,
        snapshot_every=options.snapshot_every,
        num_snapshots=options.num_snapshots,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """The segments of one growing run; `silence` stands for no commands."""

    growth: Growth
    program: Program
    batches: Batches
    survey_batch: Any
    silence: Commands
    options: FitOptions
    hooks: Hooks
    length: int
    has_ring: bool

    def settings(self, ring: rollback.Ring | None) -> dict[str, Any]:
        """What must be the same when the run goes on, from a state with this ring."""
        return {
            **settings_of(self.growth),
            "segment_steps": self.length,
            "survey_every": self.options.survey_every,
            "snapshot_every": None if ring is None else int(ring.every),
            "num_snapshots": 0 if ring is None else ring.num_snapshots,
            "max_commands": self.options.max_commands,
        }

    def advance(self, state: TrainState, first: int, record: dict[str, Any]) -> Segment:
        """Runs the segment that begins with a step, and adds it to the totals of the run."""
        growth, options, totals = self.growth, self.options, record["totals"]
        commands = partial(self._commands, first) if self.hooks.commands else self.silence
        batches = self.batches(first, self.length)
        state, infos = self.program(state, batches, self.survey_batch, commands)
        if self.hooks.answer is not None:
            self.hooks.answer(first, partial(jax.device_get, infos.outcomes))
        infos = jax.device_get(infos)
        totals["num_rollbacks"] += int(infos.verdict.should_roll_back.sum())
        totals["num_parameters"] = int(infos.num_parameters[-1])
        flops = infos.num_flops.astype(np.float64)
        totals["adapter_flops"] += float(flops.sum())
        max_rollbacks = options.max_rollbacks if self.has_ring else None
        check_finite(infos.loss, first, totals["num_rollbacks"], max_rollbacks)
        warn_of_barren(growth, infos, first, record)
        if options.survey_every is not None:
            passes = _survey_passes(growth, infos, first, options.survey_every)
            totals["num_passes"] += int(passes.sum())
            totals["survey_flops"] += float((passes * flops).sum())
            warn_of_blind(state.growth_state, first, record)
        return Segment(
            first_step=first,
            num_steps=self.length,
            state=state,
            losses=infos.loss,
            infos=infos,
            events=lifecycle_events(growth, infos, first),
            rollbacks=rollback_reports(growth, infos, first),
        )

    def _commands(self, first: int) -> Commands:
        commands = self.hooks.commands(first) if self.hooks.commands is not None else ()
        if not commands:
            return self.silence
        return self.growth.commands(commands, size=self.options.max_commands)


def _make_run(
    growth: Growth,
    program: Program,
    batches: Batches,
    survey_batch: Any,
    options: FitOptions,
    hooks: Hooks,
    num_steps: int,
    state: TrainState,
) -> _Run:
    if options.survey_every is not None:
        check_survey_batch(survey_batch)
    if program.survey_every != options.survey_every:
        raise ValueError(
            f"program was compiled with survey_every={program.survey_every!r}, options have "
            f"{options.survey_every!r}; give both the same"
        )
    return _Run(
        growth=growth,
        program=program,
        batches=checked_batches(batches),
        survey_batch=jax.tree.map(jnp.asarray, survey_batch),
        silence=growth.commands((), size=options.max_commands),
        options=options,
        hooks=hooks,
        length=segment_length(num_steps, options.segment_steps),
        has_ring=state.ring is not None,
    )


def _survey_passes(growth: Growth, infos: StepInfo, first: int, survey_every: int) -> np.ndarray:
    """Passes of each step's survey: 3 for the potential, one an ablation where any was due."""
    is_due = (first + np.arange(len(infos.loss))) % survey_every == 0
    on_trial = np.isin(infos.before, (Stage.EVALUATING, Stage.FINE_TUNING)).any(axis=1)
    ablations = min(growth.max_ablations, growth.layout.num_seeds)
    return is_due * (3 + ablations * on_trial)


def fit_host(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: Batches,
    *,
    num_steps: int,
    segment_steps: int = 25,
    program: Any = None,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Fit:
    """Trains the same loss function without any growth: the baseline of every comparison.

    Args:
      loss_fn: `loss_fn(params, seeds, batch)`, a pure scalar.
      optimizer: any transformation of Optax.
      params: of the host.
      batches: as for `fit`.
      num_steps: in all.
      segment_steps: steps between reports, at most.
      program: from `compile_fit_host`, to share one compilation between runs.
      listener: called after each segment.
      should_stop: called after each segment; True ends the run there.
      checkpoints: saves, and goes on from what was saved.

    Returns:
      As `fit`; `state` is the parameters.

    Raises:
      ResumeError, NoCheckpointError, NonFiniteLossError: as `fit`.
    """
    length = segment_length(num_steps, segment_steps)
    batches = checked_batches(batches)
    run = program or compile_fit_host(loss_fn, optimizer)
    check_leaves("params", params)
    params = _copied(strengthen(params))
    # Copied, as some transformations keep the parameters themselves, and a segment donates both.
    state = (params, _copied(strengthen(optimizer.init(partition(params)[0]))))

    def advance(state: Any, first: int, record: dict[str, Any]) -> Segment:
        del record
        state, losses = run(state, batches(first, length))
        losses = jax.device_get(losses)
        check_finite(losses, first)
        return Segment(first, length, state, losses, infos=None, events=[], rollbacks=[])

    def report(segment: Segment) -> None:
        if listener is not None:
            listener(segment._replace(state=segment.state[0]))

    hooks = Hooks(listener=report, should_stop=should_stop, checkpoints=checkpoints)
    fitted = Loop(advance, {"segment_steps": length}, hooks, num_steps, state).run()
    return fitted._replace(state=fitted.state[0])
