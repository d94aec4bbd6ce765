"""Commands as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import jax
import numpy as np

from esper_fn._arguments import describe
from esper_fn._layout import Layout
from esper_fn.commands._factories import Command
from esper_fn.errors import CommandError, UnknownNameError
from esper_fn.lifecycle._commands import Commands, empty_rows
from esper_fn.lifecycle._stages import as_stage


def pack(
    layout: Layout, grafts: Sequence[str], commands: Sequence[Command], size: int = 4
) -> Commands:
    """Commands as arrays of a fixed size, so that no step is compiled anew.

    Args:
      layout: names the seeds and blueprints there are.
      grafts: names of the alpha schedules, in order.
      commands: of which the first one for a seed counts.
      size: rows.

    Raises:
      CommandError: more commands than rows, or a seed that does not exist.
      UnknownNameError: a blueprint or alpha schedule the layout was not given.
    """
    return Commands(jax.device_put(pack_on_host(layout, grafts, commands, size)))


def pack_on_host(
    layout: Layout, grafts: Sequence[str], commands: Sequence[Command], size: int = 4
) -> np.ndarray:
    """`pack` before anything goes to the device: int32[6, size]; for a check that costs little.

    Arguments and errors as there.
    """
    remedy = "pass a list of what `germinate`, `cull` and their like return"
    if not isinstance(commands, Sequence) or isinstance(commands, str | Commands):
        raise CommandError(
            f"commands must be a list of Command, got {describe(commands)}; {remedy}"
        )
    if len(commands) > size:
        raise CommandError(
            f"{len(commands)} commands do not fit into {size} rows; send the rest with the next "
            "step or make room with size="
        )
    rows, most = empty_rows(size), layout.num_seeds
    batches: dict[str, int] = {}
    for column, command in enumerate(commands):
        if not isinstance(command, Command):
            raise CommandError(f"each command must be a Command, got {describe(command)}; {remedy}")
        seed = command.seed
        if not isinstance(seed, Integral) or isinstance(seed, bool) or seed not in range(most):
            raise CommandError(
                f"seed {seed!r} does not exist; seeds are the ints 0..{most - 1}; "
                "`layout.seed_index(site, chunk)` finds one"
            )
        rows[:2, column] = seed, command.kind
        for row, kind, name, names, argument, purpose in (
            (2, "blueprint", command.blueprint, layout.names, "blueprints", "it has a bank"),
            (3, "alpha schedule", command.graft, grafts, "graft", "it is compiled in"),
        ):
            if name is not None and name not in names:
                remedy = f"give it to `Growth({argument}=...)` so that {purpose}"
                raise UnknownNameError(kind, name, names, remedy)
            if name is not None:
                rows[row, column] = names.index(name)
        if command.target is not None:
            rows[4, column] = as_stage(command.target, "target")
        if command.batch is not None:
            rows[5, column] = batches.setdefault(command.batch, len(batches))
    return rows
