"""What a run has done and not yet made known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from esper_fn.bus._codec import FORMAT, SCHEMA, Header
from esper_fn.bus._intake import Done
from esper_fn.bus._messages import Message
from esper_fn.bus._publisher import ServerTime
from esper_fn.bus._signing import Keyring
from esper_fn.bus._topics import COMMAND_TOPICS, Topic
from esper_fn.bus._transport import Entry, Settlement

_OUTCOMES_IN_PARCEL = 64


class Ledger:
    """Turns what is done into settlements, and keeps each one until it is known to be settled.

    Args:
      producer: name of the run's process.
      stream: name of a topic's stream, for signatures.
      keys: to sign with.
      server_time: for headers.
    """

    def __init__(
        self,
        producer: str,
        stream: Callable[[Topic], str],
        *,
        keys: Keyring,
        server_time: ServerTime,
    ) -> None:
        self._producer = producer
        self._stream = stream
        self._keys = keys
        self._time = server_time
        self._done: tuple[Done, ...] = ()
        self._sequences: dict[str, int] = {}
        self._number = 0
        self._current: Settlement | None = None

    @property
    def is_empty(self) -> bool:
        """Whether everything entered is known to be settled."""
        return not self._done

    @property
    def current(self) -> Settlement | None:
        """The settlement to be made, or to be made again."""
        return self._current

    def restart(self) -> None:
        """A new lease counts from one; what is not settled goes into its first settlement."""
        self._number, self._current = 0, None

    def enter(
        self, done: Sequence[Done], cursor: dict[Topic, str], sequences: dict[str, int]
    ) -> None:
        """Takes in what is done since the last time, and makes the next settlement of it.

        Args:
          done: by the intake.
          cursor: of the run's position.
          sequences: of the run's position, those that have changed.
        """
        self._done = (*self._done, *done)
        self._sequences = {**self._sequences, **sequences}
        if not self._done and not self._sequences:
            return
        self._number += 1
        entries: dict[Topic, list[str]] = {topic: [] for topic in COMMAND_TOPICS}
        for item in self._done:
            if item.entry_id:
                entries[item.topic].append(item.entry_id)
        outcomes: list[Message] = [i.outcome for i in self._done if i.outcome is not None]
        dead: list[Message] = [i.dead for i in self._done if i.dead is not None]
        self._current = Settlement(
            number=self._number,
            done=entries,
            cursor=cursor,
            sequences=self._sequences,
            outcomes=[
                self._pack(Topic.OUTCOMES, outcomes[at : at + _OUTCOMES_IN_PARCEL])
                for at in range(0, len(outcomes), _OUTCOMES_IN_PARCEL)
            ],
            dead=[self._pack(Topic.DEAD, [letter]) for letter in dead],
        )

    def settled(self) -> int:
        """The current settlement is made; returns how many entries it acknowledged."""
        current = self._current
        self._done, self._sequences, self._current = (), {}, None
        return 0 if current is None else sum(map(len, current.done.values()))

    def _pack(self, topic: Topic, messages: list[Message]) -> Entry:
        header = Header(
            format=FORMAT,
            producer=self._producer,
            sequence=self._number,
            issued_at_ms=self._time.now_ms(),
        )
        payload = SCHEMA.encode(header, messages)
        return Entry(payload, self._keys.sign(self._stream(topic), payload))
