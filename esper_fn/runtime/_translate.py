"""From the words of the bus to those of the core, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esper_fn import bus, commands
from esper_fn._growth import Growth
from esper_fn.commands import Code
from esper_fn.errors import UnknownNameError
from esper_fn.lifecycle import NONE, Stage

WORDS = {
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
"""Why a command was refused, for people."""


def to_core(growth: Growth, command: bus.Command) -> commands.Command:
    """A command of the bus as one of the core.

    Raises:
      ValueError: a seed, site or stage that does not exist.
    """
    if not isinstance(command, bus.SeedCommand):
        raise ValueError(f"{type(command).__name__} is not for a seed")
    seed = _seed(growth, command)
    match command:
        case bus.Germinate():
            return commands.germinate(seed, command.blueprint, command.graft)
        case bus.SetGraft():
            return commands.set_graft(seed, command.graft)
        case bus.Transition():
            if command.target not in Stage.__members__:
                raise UnknownNameError("target", command.target, Stage.__members__)
            return commands.transition(seed, Stage[command.target])
    return _PLAIN[type(command)](seed)


_PLAIN: dict[type[bus.Command], Callable[[int], commands.Command]] = {
    bus.Cull: commands.cull,
    bus.Cancel: commands.cancel,
    bus.RollBack: commands.roll_back,
    bus.Release: commands.release,
    bus.HoldSeed: commands.pause,
    bus.LetSeedGo: commands.resume,
}


def _seed(growth: Growth, command: bus.SeedCommand) -> int:
    layout = growth.layout
    if command.site is None:
        return command.seed
    place = layout.sites[layout.site_index(command.site)]
    if command.seed >= place.num_seeds:
        raise ValueError(
            f"seed={command.seed} of site {command.site!r} does not exist; it has seeds "
            f"0..{place.num_seeds - 1}"
        )
    layer, chunk = divmod(command.seed, place.chunks)
    return layout.seed_index(command.site, chunk, layer)


def stage_name(value: Any) -> str | None:
    """Name of a stage's number; None for NONE."""
    return None if int(value) == NONE else Stage(int(value)).name


def lifecycle_event(event: dict[str, Any]) -> bus.LifecycleEvent:
    """A row of `lifecycle_events` as a message."""
    measured: dict[str, float | None] = event["measured"]
    return bus.LifecycleEvent(
        step=event["step"],
        seed=event["seed"],
        site=event["site"],
        layer=event["layer"],
        chunk=event["chunk"],
        source=event["from"],
        target=event["to"],
        cause=event["cause"],
        blueprint=event["blueprint"],
        measured=measured,
    )
