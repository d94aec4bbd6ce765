"""What commands and policies ask of seeds, as arrays, and what becomes of it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esper_fn._records import record
from esper_fn._typing import Array, Float32, Int8, Int32
from esper_fn.errors import CommandError
from esper_fn.lifecycle._state import NONE

NUM_ROWS = 6


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
    """Up to M commands of one step; those of kind NONE are empty. `Growth.commands` makes them.

    All of it is one array, as a program takes longer to start with each of its arguments.
    """

    packed: Int32[Array, "6 M"]
    """All columns; read them by the properties below."""

    def checked(self) -> Commands:
        """Themselves, if they are of six rows.

        Raises:
          CommandError: they are something else, after a slice of the wrong axis for instance.
        """
        shape = np.shape(self.packed)
        if len(shape) != 2 or shape[0] != NUM_ROWS:
            raise CommandError(
                f"commands are int32[{NUM_ROWS}, M], one column each, and these are {shape}; make "
                "them with `Growth.commands`, and choose some of them by their last axis"
            )
        return self

    @property
    def size(self) -> int:
        """M, the number of rows for commands."""
        return int(self.packed.shape[-1])

    @property
    def seed(self) -> Int32[Array, "M"]:
        """The seed it is for."""
        return self.packed[..., 0, :]

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
        return self.packed[..., 5, :]

    def _narrow(self, row: int) -> Int8[Array, "M"]:
        """A row of small numbers; one that is too large stays large."""
        return self.packed[..., row, :].clip(-128, 127).astype(np.int8)


class Outcomes(NamedTuple):
    """One row a command."""

    code: Int8[Array, "M"]
    before: Int8[Array, "M"]
    """The seed's stage before the step (NONE for an unknown seed)."""
    after: Int8[Array, "M"]


def no_commands(size: int = 4) -> Commands:
    """`size` empty rows.

    >>> no_commands(2).kind.tolist()
    [0, 0]
    """
    return Commands(jnp.asarray(empty_rows(size)))


def empty_rows(size: int) -> np.ndarray:
    """`Commands.packed` without commands, on the host."""
    rows = np.full((NUM_ROWS, size), NONE, np.int32)
    rows[1] = Kind.NONE
    return rows


class Requests(NamedTuple):
    """What the rules so far ask for, one row a seed, and which rule asked or refused."""

    kind: Int8[Array, "S"]
    """A `Kind`; NONE asks nothing."""
    blueprint: Int8[Array, "S"]
    graft: Int8[Array, "S"]
    """Index of an alpha schedule; NONE takes the first."""
    target: Int8[Array, "S"]
    """The stage to go to, for a `Kind.TRANSITION`."""
    priority: Float32[Array, "S"]
    """A later rule that has no room for all requests serves larger ones first."""
    requested_by: Int8[Array, "S"]
    """Index in `Policy.rules` of the rule that asked, or NONE."""
    vetoed_by: Int8[Array, "S"]
    """Index of the rule that refused, or NONE; NONE again where a later rule asked anew."""


def no_requests(num_seeds: int) -> Requests:
    """Requests that ask for nothing.

    Args:
      num_seeds: S.

    Returns:
      Requests whose every `kind` is `Kind.NONE`.

    >>> int(no_requests(3).kind.sum())
    0
    """
    none = jnp.full((num_seeds,), NONE, jnp.int8)
    return Requests(
        kind=jnp.zeros((num_seeds,), jnp.int8),
        blueprint=none,
        graft=none,
        target=none,
        priority=jnp.zeros((num_seeds,), jnp.float32),
        requested_by=none,
        vetoed_by=none,
    )
