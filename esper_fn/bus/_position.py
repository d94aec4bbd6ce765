"""How far a run has come in its command streams."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from esper_fn.bus._messages import Outcome, Topic

MAX_OUTCOMES = 4_096
MAX_PRODUCERS = 4_096
_OUTCOMES_REMOVED_AT_ONCE = 256


@dataclass(kw_only=True, slots=True)
class RunPosition:
    """The commands that a run has applied, as plain values for a checkpoint.

    Between two steps the position is part of the training state. A run that is restored with both
    applies every later command again, and no command twice.

    Attributes:
      identity: random id of the run; a restored run keeps it, and signed commands carry it.
      epoch: epoch of the last lease.
      cursor: last entry of each command stream up to which all commands are applied.
      sequences: last applied number by `producer/topic`, the latest producers last.
      issued: when each of these producers last issued a command, in milliseconds of the server.
      issued_floor_ms: producers that were dropped from `sequences` issued nothing later than this.
      outcomes: at least the latest `MAX_OUTCOMES` by command id, for commands that are sent again.
    """

    identity: str = ""
    epoch: int = 0
    cursor: dict[Topic, str] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    issued: dict[str, int] = field(default_factory=dict)
    issued_floor_ms: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Sequences that the server does not know yet; -1 for a producer that was dropped."""

    def advance(self, producer: str, number: int) -> None:
        """Records that a number of a producer is applied."""
        number = max(number, self.sequences.pop(producer, -1))
        self.sequences[producer] = self.changes[producer] = number
        while len(self.sequences) > MAX_PRODUCERS:
            oldest = next(iter(self.sequences))
            del self.sequences[oldest]
            self.issued_floor_ms = max(self.issued_floor_ms, self.issued.pop(oldest, 0))
            self.changes[oldest] = -1

    def record(self, outcome: Outcome) -> None:
        """Records an outcome, and drops the oldest ones beyond the limit."""
        self.outcomes[outcome.command_id] = outcome
        # Many at once: a dictionary finds its first key slowly after many deletions.
        if len(self.outcomes) > MAX_OUTCOMES + _OUTCOMES_REMOVED_AT_ONCE:
            for name in list(islice(self.outcomes, _OUTCOMES_REMOVED_AT_ONCE)):
                del self.outcomes[name]

    def outcome(self, command_id: str) -> Outcome | None:
        """The outcome of a command, if it is recorded."""
        return self.outcomes.get(command_id)

    def copy(self) -> RunPosition:
        """An independent copy."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return RunPosition(**{name: copy(value) for name, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can represent.

        >>> RunPosition.from_dict(RunPosition(epoch=3).as_dict()).epoch
        3
        """
        values: dict[str, Any] = msgspec.to_builtins(self)
        del values["changes"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunPosition:
        """Restores a position from `as_dict`.

        Raises:
          ValueError: `values` are not a position.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"not a run's position on the bus: {error}") from None
