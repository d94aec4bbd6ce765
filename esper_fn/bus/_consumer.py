"""Which deliveries become commands of a run: checked, in order, once. No input or output."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from esper_fn.bus._envelope import SCHEMA, Header, Link
from esper_fn.bus._messages import (
    COMMAND_TOPICS,
    Batch,
    Command,
    DeadLetter,
    Outcome,
    SeedCommand,
    Topic,
)
from esper_fn.bus._position import RunPosition
from esper_fn.bus._timing import ServerTime
from esper_fn.bus._transport import BEGINNING, Attachment, Delivery, entry_key
from esper_fn.errors import MessageError, ReplayedError, UndecodableError

MAX_ATTEMPTS = 5
"""A command during which the worker ended so often becomes a dead letter."""
MAX_EARLY = 1_024
"""Most commands that wait for an earlier one of their producer."""
GAP_SECONDS = 1.0
"""How long to wait for a missing number."""
REPLAY_WINDOW_MS = 86_400_000
_MAX_STORED_BYTES = 64 * 1024


class InFlight(NamedTuple):
    """A command that was delivered and is not acknowledged."""

    delivery: Delivery
    command: Command
    producer: str
    """The producer and the topic, as `producer/topic`."""
    sequence: int
    arrived_at: float
    published_after: float
    """When the stream was last empty."""

    queued_ms: int
    """How long the command waited at its sender."""

    def is_expired(self, time: ServerTime) -> bool:
        """Whether the command is older than it allows.

        The server's clock dates an entry, and nothing may depend on that clock being right.
        Whatever it shows, an entry has waited at least since its arrival, and at most since the
        stream was empty.
        """
        published_ms, _ = entry_key(self.delivery.entry_id)
        age, now = (time.now_ms() - published_ms) / 1000, time.clock()
        age = max(min(age, now - self.published_after), now - self.arrived_at)
        limit = self.command.expires_after_seconds
        return limit is not None and self.queued_ms / 1000 + age > limit


class Ack(NamedTuple):
    """An entry to acknowledge, and what to publish about it."""

    topic: Topic
    entry_id: str
    outcome: Outcome | None = None
    dead: DeadLetter | None = None


def dead_letter(delivery: Delivery, reason: str, text: str) -> DeadLetter:
    """Makes the dead letter of a delivery that is refused."""
    is_small = reason != "oversized" and len(delivery.payload) <= _MAX_STORED_BYTES
    return DeadLetter(
        reason=reason,
        text=text[:2_000],
        from_topic=delivery.topic,
        entry_id=delivery.entry_id,
        size_bytes=delivery.size_bytes,
        deliveries=delivery.deliveries,
        payload=delivery.payload if is_small else b"",
        signature=delivery.signature[:200] if is_small else b"",
    )


class Consumer:
    """Decides about each delivery: apply it, delay it, answer it again, or refuse it.

    Args:
      position: what is applied already; the consumer updates it.
      link: whose keys verify, and whose clock shows the age of commands.
    """

    def __init__(self, position: RunPosition, link: Link) -> None:
        self.position = position
        self.counts: Counter[str] = Counter()
        """Refused and repeated messages by reason."""
        self._link = link
        self._windows: dict[Topic, OrderedDict[str, bool]] = {
            topic: OrderedDict() for topic in COMMAND_TOPICS
        }
        """Entries from the oldest one in flight on, and whether each is acknowledged."""
        self._empty_at = dict.fromkeys(COMMAND_TOPICS, -math.inf)
        """When each stream was last empty."""
        self._ready: dict[Topic, deque[InFlight]] = {topic: deque() for topic in COMMAND_TOPICS}
        self._early: dict[str, dict[int, InFlight]] = {}
        """By producer and number, commands that wait for a smaller number."""
        self._last: dict[str, int] = dict(position.sequences)
        """The last number of each producer that is ready, or was."""
        self._running: set[str] = set()
        """Ids of commands that `take` has returned."""
        self.acks: list[Ack] = []
        """What `collect_acks` would return."""
        self._attempts: dict[tuple[Topic, str], int] = {}
        self._undone: dict[str, int] = {}

    def restart(self, attachment: Attachment, *, is_restored: bool) -> None:
        """Begins with the first lease.

        Args:
          attachment: what the server knows.
          is_restored: whether what it knows as applied was applied in a process whose state is
            gone. Commands to seeds are applied again; stops, pauses and saves concerned that
            process and are not.
        """
        self._attempts = dict(attachment.attempts)
        if is_restored:
            self._undone = dict(attachment.sequences)
            return
        self.position.cursor.update(attachment.cursor)
        for producer, number in attachment.sequences.items():
            self.position.advance(producer, number)
            self._last[producer] = max(number, self._last.get(producer, -1))

    def reset_streams(self, topics: Iterable[Topic] = COMMAND_TOPICS) -> None:
        """Forgets the entry ids of streams that the server has lost."""
        for topic in topics:
            self._windows[topic].clear()
            self.position.cursor.pop(topic, None)

    def note_empty(self, topic: Topic) -> None:
        """Records that a stream is empty now: later entries are published later."""
        self._empty_at[topic] = self._link.time.clock()

    def accept(self, deliveries: Iterable[Delivery]) -> None:
        """Accepts deliveries, in the order of their stream."""
        # The cursors move meanwhile, and only over what was accepted here.
        cursors = {topic: entry_key(last) for topic, last in self.position.cursor.items()}
        for delivery in deliveries:
            topic, window = delivery.topic, self._windows[delivery.topic]
            if delivery.entry_id in window:
                continue
            is_passed = entry_key(delivery.entry_id) <= cursors.get(topic, (-1, -1))
            if is_passed and not self._is_new(delivery):
                self._answer_again(delivery)
                continue
            window[delivery.entry_id] = False
            try:
                self._admit(delivery)
            except MessageError as error:
                self._bury(delivery, error.reason, str(error))
                self._skip_number(delivery, error)

    def expire_gaps(self) -> float | None:
        """Stops waiting for numbers that are overdue; returns seconds until the next one is."""
        now, soonest = self._link.time.clock(), None
        for producer, early in list(self._early.items()):
            while early:
                first = min(early)
                left = min(item.arrived_at for item in early.values()) + GAP_SECONDS - now
                if left > 0:
                    soonest = left if soonest is None else min(soonest, left)
                    break
                delivery = early[first].delivery
                self.counts["gap"] += 1
                text = (
                    f"numbers {self._last.get(producer, -1) + 1} to {first - 1} of producer "
                    f"{producer.partition('/')[0]} did not come within {GAP_SECONDS} s; "
                    "later ones went ahead"
                )
                letter = dead_letter(delivery._replace(payload=b"", signature=b""), "gap", text)
                self.acks.append(Ack(delivery.topic, "", dead=letter))
                self._last[producer] = first - 1
                self._release_early(producer)
        return soonest

    def collect_acks(self) -> list[Ack]:
        """The acknowledgements since the last call."""
        acks, self.acks = self.acks, []
        return acks

    def take(self, limit: int) -> list[InFlight]:
        """Returns the next commands, urgent ones first; expired ones are refused.

        A second command with the id of a running one waits, and gets the outcome of the first.
        """
        items: list[InFlight] = []
        for topic in COMMAND_TOPICS:
            ready, copies = self._ready[topic], []
            is_suspect = False
            while ready and len(items) < limit and not is_suspect:
                item = ready.popleft()
                if item.command.id in self._running:
                    copies.append(item)
                elif not self._is_over(item):
                    items.append(item)
                    self._running.add(item.command.id)
                    # A worker ended during this command: alone, it shows whether it was the cause.
                    is_suspect = (topic, item.delivery.entry_id) in self._attempts
            ready.extendleft(reversed(copies))
            if is_suspect:
                break
        return items

    def put_back(self, items: Iterable[InFlight]) -> None:
        """Returns commands to the front of their streams."""
        for item in reversed(list(items)):
            self._running.discard(item.command.id)
            self._ready[item.delivery.topic].appendleft(item)

    def finish(self, item: InFlight, outcome: Outcome) -> None:
        """Records that a command is applied or refused."""
        self._running.discard(item.command.id)
        self._settle(item, outcome)

    @property
    def num_waiting(self) -> int:
        """Commands that were accepted and not taken."""
        return sum(map(len, self._ready.values())) + sum(map(len, self._early.values()))

    @property
    def has_ready(self) -> bool:
        """Whether `take` has something to decide about."""
        return any(
            item.command.id not in self._running for ready in self._ready.values() for item in ready
        )

    def _admit(self, delivery: Delivery) -> None:
        envelope = SCHEMA.decode(self._link.verified(delivery))
        header, messages = envelope.header, envelope.messages
        if self._link.keys.is_required and header.identity != self.position.identity:
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
        producer, sequence = f"{header.producer}/{delivery.topic}", header.sequence
        now, empty_at = self._link.time.clock(), self._empty_at[delivery.topic]
        item = InFlight(delivery, command, producer, sequence, now, empty_at, header.queued_ms)
        last = self._last.get(producer, -1)
        if sequence <= last:
            self._ack_duplicate(item, last)
            return
        if producer not in self._last and self._link.keys.is_required:
            age_ms = self._link.time.now_ms() - header.issued_at_ms
            if header.issued_at_ms <= self.position.issued_floor_ms or age_ms > REPLAY_WINDOW_MS:
                text = f"by a producer unknown here, issued {age_ms / 1000:.0f} s ago"
                self._bury(delivery, "replayed", text)
                return
        self.position.issued[producer] = header.issued_at_ms
        if sequence == last + 1 and producer not in self._early:
            self._last[producer] = sequence
            self._ready[delivery.topic].append(item)
            return
        early = self._early.get(producer, {})
        if sequence in early:
            self.counts["duplicate"] += 1
            self._ack(delivery)
        elif sequence > last + 1 and self.num_waiting >= MAX_EARLY:
            self._bury(delivery, "gap", f"{MAX_EARLY} commands wait already")
        else:
            self._early.setdefault(producer, {})[sequence] = item
            self._release_early(producer)

    def _ack_duplicate(self, item: InFlight, last: int) -> None:
        delivery, command_id = item.delivery, item.command.id
        self.counts["duplicate"] += 1
        if command_id in self.position.outcomes:
            self._ack(delivery, self.position.outcome(command_id))
        elif command_id in self._running or any(
            other.command.id == command_id for ready in self._ready.values() for other in ready
        ):
            self._ack(delivery)
        else:
            producer = item.producer.partition("/")[0]
            text = f"number {item.sequence} of producer {producer}, after {last}"
            self._bury(delivery, "replayed", text)

    def _release_early(self, producer: str) -> None:
        """Makes commands ready whose predecessors are; forgets a producer without early ones."""
        early = self._early.get(producer, {})
        while (following := self._last.get(producer, -1) + 1) in early:
            item = early.pop(following)
            self._last[producer] = following
            self._ready[item.delivery.topic].append(item)
        if not early:
            self._early.pop(producer, None)

    def _skip_number(self, delivery: Delivery, error: MessageError) -> None:
        """A message that is authentic but unreadable has used up its number."""
        if error.reason in {"forged", "oversized", "replayed"}:
            return
        try:
            header = SCHEMA.decode_header(delivery.payload)
        except MessageError:
            return
        producer = f"{header.producer}/{delivery.topic}"
        if header.sequence == self._last.get(producer, -1) + 1:
            self._last[producer] = header.sequence
            self.position.advance(producer, header.sequence)
            self._release_early(producer)

    def _is_over(self, item: InFlight) -> bool:
        """Whether a command is acknowledged here instead of applied."""
        command, entry = item.command, (item.delivery.topic, item.delivery.entry_id)
        is_undone = item.sequence <= self._undone.get(item.producer, -1)
        if command.id in self.position.outcomes:
            self.counts["duplicate"] += 1
            self._settle(item, self.position.outcome(command.id))
        elif is_undone and not isinstance(command, SeedCommand | Batch):
            self._settle(item)
        elif self._attempts.get(entry, 0) >= MAX_ATTEMPTS:
            text = f"the run ended {MAX_ATTEMPTS} times while it had this command"
            self._refuse(item, "failing", text)
        elif item.is_expired(self._link.time):
            self._refuse(item, "expired", f"older than {command.expires_after_seconds} s")
        else:
            return False
        return True

    def _refuse(self, item: InFlight, reason: str, text: str) -> None:
        outcome = Outcome(command_id=item.command.id, code=reason.upper(), text=text)
        self.counts[reason] += 1
        self._settle(item, outcome, dead_letter(item.delivery, reason, text))

    def _settle(
        self, item: InFlight, outcome: Outcome | None = None, dead: DeadLetter | None = None
    ) -> None:
        if outcome is not None:
            self.position.record(outcome)
        self.position.advance(item.producer, item.sequence)
        self._ack(item.delivery, outcome, dead)

    def _is_new(self, delivery: Delivery) -> bool:
        """Whether an entry at or before the cursor was not applied when the cursor passed.

        A server that took over from another one may name entries by a clock that lags behind.
        """
        try:
            header = SCHEMA.decode_header(self._link.verified(delivery))
        except MessageError:
            return False
        producer = f"{header.producer}/{delivery.topic}"
        if producer in self._last:
            return header.sequence > self._last[producer]
        return header.issued_at_ms > self.position.issued_floor_ms

    def _answer_again(self, delivery: Delivery) -> None:
        """An entry at or before the cursor is applied: only its acknowledgement was lost."""
        self.counts["duplicate"] += 1
        outcome = None
        try:
            for message in SCHEMA.decode(self._link.verified(delivery)).messages:
                outcome = self.position.outcome(message.id)
        except (MessageError, AttributeError):
            pass
        self.acks.append(Ack(delivery.topic, delivery.entry_id, outcome))

    def _bury(self, delivery: Delivery, reason: str, text: str) -> None:
        self.counts[reason] += 1
        self._ack(delivery, None, dead_letter(delivery, reason, text))

    def _ack(
        self, delivery: Delivery, outcome: Outcome | None = None, dead: DeadLetter | None = None
    ) -> None:
        topic, entry_id = delivery.topic, delivery.entry_id
        self._attempts.pop((topic, entry_id), None)
        cursors, window = self.position.cursor, self._windows[topic]
        if entry_id in window:
            window[entry_id] = True
        while window and window[first := next(iter(window))]:
            del window[first]
            cursors[topic] = max(cursors.get(topic, BEGINNING), first, key=entry_key)
        self.acks.append(Ack(topic, entry_id, outcome, dead))
