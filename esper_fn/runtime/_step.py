"""The ready training step, and whole runs of it in one `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from esper_fn import rollback
from esper_fn._control import cond
from esper_fn._growth import Growth, GrowthState, Info, LossFn
from esper_fn._typing import Array, Int32, Params
from esper_fn.commands import Commands, no_commands
from esper_fn.optim import PerBody


class TrainState(NamedTuple):
    """All that a growing run carries from step to step."""

    params: Params
    opt_state: Any
    growth: GrowthState
    anchor: rollback.Anchor | None
    """None where roll-backs are left to the caller."""


Step = Callable[[TrainState, Any, Any, Commands], tuple[TrainState, Info]]
"""`step(state, batch, survey_batch, commands) -> (state, info)`."""


def init(
    optimizer: PerBody,
    params: Params,
    growth: GrowthState,
    *,
    anchor_every: int | None = 50,
    num_snapshots: int = rollback.NUM_SNAPSHOTS,
) -> TrainState:
    """The state before the first step.

    Args:
      optimizer: from `optim.per_body`.
      params: of the host.
      growth: from `Growth.init`.
      anchor_every: steps between the snapshots that a roll-back restores; None keeps none.
      num_snapshots: how many are kept, static; 0 keeps none. See `rollback.anchor`.
    """
    opt_state = optimizer.init((params, growth.bodies))
    held = None
    if anchor_every is not None and num_snapshots != 0:
        held = rollback.anchor(
            params, opt_state, growth, every=anchor_every, num_snapshots=num_snapshots
        )
    return TrainState(params=params, opt_state=opt_state, growth=growth, anchor=held)


def make_step(
    growth: Growth, loss_fn: LossFn, optimizer: PerBody, *, survey_every: int | None = 25
) -> Step:
    """One training step, pure: gradients, optimiser, lifecycle, survey when due, roll-back.

    Args:
      growth: the static part.
      loss_fn: `loss_fn(params, seeds, batch)`, a scalar.
      optimizer: from `optim.per_body`.
      survey_every: steps between two surveys on `survey_batch`; None never surveys, and then
        nothing is ever judged by its contribution.

    Returns:
      `step(state, batch, survey_batch, commands) -> (state, info)`.
    """
    if survey_every is not None and survey_every < 1:
        raise ValueError(f"survey_every must be at least 1 or None, got {survey_every!r}")
    measure = growth.survey(loss_fn)

    def step(
        state: TrainState, batch: Any, survey_batch: Any, commands: Commands
    ) -> tuple[TrainState, Info]:
        params, opt_state, grown, held = state
        if survey_every is not None:
            grown = cond(
                grown.step % survey_every == 0,
                lambda: measure(params, grown, survey_batch)[0],
                lambda: grown,
            )
        loss, gradients, readings = growth.value_and_grad(loss_fn)(params, grown, batch)
        updates, opt_state = optimizer.update(
            gradients, opt_state, (params, grown.bodies), slots=growth.slots(grown)
        )
        params, bodies = optax.apply_updates((params, grown.bodies), updates)
        grown, info = growth.update(grown, bodies, readings, loss, commands)
        if held is not None:
            params, opt_state, grown, held = rollback.guard(
                growth, held, params, opt_state, grown, info.verdict
            )
        return TrainState(params=params, opt_state=opt_state, growth=grown, anchor=held), info

    return step


def scan_steps(step: Step) -> Callable[..., tuple[TrainState, Info]]:
    """Many steps as one program: `run(state, batches, survey_batch, commands)`.

    `batches` have a leading axis of T steps; `commands` belong to the first of them. Returns the
    last state and every step's `Info`, `[T, ...]`. With all batches at once it is a whole run.
    """

    def run(
        state: TrainState, batches: Any, survey_batch: Any, commands: Commands | None = None
    ) -> tuple[TrainState, Info]:
        first = no_commands(1) if commands is None else commands
        silent = no_commands(first.kind.shape[0])

        def one(carry: tuple[TrainState, Array], batch: Any) -> tuple[Any, Info]:
            before, index = carry
            now = jax.tree.map(lambda a, b: jnp.where(index == 0, a, b), first, silent)
            after, info = step(before, batch, survey_batch, now)
            return (after, index + 1), info

        start: Int32[Array, ""] = jnp.int32(0)
        (state, _), infos = jax.lax.scan(one, (state, start), batches)
        return state, infos

    return run
