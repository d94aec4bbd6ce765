"""Many steps as one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esper_fn._arguments import is_count
from esper_fn._growth import StepInfo
from esper_fn._growth._checks import check_commands
from esper_fn._typing import Array
from esper_fn.commands import Commands
from esper_fn.lifecycle._commands import no_commands
from esper_fn.runtime._step import Step, Survey, TrainState, check_survey_batch

Scan = Callable[..., tuple[TrainState, StepInfo]]
"""`scan(state, batches, survey_batch, commands) -> (state, infos)`."""


def scan_steps(
    step: Step, *, survey: Survey | None = None, survey_every: int | None = None
) -> Scan:
    """Many steps as one program: `run(state, batches, survey_batch, commands)`.

    `batches` have a leading axis of T steps; `commands` belong to the first of them. With all
    batches at once it is a whole run.

    With a survey, steps run in segments of `survey_every` (the last may be shorter), one survey
    before each of them and no conditional: so `vmap` over whole states surveys once a segment.
    Where `run` starts at a multiple of `survey_every`, these are the surveys of
    `make_step(survey_every=...)`.

    Args:
      step: from `make_step`, with `survey_every=None` there if `survey` is given here.
      survey: from `make_survey`.
      survey_every: steps of a segment.

    Returns:
      A function that returns the last state and every step's `StepInfo`, `[T, ...]`.

    Raises:
      ValueError: one of `survey` and `survey_every` without the other, or a wrong number of steps.
    """
    _check_survey(step, survey, survey_every)

    def run(
        state: TrainState, batches: Any, survey_batch: Any = None, commands: Commands | None = None
    ) -> tuple[TrainState, StepInfo]:
        commands = check_commands(commands)
        if survey is not None:
            check_survey_batch(survey_batch)
        first = no_commands(1) if commands is None else commands
        silent = no_commands(first.size)

        def advance(carry: tuple[TrainState, Array], batch: Any) -> tuple[Any, StepInfo]:
            before, index = carry
            now = jax.tree.map(lambda a, b: jnp.where(index == 0, a, b), first, silent)
            after, info = step(before, batch, survey_batch, now)
            return (after, index + 1), info

        def segment(carry: tuple[TrainState, Array], batches: Any) -> tuple[Any, StepInfo]:
            before, index = carry
            measured = before if survey is None else survey(before, survey_batch)
            return jax.lax.scan(advance, (measured, index), batches)

        start = (state, jnp.int32(0))
        if survey_every is None:
            (state, _), infos = segment(start, batches)
        else:
            (state, _), infos = _by_segments(segment, start, batches, survey_every)
        return state, infos

    return run


def _check_survey(step: Step, survey: Survey | None, survey_every: int | None) -> None:
    if (survey is None) != (survey_every is None):
        raise ValueError(
            "scan_steps needs both survey= (from make_survey) and survey_every=, or neither; got "
            f"survey={survey!r}, survey_every={survey_every!r}"
        )
    if survey_every is not None and not is_count(survey_every):
        raise ValueError(f"survey_every must be an int, at least 1, got {survey_every!r}")
    if survey is not None and getattr(step, "survey_every", None) is not None:
        raise ValueError(
            "scan_steps has survey=, and step surveys by itself; make it with "
            "make_step(..., survey_every=None)"
        )


def _by_segments(
    segment: Callable[..., tuple[Any, Any]], carry: Any, batches: Any, length: int
) -> tuple[Any, Any]:
    """`segment` over every `length` batches in turn, and over what is left of them."""
    num_steps = jax.tree.leaves(batches)[0].shape[0]
    num_whole = num_steps // length
    bound = num_whole * length
    parts = []
    if num_whole:
        whole = jax.tree.map(
            lambda leaf: leaf[:bound].reshape(num_whole, length, *leaf.shape[1:]), batches
        )
        carry, infos = jax.lax.scan(segment, carry, whole)
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(bound, *leaf.shape[2:]), infos))
    if bound < num_steps:
        carry, infos = segment(carry, jax.tree.map(lambda leaf: leaf[bound:], batches))
        parts.append(infos)
    if len(parts) == 1:
        return carry, parts[0]
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
