"""What a run takes from its command streams: checked, in order, once. No input or output here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from esper_fn.bus._codec import SCHEMA, Header, Schema, check_size
from esper_fn.bus._line import Line
from esper_fn.bus._messages import Batch, Command, DeadLetter, Outcome, SeedCommand
from esper_fn.bus._position import RunPosition
from esper_fn.bus._publisher import ServerTime
from esper_fn.bus._resilience import Clock
from esper_fn.bus._signing import NO_KEYS, Keyring
from esper_fn.bus._topics import COMMAND_TOPICS, Topic
from esper_fn.bus._transport import BEGINNING, Delivery, order
from esper_fn.errors import MessageError, ReplayedError, UndecodableError

MAX_ATTEMPTS = 5
"""A command during which the run ended so often is set aside."""
MAX_HELD = 1_024
"""Commands kept back for an earlier one of the same producer."""
REPLAY_WINDOW_MS = 86_400_000
_LARGEST_KEPT_BYTES = 64 * 1024


class Taken(NamedTuple):
    """A command whose turn it is."""

    delivery: Delivery
    command: Command
    trace: str | None
    key: str
    sequence: int


class Done(NamedTuple):
    """An entry that needs no more attention, and what to tell about it."""

    topic: Topic
    entry_id: str
    outcome: Outcome | None
    dead: DeadLetter | None


@dataclass(slots=True)
class _Held:
    taken: Taken
    since: float


class Intake:
    """Decides about each delivery: take it, hold it, answer it again, or set it aside.

    Args:
      position: what is in force already; kept up to date here.
      stream: name of a topic's stream, for signatures.
      keys: to verify with.
      server_time: for the age of commands.
      clock: seconds, rising.
      gap_seconds: how long a missing number is waited for.
      schema: the messages there are.
    """

    def __init__(
        self,
        position: RunPosition,
        stream: Callable[[Topic], str],
        *,
        keys: Keyring = NO_KEYS,
        server_time: ServerTime | None = None,
        clock: Clock = time.monotonic,
        gap_seconds: float = 1.0,
        schema: Schema = SCHEMA,
    ) -> None:
        self.position = position
        self._streams = {topic: stream(topic) for topic in COMMAND_TOPICS}
        self._keys = keys
        self._time = server_time or ServerTime(clock)
        self._clock = clock
        self._lines = {topic: Line(self._time, clock) for topic in COMMAND_TOPICS}
        self._gap_seconds = gap_seconds
        self._schema = schema
        self._ready: dict[Topic, deque[Taken]] = {topic: deque() for topic in COMMAND_TOPICS}
        self._held: dict[str, dict[int, _Held]] = {}
        self._seen: dict[str, int] = dict(position.sequences)
        self._done: list[Done] = []
        self._attempts: dict[tuple[Topic, str], int] = {}
        self._undone: dict[str, int] = {}
        self._out: set[str] = set()
        self.counts: dict[str, int] = {}

    # --- from the bus ---------------------------------------------------------------------------

    def restart(
        self,
        attempts: dict[tuple[Topic, str], int],
        sequences: dict[str, int],
        undone: dict[str, int],
    ) -> None:
        """A lease was taken.

        Args:
          attempts: how often entries were tried.
          sequences: numbers the server remembers, which are in force here too.
          undone: numbers that were in force in a process whose state is gone. Commands to seeds
            come again; stopping, pausing and saving were done to that process and are over.
        """
        self._attempts = dict(attempts)
        self._undone = dict(undone)
        for key, number in sequences.items():
            self.position.note(key, max(number, self.position.sequences.get(key, -1)))
            self._seen[key] = max(number, self._seen.get(key, -1))

    def forget_entries(self, topics: Iterable[Topic] = COMMAND_TOPICS) -> None:
        """The server has lost these streams: names of entries mean nothing any more."""
        for topic in topics:
            self._lines[topic].forget()
            self.position.cursor.pop(topic, None)

    def drained(self, topic: Topic) -> None:
        """A stream has nothing more right now: whatever comes later is published later."""
        self._lines[topic].drained()

    def accept(self, deliveries: Iterable[Delivery]) -> None:
        """Takes deliveries in, in the order of their stream."""
        # They move meanwhile, and only over what was accepted here.
        cursors = {topic: order(last) for topic, last in self.position.cursor.items()}
        now = self._clock()
        for delivery in deliveries:
            line = self._lines[delivery.topic]
            if delivery.entry_id in line:
                continue
            at = order(delivery.entry_id)
            if at <= cursors.get(delivery.topic, (-1, -1)) and not self._is_new(delivery):
                self._answer_again(delivery)
                continue
            line.came(delivery.entry_id, at, now)
            try:
                self._check(delivery)
            except MessageError as error:
                self._bury(delivery, error.reason, str(error))
                self._close_gap(delivery, error)

    def expire_gaps(self) -> float | None:
        """Gives up waiting for numbers that do not come; returns seconds to the next such time."""
        now, soonest = self._clock(), None
        for key, held in list(self._held.items()):
            while held:
                first = min(held)
                left = min(h.since for h in held.values()) + self._gap_seconds - now
                if left > 0:
                    soonest = left if soonest is None else min(soonest, left)
                    break
                missing = range(self._seen.get(key, -1) + 1, first)
                delivery = held[first].taken.delivery
                self._count("gap")
                self._done.append(
                    Done(
                        delivery.topic,
                        "",
                        None,
                        DeadLetter(
                            reason="gap",
                            words=f"numbers {missing.start} to {missing.stop - 1} of producer "
                            f"{key.partition('/')[0]} did not come within "
                            f"{self._gap_seconds} s; later ones went ahead",
                            from_topic=delivery.topic,
                            entry_id=delivery.entry_id,
                            size_bytes=0,
                        ),
                    )
                )
                self._seen[key] = first - 1
                self._let_go(key)
            if not held:
                self._held.pop(key, None)
        return soonest

    # --- from the loop --------------------------------------------------------------------------

    def take(self, limit: int) -> list[Taken]:
        """The next commands: urgent ones first, then in order; expired ones are refused here.

        One that is out already waits until that is in force, and is answered with its outcome.
        """
        out: list[Taken] = []
        for topic in COMMAND_TOPICS:
            ready, copies = self._ready[topic], []
            is_alone = False
            while ready and len(out) < limit and not is_alone:
                taken = ready.popleft()
                if taken.command.id in self._out:
                    copies.append(taken)
                elif not self._is_over(taken):
                    out.append(taken)
                    self._out.add(taken.command.id)
                    # The run ended with this one: alone, it shows whether it was the cause.
                    is_alone = (topic, taken.delivery.entry_id) in self._attempts
            ready.extendleft(reversed(copies))
            if is_alone:
                break
        return out

    def put_back(self, taken: Iterable[Taken]) -> None:
        """Returns commands, first of their stream again."""
        for item in reversed(list(taken)):
            self._out.discard(item.command.id)
            self._ready[item.delivery.topic].appendleft(item)

    def finish(self, taken: Taken, outcome: Outcome) -> None:
        """A command is in force, or refused: the position moves on."""
        self._out.discard(taken.command.id)
        self.position.keep(outcome)
        self.position.note(taken.key, taken.sequence)
        self._settle(taken.delivery, outcome, None)

    def collect(self) -> list[Done]:
        """What is to be settled since the last call."""
        done, self._done = self._done, []
        return done

    @property
    def has_done(self) -> bool:
        """Whether `collect` would return something."""
        return bool(self._done)

    @property
    def num_waiting(self) -> int:
        """Commands taken in and not yet taken out."""
        return sum(map(len, self._ready.values())) + sum(map(len, self._held.values()))

    @property
    def has_ready(self) -> bool:
        """Whether `take` would have something to look at."""
        return any(
            taken.command.id not in self._out for ready in self._ready.values() for taken in ready
        )

    # --- parts ---------------------------------------------------------------------------------

    def _check(self, delivery: Delivery) -> None:
        check_size(delivery.topic, delivery.size_bytes)
        self._keys.verify(self._streams[delivery.topic], delivery.payload, delivery.signature)
        parcel = self._schema.decode(delivery.payload)
        header, messages = parcel.header, parcel.messages
        if self._keys.is_required and header.identity != self.position.identity:
            raise ReplayedError(
                f"signed for another run of this name ({header.identity[:80] or 'any'}); this is "
                f"{self.position.identity}"
            )
        if len(messages) != 1 or not isinstance(messages[0], Command):
            raise UndecodableError("an entry of a command stream must hold exactly one command")
        command = messages[0]
        if command.topic is not delivery.topic:
            raise UndecodableError(
                f"{type(command).__name__} lies on topic {delivery.topic.value!r}; it belongs on "
                f"{command.topic.value!r}"
            )
        self._sort_in(delivery, header, command)

    def _sort_in(self, delivery: Delivery, header: Header, command: Command) -> None:
        key = f"{header.producer}/{delivery.topic}"
        taken = Taken(delivery, command, header.trace, key, header.sequence)
        last = self._seen.get(key, -1)
        if header.sequence <= last:
            self._count("duplicate")
            if command.id in self.position.outcomes:
                self._settle(delivery, self.position.outcome(command.id), None)
            elif self._is_on_its_way(command.id):
                self._settle(delivery, None, None)
            else:
                self._bury(
                    delivery,
                    "replayed",
                    f"number {header.sequence} of producer {header.producer}, after {last}",
                )
            return
        if key not in self._seen and self._keys.is_required:
            age_ms = self._time.now_ms() - header.issued_at_ms
            if header.issued_at_ms <= self.position.issued_floor_ms or age_ms > REPLAY_WINDOW_MS:
                self._bury(
                    delivery,
                    "replayed",
                    f"by a producer unknown here, issued {age_ms / 1000:.0f} s ago",
                )
                return
        self.position.issued[key] = header.issued_at_ms
        if header.sequence == last + 1 and key not in self._held:
            self._seen[key] = header.sequence
            self._ready[delivery.topic].append(taken)
            return
        held = self._held.setdefault(key, {})
        if header.sequence in held:
            self._count("duplicate")
            self._settle(delivery, None, None)
            return
        if header.sequence > last + 1 and self.num_waiting >= MAX_HELD:
            self._bury(delivery, "gap", f"{MAX_HELD} commands wait already")
            return
        held[header.sequence] = _Held(taken, self._clock())
        self._let_go(key)

    def _let_go(self, key: str) -> None:
        held = self._held.get(key, {})
        while (following := self._seen.get(key, -1) + 1) in held:
            taken = held.pop(following).taken
            self._seen[key] = following
            self._ready[taken.delivery.topic].append(taken)
        if not held:
            self._held.pop(key, None)

    def _close_gap(self, delivery: Delivery, error: MessageError) -> None:
        """A message that is authentic but unreadable has used up its number."""
        if error.reason in {"forged", "oversized", "replayed"}:
            return
        try:
            header = self._schema.decode_header(delivery.payload)
        except MessageError:
            return
        key = f"{header.producer}/{delivery.topic}"
        if header.sequence == self._seen.get(key, -1) + 1:
            self._seen[key] = header.sequence
            self.position.note(key, header.sequence)
            self._let_go(key)

    def _is_on_its_way(self, command_id: str) -> bool:
        return command_id in self._out or any(
            taken.command.id == command_id for ready in self._ready.values() for taken in ready
        )

    def _is_over(self, taken: Taken) -> bool:
        """Whether a command's turn need not come: it is answered here."""
        if taken.command.id in self.position.outcomes:
            self._finish_again(taken)
            return True
        is_undone = taken.sequence <= self._undone.get(taken.key, -1)
        if is_undone and not isinstance(taken.command, SeedCommand | Batch):
            self.position.note(taken.key, taken.sequence)
            self._settle(taken.delivery, None, None)
            return True
        if self._attempts.get((taken.delivery.topic, taken.delivery.entry_id), 0) >= MAX_ATTEMPTS:
            words = f"the run ended {MAX_ATTEMPTS} times while it had this command"
            self._refuse(taken, "failing", words)
            return True
        if self._is_expired(taken):
            words = f"older than {taken.command.expires_after_seconds} s"
            self._refuse(taken, "expired", words)
            return True
        return False

    def _is_expired(self, taken: Taken) -> bool:
        limit = taken.command.expires_after_seconds
        if limit is None:
            return False
        held_ms = self._schema.decode_header(taken.delivery.payload).held_ms
        line = self._lines[taken.delivery.topic]
        return held_ms / 1000 + line.seconds_in_stream(taken.delivery.entry_id) > limit

    def _refuse(self, taken: Taken, reason: str, words: str) -> None:
        outcome = Outcome(command_id=taken.command.id, code=reason.upper(), words=words)
        self._count(reason)
        self.position.keep(outcome)
        self.position.note(taken.key, taken.sequence)
        self._settle(taken.delivery, outcome, _letter(taken.delivery, reason, words))

    def _finish_again(self, taken: Taken) -> None:
        self._count("duplicate")
        self.position.note(taken.key, taken.sequence)
        self._settle(taken.delivery, self.position.outcome(taken.command.id), None)

    def _is_new(self, delivery: Delivery) -> bool:
        """Whether an entry at or before the cursor was not in force when the cursor passed.

        A server that took over from another one may name entries by a clock that lags behind.
        """
        try:
            check_size(delivery.topic, delivery.size_bytes)
            self._keys.verify(self._streams[delivery.topic], delivery.payload, delivery.signature)
            header = self._schema.decode_header(delivery.payload)
        except MessageError:
            return False
        key = f"{header.producer}/{delivery.topic}"
        if key in self._seen:
            return header.sequence > self._seen[key]
        return header.issued_at_ms > self.position.issued_floor_ms

    def _answer_again(self, delivery: Delivery) -> None:
        """An entry at or before the cursor is in force: only its answer may have got lost."""
        self._count("duplicate")
        outcome = None
        try:
            check_size(delivery.topic, delivery.size_bytes)
            self._keys.verify(self._streams[delivery.topic], delivery.payload, delivery.signature)
            for message in self._schema.decode(delivery.payload).messages:
                outcome = self.position.outcome(message.id)
        except (MessageError, AttributeError):
            pass
        self._done.append(Done(delivery.topic, delivery.entry_id, outcome, None))

    def _bury(self, delivery: Delivery, reason: str, words: str) -> None:
        self._count(reason)
        self._settle(delivery, None, _letter(delivery, reason, words))

    def _settle(self, delivery: Delivery, outcome: Outcome | None, dead: DeadLetter | None) -> None:
        topic, entry_id = delivery.topic, delivery.entry_id
        self._attempts.pop((topic, entry_id), None)
        cursor = self._lines[topic].finish(entry_id)
        if cursor is not None and order(cursor) > order(self.position.cursor.get(topic, BEGINNING)):
            self.position.cursor[topic] = cursor
        self._done.append(Done(topic, entry_id, outcome, dead))

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def _letter(delivery: Delivery, reason: str, words: str) -> DeadLetter:
    is_small = reason != "oversized" and len(delivery.payload) <= _LARGEST_KEPT_BYTES
    return DeadLetter(
        reason=reason,
        words=words[:2_000],
        from_topic=delivery.topic,
        entry_id=delivery.entry_id,
        size_bytes=delivery.size_bytes,
        deliveries=delivery.deliveries,
        payload=delivery.payload if is_small else b"",
        signature=delivery.signature[:200] if is_small else b"",
    )
