"""What the loop that trains and the thread that talks share: one lock, and no wait for a server."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from esper_fn.bus._intake import Done, Intake, Taken
from esper_fn.bus._messages import Message, Outcome
from esper_fn.bus._position import RunPosition
from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import Attached, Delivery
from esper_fn.errors import BusUnavailableError, FencedError

_MAX_INBOX = 2_048


Words = Message | Callable[[], Iterable[Message]]
"""What waits to go out; a function makes it when it does."""


class Collected(NamedTuple):
    """What is to be made known, and whether more commands may be read."""

    done: list[Done]
    cursor: dict[Topic, str]
    sequences: dict[str, int]
    has_room: bool


class Desk:
    """Commands that came in, and words that go out.

    Args:
      position: what is in force already; kept up to date here.
      limits: of the telemetry and events that wait to go out; the oldest go beyond that.
    """

    def __init__(self, position: RunPosition, limits: Mapping[Topic, int]) -> None:
        self._changed = threading.Condition()
        self._position = position
        self._intake: Intake | None = None
        self._outbox: dict[Topic, deque[Words]] = {
            topic: deque(maxlen=limit) for topic, limit in limits.items()
        }
        self._is_draining = False
        self._finished: deque[tuple[Taken, Outcome]] = deque()
        """By the loop, and not yet entered: it waits for no lock to say so."""
        self._fenced: FencedError | None = None
        self.step = -1
        self.is_paused = False
        self.num_dropped = 0

    def open(self, intake: Intake) -> None:
        """Before anything else: the intake, made for `position`."""
        self._intake = intake

    # --- for the loop ---------------------------------------------------------------------------

    def take(self, step: int, limit: int) -> list[Taken]:
        """Commands whose turn it is.

        Raises:
          FencedError: another process has taken over.
        """
        with self._changed:
            if self._fenced is not None:
                raise self._fenced
            self.step = step
            return self._entered().take(limit) if self.has_news else []

    def put_back(self, taken: Iterable[Taken]) -> None:
        """Returns commands, first in line again."""
        with self._changed:
            self._entered().put_back(taken)

    def finish(self, taken: Taken, outcome: Outcome) -> None:
        """Notes what became of a command."""
        self._finished.append((taken, outcome))

    def offer(self, messages: Iterable[Message]) -> bool:
        """Puts words into the outbox; True where nobody was told yet to empty it."""
        return self._put([(message.topic, message) for message in messages])

    def offer_later(self, make: Callable[[], Iterable[Message]]) -> bool:
        """The same for words that are made when they go out; they are dropped as telemetry is."""
        return self._put([(Topic.TELEMETRY, make)])

    def _put(self, words: Iterable[tuple[Topic, Words]]) -> bool:
        with self._changed:
            for topic, one in words:
                box = self._outbox[topic]
                self.num_dropped += len(box) == box.maxlen
                box.append(one)
            was_draining, self._is_draining = self._is_draining, True
        return not was_draining

    def wait(self, seconds: float | None) -> None:
        """Sleeps until a command is there."""
        with self._changed:
            self._changed.wait_for(lambda: self.has_news, seconds)

    def wait_collected(self, seconds: float) -> None:
        """Sleeps until the thread has taken up what was finished, or never will."""
        with self._changed:
            self._changed.wait_for(lambda: not self.has_done or self.is_fenced, seconds)

    def position(self) -> RunPosition:
        """A copy of what is in force now."""
        with self._changed:
            self._entered()
            return self._position.copy()

    @property
    def has_news(self) -> bool:
        """Whether `take` would return something, or raise; asked without the lock."""
        return self._fenced is not None or (self._intake is not None and self._intake.has_ready)

    @property
    def has_done(self) -> bool:
        """Whether something is to be made known."""
        return bool(self._finished) or (self._intake is not None and self._intake.has_done)

    @property
    def num_waiting(self) -> int:
        """Commands that wait for their turn."""
        return 0 if self._intake is None else self._intake.num_waiting

    @property
    def counts(self) -> dict[str, int]:
        """Messages set aside and duplicates, by reason."""
        return {} if self._intake is None else dict(self._intake.counts)

    # --- for the thread -------------------------------------------------------------------------

    @property
    def is_fenced(self) -> bool:
        """Whether another process has taken over."""
        return self._fenced is not None

    def lose(self, error: FencedError) -> None:
        """Another process has taken over: the loop hears of it next time."""
        with self._changed:
            self._fenced = error
            self._changed.notify_all()

    def arrive(self, found: Attached, *, is_given: bool, is_again: bool = False) -> None:
        """A lease was taken.

        Args:
          found: there.
          is_given: the position counts, and not what the server remembers.
          is_again: by this process, which goes on: the server is told what it may have lost.
        """
        with self._changed:
            intake = self._entered()
            self._position.epoch = found.lease.epoch
            intake.forget_entries(found.emptied)
            if is_again:
                self._position.changed = {**self._position.sequences, **self._position.changed}
            else:
                if not is_given:
                    self._position.cursor.update(found.cursor)
                known, undone = ({}, found.sequences) if is_given else (found.sequences, {})
                intake.restart(found.attempts, known, undone)
            intake.accept(found.leftovers)

    def accept(self, topic: Topic, found: list[Delivery], *, is_all: bool) -> bool:
        """Takes deliveries in; False where the reader should wait for room.

        Args:
          topic: of all of them.
          found: in order.
          is_all: nothing more waits on the server.
        """
        with self._changed:
            intake = self._held()
            intake.accept(found)
            if is_all:
                intake.drained(topic)
            self._changed.notify_all()
            return intake.num_waiting < _MAX_INBOX

    def collect(self) -> Collected:
        """What is to be made known since the last call."""
        with self._changed:
            intake = self._entered()
            collected = Collected(
                intake.collect(),
                dict(self._position.cursor),
                dict(self._position.changed),
                intake.num_waiting < _MAX_INBOX // 2,
            )
            self._position.changed.clear()
            self._changed.notify_all()
        return collected

    def expire_gaps(self) -> float | None:
        """See `Intake.expire_gaps`."""
        with self._changed:
            left = self._held().expire_gaps()
            self._changed.notify_all()
        return left

    def empty_outbox(self) -> dict[Topic, list[Message]]:
        """Words that wait to go out."""
        with self._changed:
            self._is_draining = False
            boxes = [box.copy() for box in self._outbox.values()]
            for box in self._outbox.values():
                box.clear()
        found: dict[Topic, list[Message]] = {}
        for box in boxes:
            for one in box:
                for message in (one,) if isinstance(one, Message) else one():
                    found.setdefault(message.topic, []).append(message)
        return found

    def _entered(self) -> Intake:
        """The intake, which knows of everything finished; under the lock."""
        intake = self._held()
        while self._finished:
            intake.finish(*self._finished.popleft())
        return intake

    def _held(self) -> Intake:
        if self._intake is None:
            raise BusUnavailableError("the station was not started; use it as a context")
        return self._intake
