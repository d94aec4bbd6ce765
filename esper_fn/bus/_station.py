"""A run's place on the bus, without JAX: a thread that talks, and calls that never wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from secrets import token_hex
from types import TracebackType

from esper_fn.bus._clerk import Clerk, Terms
from esper_fn.bus._connect import LoopThread
from esper_fn.bus._desk import Desk
from esper_fn.bus._intake import Taken
from esper_fn.bus._messages import Announcement, Message, Outcome
from esper_fn.bus._position import RunPosition
from esper_fn.bus._resilience import Clock
from esper_fn.bus._signing import NO_KEYS, Keyring
from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import Transport


class Station:
    """Takes commands for a run and sends what it has to tell.

    `take`, `finish`, `flush` and `offer` belong to the training loop: they touch memory only, and
    never wait for a server (`flush` for the thread, where asked to). A thread of its own does all
    the talking.

    Args:
      transport: makes the transport, inside that thread.
      announcement: what the run serves.
      position: what is in force already, from a checkpoint; nothing where left out.
      keys: to verify commands with and to sign.
      lease_seconds: without a sign of life for so long, another process may take over.
      should_take_over: even from a living one.
      keeps_commands: commands in force stay on the server until `kept_from` allows to forget them,
        for a run that may be restored to an earlier position.
      max_telemetry: messages kept while the server is slow or away; older ones are dropped.
      max_events: the same for events.
      gap_seconds: how long a missing number of a producer is waited for.
      gather_seconds: how long telemetry and events gather before they go out together: each
        publication takes time from the processor that trains.
      clock: seconds, rising.
    """

    def __init__(
        self,
        transport: Callable[[], Transport],
        announcement: Announcement,
        *,
        position: RunPosition | None = None,
        keys: Keyring = NO_KEYS,
        lease_seconds: float = 6.0,
        should_take_over: bool = False,
        keeps_commands: bool = False,
        max_telemetry: int = 10_000,
        max_events: int = 20_000,
        gap_seconds: float = 1.0,
        gather_seconds: float = 0.2,
        clock: Clock = time.monotonic,
    ) -> None:
        at = RunPosition() if position is None else position.copy()
        at.identity = at.identity or token_hex(16)
        terms = Terms(
            keys=keys,
            lease_seconds=lease_seconds,
            should_take_over=should_take_over,
            gap_seconds=gap_seconds,
            gather_seconds=gather_seconds,
            limits={Topic.TELEMETRY: max_telemetry, Topic.EVENTS: max_events},
            clock=clock,
        )
        self._desk = Desk(at, terms.limits)
        self._clerk = Clerk(
            self._desk,
            transport,
            announcement,
            at,
            is_given=position is not None,
            terms=terms,
            keeps_commands=keeps_commands,
        )
        self._thread: LoopThread | None = None
        self._is_listening = False

    def start(self, *, is_listening: bool = True) -> None:
        """Takes the run's place.

        Args:
          is_listening: takes commands; otherwise from `listen` on, for a run that may be restored
            to another position first.

        Raises:
          BusUnavailableError: no server.
          BusSecurityError: a server others can reach, without a key.
          LeaseHeldError: another process drives the run.
        """
        self._is_listening = is_listening
        self._thread = LoopThread("esper-bus")
        try:
            self._thread.call(self._clerk.open(is_listening=is_listening))
        except BaseException:
            self._thread.close()
            raise

    def listen(self) -> None:
        """Begins to take commands, where that was left for later."""
        if self._thread is not None and not self._is_listening:
            self._is_listening = True
            self._thread.soon(self._clerk.listen)

    def take(self, step: int, limit: int) -> list[Taken]:
        """Commands whose turn it is, at most `limit`.

        Raises:
          FencedError: another process has taken over.
        """
        taken = self._desk.take(step, limit)
        self.flush()  # some may have been refused
        return taken

    @property
    def has_news(self) -> bool:
        """Whether `take` would return something, or raise: a step without news need not call it."""
        return self._desk.has_news

    def put_back(self, taken: Iterable[Taken]) -> None:
        """Returns commands that did not fit."""
        self._desk.put_back(taken)

    def finish(self, taken: Taken, outcome: Outcome) -> None:
        """Notes what became of a command."""
        self._desk.finish(taken, outcome)

    def flush(self, wait_seconds: float = 0.0) -> None:
        """Has the thread make known what was finished; without that, it is left to sleep.

        Args:
          wait_seconds: at most so long the caller sleeps, so that the thread gets the interpreter
            now, and not when this one next lets it go, which may take milliseconds.
        """
        if self._thread is None or not self._desk.has_done:
            return
        self._thread.soon(self._clerk.settle_now.set)
        if wait_seconds:
            self._desk.wait_collected(wait_seconds)

    def offer(self, messages: Iterable[Message]) -> None:
        """Sends telemetry and events when the server can take them; the oldest go before that."""
        if self._desk.offer(messages) and self._thread is not None:
            self._thread.soon(self._clerk.drain_later)

    def offer_later(self, make: Callable[[], Iterable[Message]]) -> None:
        """As `offer`, with messages that the thread makes when they go out."""
        if self._desk.offer_later(make) and self._thread is not None:
            self._thread.soon(self._clerk.drain_later)

    def wait(self, seconds: float | None) -> None:
        """Sleeps until a command is there, for a paused loop."""
        self._desk.wait(seconds)

    def set_paused(self, is_paused: bool) -> None:
        """For heartbeats."""
        self._desk.is_paused = is_paused

    def set_step(self, step: int) -> None:
        """For heartbeats; `take` does it too."""
        self._desk.step = step

    def position(self) -> RunPosition:
        """What is in force now; between steps it belongs to the state of training."""
        return self._desk.position()

    def keep_commands(self) -> None:
        """From now on, as with `keeps_commands=True`."""
        self._clerk.keeps_commands = True

    def kept_from(self, cursor: Mapping[Topic, str]) -> None:
        """No position before this cursor will be restored: earlier commands may be forgotten."""
        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._clerk.trim(dict(cursor)), self._thread.loop)

    @property
    def num_dropped(self) -> int:
        """Telemetry and events dropped so far."""
        return self._desk.num_dropped + self._clerk.num_dropped

    @property
    def num_settled(self) -> int:
        """Entries known to be acknowledged."""
        return self._clerk.num_settled

    @property
    def num_lost_servers(self) -> int:
        """How often the server turned out to have lost its memory."""
        return self._clerk.num_lost_servers

    @property
    def num_waiting(self) -> int:
        """Commands that wait for their turn."""
        return self._desk.num_waiting

    @property
    def counts(self) -> dict[str, int]:
        """Messages set aside and duplicates, by reason."""
        return self._desk.counts

    @property
    def is_fenced(self) -> bool:
        """Whether another process has taken over."""
        return self._desk.is_fenced

    def close(self, drain_seconds: float = 2.0) -> None:
        """Makes known what is still to be, for so long, and gives the place up."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            thread.call(self._clerk.close(drain_seconds), drain_seconds + 10)
        finally:
            thread.close()

    def __enter__(self) -> Station:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
