"""Where a run stands in its command streams: part of what a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import msgspec

from esper_fn.bus._messages import Outcome
from esper_fn.bus._topics import Topic

MAX_OUTCOMES = 4_096
MAX_PRODUCERS = 4_096
_FORGOTTEN_AT_ONCE = 256
_OUTCOME = msgspec.json.Decoder(Outcome)
_JSON = msgspec.json.Encoder()


@dataclass(kw_only=True, slots=True)
class RunPosition:
    """The commands in force, as plain values; `as_dict` and `from_dict` are for checkpoints.

    Between two steps it belongs to the training state exactly: restored together with it, every
    later command is carried out again, and none twice.

    Attributes:
      identity: of the run, by chance; a restored run keeps it, and no other one has it. Signed
        commands are signed for it.
      epoch: of the last lease.
      cursor: last entry of each command stream up to which everything is in force.
      sequences: last number in force, by `producer/topic`, the latest producers last.
      issued: when each of these producers last issued one, in server milliseconds.
      issued_floor_ms: producers forgotten here issued nothing later than that.
      outcomes: at least the latest `MAX_OUTCOMES` by command id, for commands that come again.
    """

    identity: str = ""
    epoch: int = 0
    cursor: dict[Topic, str] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    issued: dict[str, int] = field(default_factory=dict)
    issued_floor_ms: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Sequences not yet made known to the server; -1 for a forgotten producer."""

    def note(self, key: str, number: int) -> None:
        """A number of a producer is in force."""
        number = max(number, self.sequences.pop(key, -1))
        self.sequences[key] = self.changed[key] = number
        while len(self.sequences) > MAX_PRODUCERS:
            oldest = next(iter(self.sequences))
            del self.sequences[oldest]
            self.issued_floor_ms = max(self.issued_floor_ms, self.issued.pop(oldest, 0))
            self.changed[oldest] = -1

    def keep(self, outcome: Outcome) -> None:
        """Remembers an outcome."""
        self.outcomes[outcome.command_id] = outcome
        # Many at once: a dictionary finds its first key slowly where others stood before it.
        if len(self.outcomes) > MAX_OUTCOMES + _FORGOTTEN_AT_ONCE:
            for name in list(islice(self.outcomes, _FORGOTTEN_AT_ONCE)):
                del self.outcomes[name]

    def outcome(self, command_id: str) -> Outcome | None:
        """The first outcome of a command; None where it is not remembered."""
        return self.outcomes.get(command_id)

    def copy(self) -> RunPosition:
        """An independent one."""
        return replace(
            self,
            cursor=dict(self.cursor),
            sequences=dict(self.sequences),
            issued=dict(self.issued),
            outcomes=dict(self.outcomes),
            changed=dict(self.changed),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold.

        >>> RunPosition.from_dict(RunPosition(epoch=3).as_dict()).epoch
        3
        """
        return {
            "identity": self.identity,
            "epoch": self.epoch,
            "cursor": {topic.value: last for topic, last in self.cursor.items()},
            "sequences": dict(self.sequences),
            "issued": dict(self.issued),
            "issued_floor_ms": self.issued_floor_ms,
            "outcomes": {name: _JSON.encode(o).decode() for name, o in self.outcomes.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunPosition:
        """The position from `as_dict`.

        Raises:
          ValueError: it is not such values.
        """
        try:
            texts = msgspec.convert(values.get("outcomes", {}), dict[str, str])
            outcomes = {name: _OUTCOME.decode(text) for name, text in texts.items()}
            rest = {name: value for name, value in values.items() if name != "outcomes"}
            return replace(msgspec.convert(rest, cls), outcomes=outcomes)
        except (msgspec.MsgspecError, AttributeError) as error:
            raise ValueError(f"not a run's position on the bus: {error}") from None
