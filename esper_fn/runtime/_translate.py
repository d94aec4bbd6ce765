"""Translates commands of the bus to commands of the core, and codes of the core to text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esper_fn import bus, commands
from esper_fn._growth import Growth
from esper_fn.commands import Code
from esper_fn.errors import UnknownNameError
from esper_fn.lifecycle import NONE, Stage

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
