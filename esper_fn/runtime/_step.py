"""The ready training step, and whole runs of it in one `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_fn import rollback
from esper_fn._arguments import check_kind
from esper_fn._control import cond
from esper_fn._growth import Growth, GrowthState, LossFn, StepInfo
from esper_fn._growth._checks import check_commands
from esper_fn._leaves import check_leaves, strong
from esper_fn._typing import Array, Int32, Params, Scalar
from esper_fn.commands import Commands, no_commands
from esper_fn.optim import PerAdapter, apply_updates, check_optimizer


class TrainState(NamedTuple):
    """All that a growing run carries from step to step."""

    params: Params
    opt_state: Any
    growth: GrowthState
    anchor: rollback.Anchor | None
    """None where roll-backs are left to the caller."""


class Learned(NamedTuple):
    """A step half done: the host and the adapters have learned, the seeds have not moved yet."""

    params: Params
    opt_state: Any
    growth: GrowthState
    """With the adapters from before."""
    anchor: rollback.Anchor | None
    adapters: Any
    """After the optimiser's update."""
    statistics: Any
    loss: Scalar


Step = Callable[[TrainState, Any, Any, Commands], tuple[TrainState, StepInfo]]
"""`step(state, batch, survey_batch, commands) -> (state, info)`."""


Survey = Callable[[TrainState, Any], TrainState]
"""`survey(state, survey_batch) -> state`, with the seeds measured."""


class StepParts(NamedTuple):
    """A step in two parts, for a loop that takes commands in between.

    What is asked takes force at the end of a step. So whoever asks while the gradients are being
    computed need not wait for another step.
    """

    learn: Callable[[TrainState, Any, Any], Learned]
    """`learn(state, batch, survey_batch)`: survey when due, gradients, optimiser."""
    live: Callable[[Learned, Commands], tuple[TrainState, StepInfo]]
    """`live(learned, commands)`: lifecycle and roll-back."""


def init(
    optimizer: PerAdapter,
    params: Params,
    growth: GrowthState,
    *,
    anchor_every: int | None = 50,
    num_snapshots: int = rollback.NUM_SNAPSHOTS,
) -> TrainState:
    """The state before the first step.

    Args:
      optimizer: from `optim.per_adapter`.
      params: of the host.
      growth: from `Growth.init`.
      anchor_every: steps between the snapshots that a roll-back restores; None keeps none.
      num_snapshots: how many are kept, static; 0 keeps none. See `rollback.anchor`.

    Numbers become arrays and no leaf keeps a weak type, so that no later step is compiled anew.

    Raises:
      TypeError: an optimiser that is not from `optim.per_adapter`, no state of a growth, or a leaf
        of `params` that is neither array nor number.
    """
    check_kind("growth", growth, GrowthState, "pass `growth.init(key)`")
    check_leaves("params", params)
    params, growth = strong((params, growth))
    check_optimizer(optimizer)
    opt_state = strong(optimizer.init((params, growth.adapters)))
    check_optimizer(optimizer, opt_state)
    held = None
    if anchor_every is not None and num_snapshots != 0:
        held = rollback.anchor(
            params, opt_state, growth, every=anchor_every, num_snapshots=num_snapshots
        )
    return TrainState(params=params, opt_state=opt_state, growth=growth, anchor=held)


def make_step_parts(
    growth: Growth, loss_fn: LossFn, optimizer: PerAdapter, *, survey_every: int | None = 25
) -> StepParts:
    """One training step in two parts; one after the other they are `make_step`.

    Arguments as there.
    """
    if survey_every is not None and survey_every < 1:
        raise ValueError(f"survey_every must be at least 1 or None, got {survey_every!r}")
    check_kind("growth", growth, Growth, "make one with `ef.Growth(sites=..., ...)`")
    measure = growth.survey(loss_fn)

    def learn(state: TrainState, batch: Any, survey_batch: Any) -> Learned:
        check_kind("state", state, TrainState, "make it with `runtime.init(...)`")
        params, opt_state, grown, held = state
        check_optimizer(optimizer, opt_state)
        if survey_every is not None:
            check_survey_batch(survey_batch)
            grown = cond(
                grown.step % survey_every == 0,
                lambda: measure(params, grown, survey_batch)[0],
                lambda: grown,
            )
        loss, gradients, statistics = growth.value_and_grad(loss_fn)(params, grown, batch)

        def value_fn(moved: tuple[Params, Any]) -> Scalar:
            seeds = growth.seeds(grown._replace(adapters=moved[1]))
            return jnp.asarray(loss_fn(moved[0], seeds, batch))

        updates, opt_state = optimizer.update(
            gradients,
            opt_state,
            (params, grown.adapters),
            slots=growth.slots(grown),
            value=loss,
            grad=gradients,
            value_fn=value_fn,
        )
        params, adapters = apply_updates((params, grown.adapters), updates)
        return Learned(
            params=params,
            opt_state=opt_state,
            growth=grown,
            anchor=held,
            adapters=adapters,
            statistics=statistics,
            loss=loss,
        )

    def live(learned: Learned, commands: Commands) -> tuple[TrainState, StepInfo]:
        params, opt_state, grown, held, adapters, statistics, loss = learned
        grown, info = growth.update(grown, adapters, statistics, loss, commands)
        if held is not None:
            params, opt_state, grown, held = rollback.guard(
                growth, held, params, opt_state, grown, info.verdict
            )
        after = TrainState(params=params, opt_state=opt_state, growth=grown, anchor=held)
        return strong(after), info

    return StepParts(learn=learn, live=live)


def make_step(
    growth: Growth, loss_fn: LossFn, optimizer: PerAdapter, *, survey_every: int | None = 25
) -> Step:
    """One training step, pure: gradients, optimiser, lifecycle, survey when due, roll-back.

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a scalar.
      optimizer: from `optim.per_adapter`.
      survey_every: steps between two surveys on `survey_batch`. It is a conditional in each step,
        which `vmap` over whole states would compute at every step: pass None there, and
        `make_survey` to `scan_steps`. With None and no survey elsewhere nothing is ever judged by
        its contribution.

    The optimiser is given `value=loss`, `grad=` and `value_fn=`, for those that look at the loss
    (`optax.contrib.reduce_on_plateau`) or search along a line (for the host only).

    Returns:
      `step(state, batch, survey_batch, commands) -> (state, info)`.
    """
    step = _joined(make_step_parts(growth, loss_fn, optimizer, survey_every=survey_every))
    step.survey_every = survey_every  # type: ignore[attr-defined]
    return step


def check_survey_batch(survey_batch: Any) -> None:
    """Raises `ValueError` where there is none."""
    if survey_batch is None:
        raise ValueError(
            "survey_batch must be a held-out batch, of the form of the others, for the surveys; "
            "survey_every=None is without any"
        )


def _joined(parts: StepParts) -> Step:
    def step(
        state: TrainState, batch: Any, survey_batch: Any, commands: Commands
    ) -> tuple[TrainState, StepInfo]:
        return parts.live(parts.learn(state, batch, survey_batch), commands)

    return step


def make_survey(growth: Growth, loss_fn: LossFn) -> Survey:
    """The survey of a training state by itself, for loops that place it between steps.

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a scalar.

    Returns:
      `survey(state, survey_batch) -> state`.
    """
    measure = growth.survey(loss_fn)

    def survey(state: TrainState, survey_batch: Any) -> TrainState:
        return state._replace(growth=measure(state.params, state.growth, survey_batch)[0])

    return survey


def scan_steps(
    step: Step, *, survey: Survey | None = None, survey_every: int | None = None
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """Many steps as one program: `run(state, batches, survey_batch, commands)`.

    `batches` have a leading axis of T steps; `commands` belong to the first of them. Returns the
    last state and every step's `StepInfo`, `[T, ...]`. With all batches at once it is a whole run.

    With a survey, steps run in segments of `survey_every` (the last may be shorter), one survey
    before each of them and no conditional: so `vmap` over whole states surveys once a segment.
    Where `run` starts at a multiple of `survey_every`, these are the surveys of
    `make_step(survey_every=...)`.

    Args:
      step: from `make_step`, with `survey_every=None` there if `survey` is given here.
      survey: from `make_survey`.
      survey_every: steps of a segment.

    Raises:
      ValueError: one of `survey` and `survey_every` without the other, or a wrong number of steps.
    """
    if (survey is None) != (survey_every is None):
        raise ValueError(
            "scan_steps needs both survey= (from make_survey) and survey_every=, or neither; got "
            f"survey={survey!r}, survey_every={survey_every!r}"
        )
    if survey_every is not None and (type(survey_every) is not int or survey_every < 1):
        raise ValueError(f"survey_every must be an int, at least 1, got {survey_every!r}")

    if survey is not None and getattr(step, "survey_every", None) is not None:
        raise ValueError(
            "scan_steps has survey=, and step surveys by itself; make it with "
            "make_step(..., survey_every=None)"
        )

    def run(
        state: TrainState, batches: Any, survey_batch: Any = None, commands: Commands | None = None
    ) -> tuple[TrainState, StepInfo]:
        commands = check_commands(commands)
        if survey is not None:
            check_survey_batch(survey_batch)
        first = no_commands(1) if commands is None else commands
        silent = no_commands(first.columns.shape[-1])

        def one(carry: tuple[TrainState, Array], batch: Any) -> tuple[Any, StepInfo]:
            before, index = carry
            now = jax.tree.map(lambda a, b: jnp.where(index == 0, a, b), first, silent)
            after, info = step(before, batch, survey_batch, now)
            return (after, index + 1), info

        def segment(carry: tuple[TrainState, Array], batches: Any) -> tuple[Any, StepInfo]:
            before, index = carry
            measured = before if survey is None else survey(before, survey_batch)
            return jax.lax.scan(one, (measured, index), batches)

        start: Int32[Array, ""] = jnp.int32(0)
        if survey_every is None:
            (state, _), infos = segment((state, start), batches)
        else:
            (state, _), infos = _by_segments(segment, (state, start), batches, survey_every)
        return state, infos

    return run


def _by_segments(
    segment: Callable[..., tuple[Any, Any]], carry: Any, batches: Any, length: int
) -> tuple[Any, Any]:
    """`segment` over every `length` batches in turn, and over what is left of them."""
    num_steps = jax.tree.leaves(batches)[0].shape[0]
    num_whole = num_steps // length
    bound = num_whole * length
    told = []
    if num_whole:
        whole = jax.tree.map(
            lambda leaf: leaf[:bound].reshape(num_whole, length, *leaf.shape[1:]), batches
        )
        carry, infos = jax.lax.scan(segment, carry, whole)
        told.append(jax.tree.map(lambda leaf: leaf.reshape(bound, *leaf.shape[2:]), infos))
    if bound < num_steps:
        carry, infos = segment(carry, jax.tree.map(lambda leaf: leaf[bound:], batches))
        told.append(infos)
    if len(told) == 1:
        return carry, told[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *told)


class CompiledFit:
    """The compiled programs of a `fit`, which several may share: each compiles when first used.

    Args:
      parts: of the step.
      surveyed: `scan_steps` with a survey before every `survey_every` steps in place of the
        conditional in each of them; serves segments that begin and end with one.
      survey_every: as in `parts`.

    Attributes:
      whole: `whole(state, batches, survey_batch, commands)`, a segment as one program.
    """

    def __init__(
        self,
        parts: StepParts,
        *,
        surveyed: Callable[..., tuple[TrainState, StepInfo]] | None = None,
        survey_every: int | None = None,
    ) -> None:
        # To say where a NaN comes from, JAX runs the program again on what it was given.
        is_debugged = any(getattr(jax.config, f"jax_debug_{what}") for what in ("nans", "infs"))
        first, both = ((), ()) if is_debugged else ((0,), (0, 1))
        self.whole = jax.jit(scan_steps(_joined(parts)), donate_argnums=first)
        self._surveyed = jax.jit(surveyed, donate_argnums=first) if surveyed else None
        self._survey_every = survey_every
        # What a half only hands on stays out of it: an array a program takes costs time each step.
        self._learn = jax.jit(
            lambda params, opt_state, growth, batches, survey_batch: parts.learn(
                TrainState(params=params, opt_state=opt_state, growth=growth, anchor=None),
                jax.tree.map(lambda leaf: leaf[0], batches),
                survey_batch,
            ),
            donate_argnums=both,
        )
        self._live = jax.jit(
            lambda rest, anchor, before, commands: _as_segment(
                *parts.live(_with_adapters(rest, before)._replace(anchor=anchor), commands)
            ),
            donate_argnums=both,
        )

    def __call__(
        self,
        state: TrainState,
        batches: Any,
        survey_batch: Any,
        commands: Commands | Callable[[], Commands],
    ) -> tuple[TrainState, StepInfo]:
        """A segment: `(state, infos)`, infos `[T, ...]`.

        With a function for its commands, a segment of one step runs as two programs, and it is
        asked between them, when the gradients are there; a longer one takes them at its beginning.
        """
        num_steps = jax.tree.leaves(batches)[0].shape[0]
        run = self.whole
        if self._surveyed is not None and self._survey_every is not None:
            is_aligned = num_steps % self._survey_every == 0
            if is_aligned and int(state.growth.step) % self._survey_every == 0:
                run = self._surveyed
        if isinstance(commands, Commands):
            return run(state, batches, survey_batch, commands)
        if num_steps > 1:
            return run(state, batches, survey_batch, commands())
        params, opt_state, growth, anchor = state
        learned = self._learn(params, opt_state, growth, batches, survey_batch)
        jax.block_until_ready(learned.loss)
        # The adapters from before are looked at only: there is nothing to donate them to.
        before = learned.growth.adapters
        return self._live(_with_adapters(learned, None), anchor, before, commands())


def _with_adapters(learned: Learned, adapters: Any) -> Learned:
    return learned._replace(growth=learned.growth._replace(adapters=adapters))


def _as_segment(state: TrainState, info: StepInfo) -> tuple[TrainState, StepInfo]:
    return state, jax.tree.map(lambda leaf: leaf[None], info)
