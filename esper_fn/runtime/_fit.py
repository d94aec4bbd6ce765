"""The ready training loop: segments of compiled steps, and what happens between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn import rollback
from esper_fn._arguments import check_function
from esper_fn._growth import Growth, GrowthState, LossFn, StepInfo
from esper_fn._layout import NoSeeds
from esper_fn._leaves import check_leaves, join, part, strong
from esper_fn._typing import Key, Params
from esper_fn.commands import Command, Commands
from esper_fn.errors import NonFiniteLossError
from esper_fn.lifecycle import Stage
from esper_fn.optim import PerAdapter
from esper_fn.runtime import _saving
from esper_fn.runtime._batches import Batches, checked_batches
from esper_fn.runtime._compilations import count_compilations
from esper_fn.runtime._events import lifecycle_events
from esper_fn.runtime._records import Fit, Listener, Segment
from esper_fn.runtime._ring import live_form
from esper_fn.runtime._rollbacks import SnapshotClock, rollback_reports
from esper_fn.runtime._saving import Checkpoints
from esper_fn.runtime._step import (
    CompiledFit,
    TrainState,
    check_survey_batch,
    init,
    make_step,
    make_step_parts,
    make_survey,
    scan_steps,
)
from esper_fn.runtime._warnings import warn_of_barren, warn_of_blind

if TYPE_CHECKING:
    from esper_fn.runtime._steering import Steering


def segment_length(num_steps: int, wanted: int) -> int:
    """The largest divisor of `num_steps` that is at most `wanted`, so all segments are alike.

    >>> segment_length(1000, 30)
    25
    """
    if num_steps < 1 or wanted < 1:
        raise ValueError(
            f"num_steps and segment_steps must be at least 1, got {num_steps!r} and {wanted!r}"
        )
    return max(length for length in range(1, min(wanted, num_steps) + 1) if num_steps % length == 0)


def compile_fit(
    growth: Growth, loss_fn: LossFn, optimizer: PerAdapter, *, survey_every: int | None = 25
) -> CompiledFit:
    """The compiled programs that several `fit` calls may share (`segment=`), one per growth."""
    parts = make_step_parts(growth, loss_fn, optimizer, survey_every=survey_every)
    if survey_every is None:
        return CompiledFit(parts)
    surveyed = scan_steps(
        make_step(growth, loss_fn, optimizer, survey_every=None),
        survey=make_survey(growth, loss_fn),
        survey_every=survey_every,
    )
    return CompiledFit(parts, surveyed=surveyed, survey_every=survey_every)


def fit(
    growth: Growth,
    loss_fn: LossFn,
    optimizer: PerAdapter,
    params: Params,
    batches: Batches,
    *,
    num_steps: int,
    key: Key,
    survey_batch: Any = None,
    start: GrowthState | TrainState | None = None,
    survey_every: int | None = 25,
    anchor_every: int | None = 50,
    num_snapshots: int = rollback.NUM_SNAPSHOTS,
    segment_steps: int = 25,
    commands: Callable[[int], Sequence[Command]] | None = None,
    max_commands: int = 4,
    listener: Listener | None = None,
    max_rollbacks: int = 5,
    segment: CompiledFit | None = None,
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] | None = None,
    steering: Steering | None = None,
) -> Fit:
    """Trains and grows.

    Steps run in compiled segments; commands are taken and results reported between segments, never
    inside one. A segment of one step is then two programs, and commands are taken between them.

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a pure scalar.
      optimizer: from `optim.per_adapter`.
      params: of the host.
      batches: see `Batches` and `in_memory`.
      num_steps: in all.
      key: for adapters and policies.
      survey_batch: a held-out batch for surveys, needless without them.
      start: the growth to start from, or a whole state, whose parameters and snapshots are taken
        then; `growth.init(key)` when left out.
      survey_every: steps between surveys; None for none. Where segments begin and end with one
        (their length a multiple of it) it stands between steps, else in each as a conditional.
      anchor_every: steps between the snapshots of the roll-back; None for none.
      num_snapshots: how many are kept; 0 for none. Each takes the memory of parameters, optimiser
        state and adapters; see `rollback.anchor`.
      segment_steps: steps between reports, at most; the largest divisor of `num_steps` is taken.
      commands: `commands(step)` gives what is asked of that step; it takes force at its end.
      max_commands: commands taken at once.
      listener: called after each segment.
      max_rollbacks: more of them than this end the run.
      segment: from `compile_fit`, to share one compilation between runs.
      checkpoints: saves, and goes on from what was saved. A run that goes on is bit for bit the one
        that was never stopped, its record included; the listener hears only of new segments.
        Thresholds and other numbers of state are those saved, whatever the arguments say.
      should_stop: asked after each segment; True ends the run there, saved if there are
        `checkpoints`. See `termination`.
      steering: from `steer`, opened: commands come in and the run is told of over a bus, between
        segments. It takes the place of `commands`; a stop ends the run as `should_stop`
        does.

    Returns:
      The last state and the record of the run.

    Raises:
      ResumeError: the folder holds a run with other settings; names the first that differs.
      NoCheckpointError: it holds steps, but none is sound.
      NonFiniteLossError: the loss is not finite and there is no snapshot to go back to, or going
        back did not help.
    """
    should_start = should_save = None
    if steering is not None:
        if commands is not None:
            raise ValueError("commands must be None with steering, which brings its own")
        from esper_fn.runtime._steering import both  # needs the extra `bus`

        commands, max_commands = steering.commands, steering.max_commands
        listener = both(listener, steering.listener)
        should_stop, should_save = steering.heed(should_stop), steering.should_save
        should_start = steering.should_start
        checkpoints = steering.join(checkpoints)
    if survey_every is not None:
        check_survey_batch(survey_batch)
    length = segment_length(num_steps, segment_steps)
    batches = checked_batches(batches)
    run = segment or compile_fit(growth, loss_fn, optimizer, survey_every=survey_every)
    # The segment donates its state; the caller keeps the parameters.
    start = growth.init(key) if start is None else start
    if isinstance(start, TrainState):
        start = live_form(start)
    start = jax.tree.map(jnp.copy, strong(start))
    if isinstance(start, TrainState):
        state = start
    else:
        check_leaves("params", params)
        params = jax.tree.map(jnp.copy, strong(params))
        state = init(
            optimizer, params, start, anchor_every=anchor_every, num_snapshots=num_snapshots
        )
    held = state.anchor
    anchor_every = None if held is None else int(held.every)
    num_snapshots = 0 if held is None else held.num_snapshots
    survey_batch = jax.tree.map(jnp.asarray, survey_batch)
    settings = {
        **_saving.describe(growth),
        "segment_steps": length,
        "survey_every": survey_every,
        "anchor_every": anchor_every,
        "num_snapshots": num_snapshots,
        "max_commands": max_commands,
    }
    silence = growth.commands((), size=max_commands)
    totals = {
        "num_rollbacks": 0,
        "num_parameters": 0,
        "adapter_flops": 0.0,
        "num_passes": 0,
        "survey_flops": 0.0,
    }

    def advance(state: TrainState, first: int, record: dict[str, Any]) -> _Advanced:
        totals = record["totals"]

        def asked() -> Commands:
            wanted = commands(first) if commands else ()
            return growth.commands(wanted, size=max_commands) if wanted else silence

        given = asked if commands else silence
        state, infos = run(state, batches(first, length), survey_batch, given)
        if steering is not None:
            steering.answer(first, partial(jax.device_get, infos.outcomes))
        infos = jax.device_get(infos)
        totals["num_rollbacks"] += int(infos.verdict.should_roll_back.sum())
        totals["num_parameters"] = int(infos.num_parameters[-1])
        live = infos.num_flops.astype(np.float64)
        totals["adapter_flops"] += float(live.sum())
        if survey_every is not None:
            passes = _survey_passes(growth, infos, first, survey_every)
            totals["num_passes"] += int(passes.sum())
            totals["survey_flops"] += float((passes * live).sum())
        _check_finite(infos.loss, first, anchor_every, totals["num_rollbacks"], max_rollbacks)
        clock = SnapshotClock(anchor_every, num_snapshots, record["clock"])
        told = rollback_reports(growth, infos, first, clock)
        record["clock"] = clock.state()
        events = lifecycle_events(growth, infos, first)
        warn_of_barren(growth, infos, first, record)
        if survey_every is not None:
            warn_of_blind(state.growth, first, record)
        return _Advanced(state, infos.loss, infos, events, told)

    return _drive(
        advance,
        state,
        {"totals": totals, "clock": SnapshotClock.beside(held).state()},
        settings,
        num_steps=num_steps,
        length=length,
        listener=listener,
        checkpoints=checkpoints,
        should_start=should_start,
        should_stop=should_stop,
        should_save=should_save,
    )


def compile_fit_host(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> Any:
    """The compiled segment that several `fit_host` calls may share (`segment=`)."""
    check_function("loss_fn", loss_fn, "loss_fn(params, seeds, batch)")

    def one(carry: tuple[Params, Any], batch: Any) -> tuple[Any, Any]:
        params, opt_state = carry
        learning, still = part(params)

        def value_fn(moved: Params) -> Any:
            return loss_fn(join(moved, still), NoSeeds(), batch)

        loss, slopes = jax.value_and_grad(value_fn)(learning)
        updates, opt_state = extended.update(
            slopes, opt_state, learning, value=loss, grad=slopes, value_fn=value_fn
        )
        moved = optax.apply_updates(learning, updates)
        return strong((join(moved, still), opt_state)), loss

    extended = optax.with_extra_args_support(optimizer)
    return jax.jit(lambda carry, batches: jax.lax.scan(one, carry, batches), donate_argnums=0)


def fit_host(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: Batches,
    *,
    num_steps: int,
    segment_steps: int = 25,
    listener: Listener | None = None,
    segment: Any = None,
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Fit:
    """Trains the same loss function without any growth: the baseline of every comparison.

    Arguments and result as in `fit`; `Fit.state` is the parameters.
    """
    length = segment_length(num_steps, segment_steps)
    batches = checked_batches(batches)
    run = segment or compile_fit_host(loss_fn, optimizer)
    check_leaves("params", params)
    params = jax.tree.map(jnp.copy, strong(params))
    # Copied, as some transformations keep the parameters themselves, and a segment donates both.
    carry = (params, jax.tree.map(jnp.copy, strong(optimizer.init(part(params)[0]))))

    def advance(carry: Any, first: int, record: dict[str, Any]) -> _Advanced:
        del record
        carry, losses = run(carry, batches(first, length))
        losses = jax.device_get(losses)
        _check_finite(losses, first, None, 0, 0)
        return _Advanced(carry, losses, None, [], [])

    def tell(report: Segment) -> None:
        if listener is not None:
            listener(report._replace(state=report.state[0]))

    totals = dict.fromkeys(("num_rollbacks", "num_parameters", "num_passes"), 0)
    fitted = _drive(
        advance,
        carry,
        {"totals": {**totals, "adapter_flops": 0.0, "survey_flops": 0.0}},
        {"segment_steps": length},
        num_steps=num_steps,
        length=length,
        listener=tell,
        checkpoints=checkpoints,
        should_stop=should_stop,
    )
    return fitted._replace(state=fitted.state[0])


def _survey_passes(growth: Growth, infos: StepInfo, first: int, survey_every: int) -> np.ndarray:
    """Passes of each step's survey: 3 for the potential, one an ablation where any was due."""
    is_due = (first + np.arange(len(infos.loss))) % survey_every == 0
    on_trial = np.isin(infos.before, (Stage.EVALUATING, Stage.FINE_TUNING)).any(axis=1)
    ablations = min(growth.max_ablations, growth.layout.num_seeds)
    return is_due * (3 + ablations * on_trial)


class _Advanced(NamedTuple):
    """What one segment did."""

    state: Any
    losses: np.ndarray
    infos: StepInfo | None
    events: list[dict[str, Any]]
    rollbacks: list[dict[str, Any]]


def _drive(
    advance: Callable[[Any, int, dict[str, Any]], _Advanced],
    state: Any,
    record: dict[str, Any],
    settings: dict[str, Any],
    *,
    num_steps: int,
    length: int,
    listener: Listener | None,
    checkpoints: Checkpoints | None,
    should_stop: Callable[[], bool] | None,
    should_start: Callable[[], bool] | None = None,
    should_save: Callable[[], bool] | None = None,
) -> Fit:
    """Segments from where the run stands to its end, or to where it is stopped."""
    record = {**record, "events": [], "rollbacks": []}
    losses: list[np.ndarray] = []
    resumed_from = None
    first = saved = 0
    if checkpoints is not None:
        found = _saving.load(checkpoints, state, settings, num_steps)
        if found is not None:
            resumed_from = first = saved = found.step
            state, record = found.state, found.record
            losses.append(found.losses)

    def save() -> None:
        nonlocal saved
        if checkpoints is None or saved == first:
            return
        told = np.concatenate(losses)
        mean = float(np.mean(losses[-1]))
        _saving.save(checkpoints, _saving.Progress(first, state, told, record), settings, mean)
        saved = first

    num_compiled = 0
    is_over = first < num_steps and should_start is not None and not should_start()
    while first < num_steps and not is_over:
        with count_compilations() as count:
            state, lost, infos, happened, rollbacks = advance(state, first, record)
            losses.append(lost)
            record["events"].extend(happened)
            record["rollbacks"].extend(rollbacks)
            if listener is not None:
                listener(Segment(first, length, state, lost, infos, happened, rollbacks))
        if first != (resumed_from or 0):
            num_compiled += count.num_compiled
        first += length
        if checkpoints is not None and _saving.is_due(checkpoints, first - length, first):
            save()
        is_over = should_stop is not None and should_stop()
        if should_save is not None and should_save():
            save()
    save()
    if checkpoints is not None:
        checkpoints.writer.wait()
    return Fit(
        state=state,
        losses=np.concatenate(losses) if losses else np.zeros(0, np.float32),
        events=record["events"],
        num_compiled=num_compiled,
        rollbacks=record["rollbacks"],
        num_steps=first,
        resumed_from=resumed_from,
        **record["totals"],
    )


def _check_finite(
    losses: np.ndarray,
    first: int,
    anchor_every: int | None,
    num_rollbacks: int,
    max_rollbacks: int,
) -> None:
    is_lost = anchor_every is None and not np.isfinite(losses).all()
    if not is_lost and num_rollbacks <= max_rollbacks:
        return
    bad = np.flatnonzero(~np.isfinite(losses))
    where = f"at step {first + int(bad[0])}" if bad.size else f"before step {first + len(losses)}"
    told = f", {num_rollbacks} roll-backs so far, max_rollbacks={max_rollbacks}"
    raise NonFiniteLossError(
        f"the loss became non-finite or diverged {where}"
        + (told if anchor_every is not None else "")
        + "; look for NaN or infinity in the batches and for a division by zero in the loss, lower "
        "the learning rate, or clip gradients"
    )
