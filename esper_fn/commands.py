"""What a person asks of seeds, as arrays a jitted step can take, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import described
from esper_fn._layout import Layout
from esper_fn._records import record
from esper_fn._typing import Array, Int8, Int32
from esper_fn.errors import CommandError, UnknownNameError
from esper_fn.lifecycle import NONE, Stage
from esper_fn.lifecycle._stages import as_stage

_NUM_ROWS = 6


class Kind(IntEnum):
    """What is asked."""

    NONE = 0
    GERMINATE = 1
    TRANSITION = 2
    """Go to a named stage: the table holds, gates and dwell do not."""
    SET_GRAFT = 3
    PAUSE = 4
    """Freeze the seed's stage and alpha until RESUME; its adapter trains as the stage says."""
    RESUME = 5


class Code(IntEnum):
    """What became of a command."""

    NOT_ASKED = 0
    DONE = 1
    UNKNOWN_SEED = 2
    UNKNOWN_KIND = 3
    ILLEGAL_TRANSITION = 4
    BLUEPRINT_NOT_SERVED = 5
    UNKNOWN_GRAFT = 6
    BANK_FULL = 7
    EMBARGOED = 8
    VETOED = 9
    """The governor allows no germination now."""
    DUPLICATE = 10
    """An earlier command of the same step was for the same seed; send this one again."""
    OVERRULED = 11
    """The governor or a non-finite adapter moved the seed in this very step."""
    NO_ADAPTER = 12
    """Only a seed that holds an adapter can be paused, resumed or grafted otherwise."""
    BATCH_REFUSED = 13
    """Another command of the same batch was refused, so this one was not carried out."""


@record
class Commands(NamedTuple):
    """Up to M commands of one step, a column each; those of kind NONE are empty.

    The rows are seed, kind, blueprint, graft, target and batch, in this order.

    One array, as a program takes longer to start with each of its arguments, and each transfer
    takes as long as all of it.
    """

    columns: Int32[Array, "6 M"]

    def checked(self) -> Commands:
        """Themselves, if they are of six rows.

        Raises:
          CommandError: they are something else, after a slice of the wrong axis for instance.
        """
        shape = np.shape(self.columns)
        if len(shape) != 2 or shape[0] != _NUM_ROWS:
            raise CommandError(
                f"commands are int32[{_NUM_ROWS}, M], one column each, and these are {shape}; make "
                "them with `Growth.commands`, and choose some of them by their last axis"
            )
        return self

    @property
    def seed(self) -> Int32[Array, "M"]:
        """Whom it is for."""
        return self.columns[..., 0, :]

    @property
    def kind(self) -> Int8[Array, "M"]:
        """A `Kind`."""
        return self._narrow(1)

    @property
    def blueprint(self) -> Int8[Array, "M"]:
        """Its index, or NONE."""
        return self._narrow(2)

    @property
    def graft(self) -> Int8[Array, "M"]:
        """The alpha schedule's index, or NONE."""
        return self._narrow(3)

    @property
    def target(self) -> Int8[Array, "M"]:
        """A `Stage`, for TRANSITION."""
        return self._narrow(4)

    @property
    def batch(self) -> Int32[Array, "M"]:
        """Commands of one number are applied together or not at all; NONE for a single one."""
        return self.columns[..., 5, :]

    def _narrow(self, row: int) -> Int8[Array, "M"]:
        """A row of small numbers; one that is too large stays large."""
        return self.columns[..., row, :].clip(-128, 127).astype(np.int8)


class Outcomes(NamedTuple):
    """One row a command."""

    code: Int8[Array, "M"]
    before: Int8[Array, "M"]
    """The seed's stage before the step (NONE for an unknown seed)."""
    after: Int8[Array, "M"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command, for people. Make one with the functions of this module."""

    kind: Kind
    seed: int
    blueprint: str | None = None
    graft: str | None = None
    target: Stage | None = None
    batch: str | None = None
    """Commands with the same name are applied together or not at all; see `batch`."""


# Without leaves, so that one passed into a `jit` in place of `Commands` reaches our message.
jax.tree_util.register_static(Command)


def batch(commands: Sequence[Command], name: str = "batch") -> list[Command]:
    """Commands of one step that are applied together or not at all.

    >>> [c.batch for c in batch([cull(1), cull(2)])]
    ['batch', 'batch']
    """
    return [replace(command, batch=name) for command in commands]


def germinate(seed: int, blueprint: str, graft: str | None = None) -> Command:
    """Give a dormant seed a newborn adapter."""
    return Command(kind=Kind.GERMINATE, seed=seed, blueprint=blueprint, graft=graft)


def transition(seed: int, target: Stage) -> Command:
    """Move a seed to a stage that may follow its own."""
    return Command(kind=Kind.TRANSITION, seed=seed, target=as_stage(target, "target"))


def cull(seed: int) -> Command:
    """Remove a seed's adapter."""
    return transition(seed, Stage.CULLED)


def cancel(seed: int) -> Command:
    """Call off a seed that does not act yet."""
    return transition(seed, Stage.CANCELLED)


def roll_back(seed: int) -> Command:
    """Remove a seed's adapter and keep the seed out for a quarantine, or until it is released."""
    return transition(seed, Stage.ROLLED_BACK)


def release(seed: int) -> Command:
    """Let a rolled-back seed sleep and grow again; also resets a fossil, whose adapter is lost."""
    return transition(seed, Stage.DORMANT)


def set_graft(seed: int, graft: str) -> Command:
    """Change a seed's alpha schedule."""
    return Command(kind=Kind.SET_GRAFT, seed=seed, graft=graft)


def pause_seed(seed: int) -> Command:
    """Freeze a seed's stage and alpha until `resume_seed`; its adapter goes on training."""
    return Command(kind=Kind.PAUSE, seed=seed)


def resume_seed(seed: int) -> Command:
    """End the pause of a seed."""
    return Command(kind=Kind.RESUME, seed=seed)


def no_commands(size: int = 4) -> Commands:
    """`size` empty rows.

    >>> no_commands(2).kind.tolist()
    [0, 0]
    """
    return Commands(jnp.asarray(_empty(size)))


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
    _check(commands)
    if len(commands) > size:
        raise CommandError(
            f"{len(commands)} commands do not fit into {size} rows; send the rest with the next "
            "step or make room with size="
        )
    rows = _empty(size)
    batches: dict[str, int] = {}
    for column, command in enumerate(commands):
        if not 0 <= command.seed < layout.num_seeds:
            raise CommandError(
                f"seed {command.seed!r} does not exist; seeds are 0..{layout.num_seeds - 1}; "
                "`layout.seed_index(site, chunk)` finds one"
            )
        rows[0, column], rows[1, column] = command.seed, command.kind
        if command.blueprint is not None:
            if command.blueprint not in layout.names:
                raise UnknownNameError(
                    "blueprint",
                    command.blueprint,
                    layout.names,
                    "give it to `Growth(blueprints=...)` so that it has a bank",
                )
            rows[2, column] = layout.blueprint_index(command.blueprint)
        if command.graft is not None:
            if command.graft not in grafts:
                raise UnknownNameError(
                    "alpha schedule",
                    command.graft,
                    grafts,
                    "give it to `Growth(graft=...)` so that it is compiled in",
                )
            rows[3, column] = grafts.index(command.graft)
        if command.target is not None:
            rows[4, column] = as_stage(command.target, "target")
        if command.batch is not None:
            rows[5, column] = batches.setdefault(command.batch, len(batches))
    return rows


def _check(commands: object) -> None:
    remedy = "pass a list of what `germinate`, `cull` and their like return"
    if not isinstance(commands, Sequence) or isinstance(commands, str | Commands):
        raise CommandError(
            f"commands must be a list of Command, got {described(commands)}; {remedy}"
        )
    for command in commands:
        if not isinstance(command, Command):
            raise CommandError(
                f"each command must be a Command, got {described(command)}; {remedy}"
            )
        if not isinstance(command.seed, Integral) or isinstance(command.seed, bool):
            raise CommandError(
                f"a command's seed must be an int, got {command.seed!r}; "
                "`layout.seed_index(site, chunk)` finds it"
            )


def _empty(size: int) -> np.ndarray:
    rows = np.full((_NUM_ROWS, size), NONE, np.int32)
    rows[1] = Kind.NONE
    return rows
