"""The compiled programs of a `fit`, which several runs may share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from esper_fn._arguments import check_function
from esper_fn._growth import Growth, GrowthState, LossFn, StepInfo
from esper_fn._leaves import combine, partition, strengthen
from esper_fn._sites import NoSeeds
from esper_fn._typing import Params
from esper_fn.commands import Commands
from esper_fn.rollback import Ring
from esper_fn.runtime._scan import scan_steps
from esper_fn.runtime._step import Trained, TrainState, make_step, make_survey


class Program:
    """The compiled segments of a growing run; each compiles when it is first used.

    Attributes:
      survey_every: steps between surveys, or None.
    """

    def __init__(
        self,
        growth: Growth,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformationExtraArgs,
        survey_every: int | None,
    ) -> None:
        self.survey_every = survey_every
        step = make_step(growth, loss_fn, optimizer, survey_every=survey_every)
        # To say where a NaN comes from, JAX runs the program again with the same arguments.
        is_debugged = jax.config.jax_debug_nans or jax.config.jax_debug_infs  # type: ignore[attr-defined]
        first, both = ((), ()) if is_debugged else ((0,), (0, 1))
        self._segment = jax.jit(scan_steps(step), donate_argnums=first)
        self._surveyed = self._segment
        if survey_every is not None:
            plain = make_step(growth, loss_fn, optimizer, survey_every=None)
            survey = make_survey(growth, loss_fn)
            self._surveyed = jax.jit(
                scan_steps(plain, survey=survey, survey_every=survey_every), donate_argnums=first
            )
        # What a half only hands on stays out of it: an array a program takes costs time each step.
        self._train = jax.jit(
            lambda params, opt_state, growth, batches, survey_batch: step.train(
                TrainState(params=params, opt_state=opt_state, growth_state=growth, ring=None),
                jax.tree.map(lambda leaf: leaf[0], batches),
                survey_batch,
            ),
            donate_argnums=both,
        )
        self._try_snapshot = jax.jit(
            lambda ring, growth, batches: step.try_snapshot(
                ring, growth, jax.tree.map(lambda leaf: leaf[0], batches)
            )
        )
        self._has_tried = False
        self._grow = jax.jit(
            lambda trained, ring, adapters, commands: _as_segment(
                *step.grow(_with(trained, adapters=adapters, ring=ring), commands)
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
        """Runs a segment, whose state it donates.

        Args:
          state: before the segment.
          batches: with a leading axis of T steps.
          survey_batch: held out, or None without surveys.
          commands: of the first step. With a function, a segment of one step runs as two programs,
            and the function is called between them, when the gradients are there; a longer segment
            calls it at its beginning.

        Returns:
          The state after it, and the `StepInfo` of each step, `[T, ...]`.
        """
        num_steps = jax.tree.leaves(batches)[0].shape[0]
        if num_steps > 1 or isinstance(commands, Commands):
            now = commands if isinstance(commands, Commands) else commands()
            every, program = self.survey_every, self._segment
            # Surveys stand between the steps where they fit.
            if every and num_steps % every == 0 and int(state.growth_state.step) % every == 0:
                program = self._surveyed
            return program(state, batches, survey_batch, now)
        params, opt_state, growth, ring = state
        trained = self._train(params, opt_state, growth, batches, survey_batch)
        jax.block_until_ready(trained.loss)
        # The adapters from before are only read: there is nothing to donate them to.
        grown = trained.state.growth_state
        trained = trained._replace(reference_loss=self._reference_loss(ring, grown, batches))
        return self._grow(
            _with(trained, adapters=None, ring=None), ring, grown.adapters, commands()
        )

    def _reference_loss(self, ring: Ring | None, grown: GrowthState, batches: Any) -> Any:
        """`Trained.reference_loss` of a step in two programs.

        Its program runs while the loss is elevated, and once before, so that it is compiled then.
        """
        if ring is None:
            return None
        if self._has_tried and not np.asarray(ring.is_elevated).any():
            return np.float32(np.nan)
        self._has_tried = True
        return self._try_snapshot(ring, grown, batches)


def _with(trained: Trained, *, adapters: Any, ring: Any) -> Trained:
    state = trained.state
    growth = state.growth_state._replace(adapters=adapters)
    return trained._replace(state=state._replace(growth_state=growth, ring=ring))


def _as_segment(state: TrainState, info: StepInfo) -> tuple[TrainState, StepInfo]:
    return state, jax.tree.map(lambda leaf: leaf[None], info)


def compile_fit(
    growth: Growth,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    survey_every: int | None = 25,
) -> Program:
    """The compiled programs that several `fit` calls may share, as `fit(program=)`.

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a scalar.
      optimizer: from `optim.per_adapter`.
      survey_every: steps between surveys; None for none.

    Returns:
      Programs that compile when they are first used.
    """
    return Program(growth, loss_fn, optimizer, survey_every)


def compile_fit_host(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> Any:
    """The compiled segment that several `fit_host` calls may share, as `fit_host(program=)`.

    Args:
      loss_fn: `loss_fn(params, seeds, batch)`, a scalar.
      optimizer: any transformation of Optax.

    Returns:
      `segment((params, opt_state), batches) -> ((params, opt_state), losses)`.
    """
    check_function("loss_fn", loss_fn, "loss_fn(params, seeds, batch)")
    extended = optax.with_extra_args_support(optimizer)

    def step(carry: tuple[Params, Any], batch: Any) -> tuple[Any, Any]:
        params, opt_state = carry
        learning, still = partition(params)

        def value_fn(variables: Params) -> Any:
            return loss_fn(combine(variables, still), NoSeeds(), batch)

        loss, gradients = jax.value_and_grad(value_fn)(learning)
        updates, opt_state = extended.update(
            gradients, opt_state, learning, value=loss, grad=gradients, value_fn=value_fn
        )
        learning = optax.apply_updates(learning, updates)
        return strengthen((combine(learning, still), opt_state)), loss

    return jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
