"""The ready training step: gradients, optimiser, lifecycle, survey when due, roll-back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from esper_fn import rollback
from esper_fn._arguments import check_kind
from esper_fn._control import cond
from esper_fn._growth import Growth, GrowthState, LossFn, StepInfo
from esper_fn._leaves import check_leaves, strengthen
from esper_fn._records import record
from esper_fn._typing import Params, Scalar
from esper_fn.commands import Commands
from esper_fn.optim import apply_updates, plain_gradients
from esper_fn.optim._checks import check_optimizer


@record
class TrainState(NamedTuple):
    """All that a growing run carries from step to step."""

    params: Params
    opt_state: Any
    growth_state: GrowthState
    ring: rollback.Ring | None
    """None where roll-backs are left to the caller."""


class Trained(NamedTuple):
    """A step half done: the host and the adapters have learned, the seeds have not moved yet."""

    state: TrainState
    """With the adapters from before."""
    adapters: Any
    """After the optimiser's update."""
    statistics: Any
    loss: Scalar
    reference_loss: Scalar | None
    """That of the last good parameters on the same batch; None without a ring."""


Step = Callable[[TrainState, Any, Any, Commands], tuple[TrainState, StepInfo]]
"""`step(state, batch, survey_batch, commands) -> (state, info)`."""

Survey = Callable[[TrainState, Any], TrainState]
"""`survey(state, survey_batch) -> state`, with the seeds measured."""


@dataclass(frozen=True, eq=False)
class TwoPartStep:
    """A `Step` whose two parts a loop may call by themselves, to take commands in between.

    Commands are applied at the end of a step. So a command that comes while the gradients are
    being computed need not wait for another step.
    """

    train: Callable[[TrainState, Any, Any], Trained]
    """`train(state, batch, survey_batch)`: survey when due, gradients, optimiser."""
    grow: Callable[[Trained, Commands], tuple[TrainState, StepInfo]]
    """`grow(trained, commands)`: lifecycle and roll-back."""
    try_snapshot: Callable[[rollback.Ring, GrowthState, Any], Scalar]
    """`try_snapshot(ring, growth_state, batch)`: `Trained.reference_loss`, which `train` leaves out
    of a state without its ring."""
    survey_every: int | None

    def __call__(
        self, state: TrainState, batch: Any, survey_batch: Any, commands: Commands
    ) -> tuple[TrainState, StepInfo]:
        return self.grow(self.train(state, batch, survey_batch), commands)


def init(
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    growth_state: GrowthState,
    *,
    snapshot_every: int | None = 50,
    num_snapshots: int = rollback.NUM_SNAPSHOTS,
) -> TrainState:
    """The state before the first step.

    Numbers become arrays and no leaf keeps a weak type, so that no later step is compiled anew.

    Args:
      optimizer: from `optim.per_adapter`.
      params: of the host.
      growth_state: from `Growth.init`.
      snapshot_every: steps between the snapshots that a roll-back restores; None keeps none.
      num_snapshots: how many are kept, static; 0 keeps none. See `rollback.init`.

    Returns:
      The state for `make_step` or `fit(start=)`.

    Raises:
      TypeError: an optimiser that is not from `optim.per_adapter`, no state of a growth, or a leaf
        of `params` that is neither array nor number.
      ValueError: `snapshot_every` or `num_snapshots` is no whole number in range.
    """
    check_kind("growth_state", growth_state, GrowthState, "pass `growth.init(key)`")
    check_leaves("params", params)
    params, growth_state = strengthen((params, growth_state))
    check_optimizer(optimizer)
    opt_state = strengthen(optimizer.init((params, growth_state.adapters)))
    check_optimizer(optimizer, opt_state, growth_state.adapters)
    ring = None
    if snapshot_every is not None and num_snapshots != 0:
        ring = rollback.init(
            params, opt_state, growth_state, every=snapshot_every, num_snapshots=num_snapshots
        )
    return TrainState(params=params, opt_state=opt_state, growth_state=growth_state, ring=ring)


def make_step(
    growth: Growth,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    survey_every: int | None = 25,
) -> TwoPartStep:
    """One training step, pure: gradients, optimiser, lifecycle, survey when due, roll-back.

    The optimiser gets `value=loss`, `grad=` and `value_fn=`, for those that look at the loss
    (`optax.contrib.reduce_on_plateau`) or search along a line (for the host only).

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a scalar.
      optimizer: from `optim.per_adapter`.
      survey_every: steps between two surveys on `survey_batch`. It is a conditional in each step,
        which `vmap` over whole states would compute at every step: pass None there, and
        `make_survey` to `scan_steps`. With None and no survey elsewhere nothing is ever judged by
        its contribution.

    Returns:
      `step(state, batch, survey_batch, commands) -> (state, info)`.

    Raises:
      ValueError: `survey_every` is less than 1.
      TypeError: `growth` is no `Growth`.
    """
    if survey_every is not None and survey_every < 1:
        raise ValueError(f"survey_every must be at least 1 or None, got {survey_every!r}")
    check_kind("growth", growth, Growth, "make one with `ef.Growth(sites=..., ...)`")
    train = _train_part(growth, loss_fn, optimizer, survey_every)

    def try_snapshot(ring: rollback.Ring, grown: GrowthState, batch: Any) -> Scalar:
        return rollback.reference_loss(growth, ring, loss_fn, grown, batch)[0]

    return TwoPartStep(train, _grow_part(growth), try_snapshot, survey_every)


def _train_part(
    growth: Growth,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    survey_every: int | None,
) -> Callable[[TrainState, Any, Any], Trained]:
    measure = growth.survey(loss_fn)

    def train(state: TrainState, batch: Any, survey_batch: Any) -> Trained:
        check_kind("state", state, TrainState, "make it with `runtime.init(...)`")
        params, opt_state, grown, ring = state
        check_optimizer(optimizer, opt_state, grown.adapters)
        if survey_every is not None:
            check_survey_batch(survey_batch)
            grown = cond(
                grown.step % survey_every == 0,
                lambda: measure(params, grown, survey_batch)[0],
                lambda: grown,
            )
        reference_loss = None
        if ring is not None:
            reference_loss, ring = rollback.reference_loss(growth, ring, loss_fn, grown, batch)
        loss, gradients, statistics = growth.value_and_grad(loss_fn)(params, grown, batch)
        gradients = plain_gradients(gradients)
        updates, opt_state = optimizer.update(
            gradients,
            opt_state,
            (params, grown.adapters),
            slots=growth.slots(grown),
            value=loss,
            grad=gradients,
            value_fn=_value_fn(growth, loss_fn, grown, batch),
        )
        params, adapters = apply_updates((params, grown.adapters), updates)
        after = TrainState(params=params, opt_state=opt_state, growth_state=grown, ring=ring)
        return Trained(after, adapters, statistics, loss, reference_loss)

    return train


def _value_fn(
    growth: Growth, loss_fn: LossFn, state: GrowthState, batch: Any
) -> Callable[[tuple[Params, Any]], Scalar]:
    """The loss as a function of `(params, adapters)`, for optimisers that search along a line."""

    def value_fn(variables: tuple[Params, Any]) -> Scalar:
        seeds = growth.seeds(state._replace(adapters=variables[1]))
        return jnp.asarray(loss_fn(variables[0], seeds, batch))

    return value_fn


def _grow_part(growth: Growth) -> Callable[[Trained, Commands], tuple[TrainState, StepInfo]]:
    def grow(trained: Trained, commands: Commands) -> tuple[TrainState, StepInfo]:
        params, opt_state, grown, ring = trained.state
        grown, info = growth.update(
            grown,
            trained.adapters,
            trained.statistics,
            trained.loss,
            commands,
            reference_loss=trained.reference_loss,
        )
        if ring is not None:
            params, opt_state, grown, ring, steps_undone = rollback.update(
                growth, ring, params, opt_state, grown, info.verdict
            )
            info = info._replace(steps_undone=steps_undone)
        return strengthen(TrainState(params, opt_state, grown, ring)), info

    return grow


def check_survey_batch(survey_batch: Any) -> None:
    """Raises `ValueError` where there is none."""
    if survey_batch is None:
        raise ValueError(
            "survey_batch must be a held-out batch, of the form of the others, for the surveys; "
            "survey_every=None is without any"
        )


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
        return state._replace(
            growth_state=measure(state.params, state.growth_state, survey_batch)[0]
        )

    return survey
