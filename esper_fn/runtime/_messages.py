"""Between core and bus: commands and codes translated, segments as messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from esper_fn import bus, commands
from esper_fn._growth import Growth
from esper_fn.bus._timing import RateLimiter
from esper_fn.commands import Code
from esper_fn.errors import UnknownNameError
from esper_fn.lifecycle import NONE, Stage
from esper_fn.runtime._events import stage_counts
from esper_fn.runtime._records import Segment

REFUSALS = {
    Code.UNKNOWN_SEED: "no such seed",
    Code.ILLEGAL_TRANSITION: "the seed's stage does not allow it",
    Code.BLUEPRINT_NOT_SERVED: "this site's bank has no such blueprint",
    Code.UNKNOWN_GRAFT: "no such alpha schedule",
    Code.BANK_FULL: "no free slot; cull a seed, or build the layout with more capacity",
    Code.EMBARGOED: "the seed waits for its embargo to end",
    Code.VETOED: "the governor allows no germination now",
    Code.OVERRULED: "the governor moved the seed in this very step",
    Code.NO_ADAPTER: "only a seed with an adapter, not yet decided, can be steered so",
    Code.BATCH_REFUSED: "another command of the batch was refused",
}
"""Explains why a command was refused, by code."""


def to_core(growth: Growth, command: bus.Command) -> commands.Command:
    """Translates a command of the bus to one of the core, by the verb that both share.

    Args:
      growth: the static part of the run, for its names.
      command: a command to one seed.

    Raises:
      ValueError: the command is for no seed, or names a seed, site or stage that does not exist.
    """
    if not isinstance(command, bus.SeedCommand):
        raise ValueError(f"{type(command).__name__} is not for a seed")
    fields = command.arguments()
    seed = _seed(growth, fields.pop("site"), fields.pop("seed"))
    if "target" in fields:
        if fields["target"] not in Stage.__members__:
            raise UnknownNameError("target", fields["target"], Stage.__members__)
        fields["target"] = Stage[fields["target"]]
    build: Callable[..., commands.Command] = getattr(commands, bus.verb(command))
    return build(seed, **fields)


def _seed(growth: Growth, name: str | None, number: int) -> int:
    """The number among all seeds of a seed of a site, or `number` itself without a site."""
    layout = growth.layout
    if name is None:
        return number
    site = layout.sites[layout.site_index(name)]
    if number >= site.num_seeds:
        raise ValueError(
            f"seed={number} of site {name!r} does not exist; it has seeds 0..{site.num_seeds - 1}"
        )
    layer, chunk = divmod(number, site.chunks)
    return layout.seed_index(name, chunk, layer)


def stage_name(value: Any) -> str | None:
    """Name of the stage with a number; None for NONE."""
    return None if int(value) == NONE else Stage(int(value)).name


_FRAME_DTYPES: dict[str, type[np.number[Any]]] = {
    "stage": np.uint8,
    "is_measured": np.uint8,
    "blueprint": np.int8,
    "alpha": np.float32,
    "evidence": np.float32,
}


class Reporter:
    """Turns segments into messages, from infos that are on the host already.

    Args:
      frames_per_second: most frames (the state of all seeds) in a second.
    """

    def __init__(self, *, frames_per_second: float) -> None:
        self._limiter = RateLimiter(per_second=frames_per_second, burst=1)
        self._reported_at: float | None = None
        self._num_rollbacks = 0

    def report(self, segment: Segment) -> Callable[[int], list[bus.Message]]:
        """Prepares the messages of a segment; call it in the order of segments.

        Returns:
          `messages(num_dropped)`: lifecycle events, metrics with the number of messages that were
          dropped so far, and a frame if one is due. It needs no state, which the next step may
          donate.
        """
        now = time.monotonic()
        # 0 for the first segment.
        seconds, self._reported_at = now - (self._reported_at or now), now
        return partial(self._messages, segment._replace(state=None), seconds)

    def _messages(self, segment: Segment, seconds: float, num_dropped: int) -> list[bus.Message]:
        infos: Any = segment.infos
        step = segment.first_step + segment.num_steps
        self._num_rollbacks += int(infos.verdict.should_roll_back.sum())
        messages: list[bus.Message] = [_lifecycle_event(event) for event in segment.events]
        messages.append(
            bus.StepMetrics(
                step=step,
                loss=float(segment.losses[-1]),
                steps_per_second=segment.num_steps / seconds if seconds > 0 else 0.0,
                num_live=int(infos.num_live[-1]),
                num_parameters=int(infos.num_parameters[-1]),
                num_rollbacks=self._num_rollbacks,
                num_dropped=num_dropped,
                stages=stage_counts(infos.stage[-1]),
            )
        )
        if self._limiter.allows():
            columns = {
                name: bus.Column.from_array(np.asarray(getattr(infos, name)[-1], dtype))
                for name, dtype in _FRAME_DTYPES.items()
            }
            messages.append(bus.Frame(step=step, columns=columns))
        return messages


def _lifecycle_event(event: dict[str, Any]) -> bus.LifecycleEvent:
    """A row of `lifecycle_events` as a message."""
    names = {"from": "source", "to": "target"}
    return bus.LifecycleEvent(**{names.get(key, key): value for key, value in event.items()})
