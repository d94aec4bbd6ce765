"""The seam between the bus and whatever carries it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from esper_fn.bus._topics import Topic

RUN_GROUP = "run:"
"""How the consumer groups begin through which runs take commands: one for each lease."""
BEGINNING = "0-0"
READ_BYTES = 1 << 20
"""A reader who is handed so many bytes of entries at once may have got fewer than there are."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a run may be called."""


class Entry(NamedTuple):
    """What is put into a stream."""

    payload: bytes
    signature: bytes = b""


class Delivery(NamedTuple):
    """What comes out of one. `entry_id` is `milliseconds-number`, rising within a stream."""

    topic: Topic
    entry_id: str
    payload: bytes
    signature: bytes = b""
    deliveries: int = 1
    """How often it was handed out, this time included."""
    withheld_bytes: int = 0
    """Size of an entry that was not handed out: too large for its topic, or none of ours."""

    @property
    def size_bytes(self) -> int:
        """Of the payload, or of the whole entry where it was withheld."""
        return self.withheld_bytes or len(self.payload)


class Published(NamedTuple):
    """What became of a publication."""

    num_new: int
    """Entries added; the others were there from an earlier attempt."""
    generation: str
    """Name of the server's memory; another name means that it has forgotten everything."""


class Lease(NamedTuple):
    """A run's place on the bus, until it expires or someone takes over."""

    holder: str
    epoch: int
    """Rises with each holder: whoever holds an older one is refused."""

    @property
    def group(self) -> str:
        """The consumer group of this lease; it ends with it, so that nobody reads for two."""
        return f"{RUN_GROUP}{self.epoch}"


class Attached(NamedTuple):
    """What a run finds when it takes its place."""

    lease: Lease
    generation: str
    cursor: dict[Topic, str]
    """The last entry of each command stream that is in force."""
    sequences: dict[str, int]
    """Last number in force of each producer, as `producer/topic`; empty on a fresh server."""
    leftovers: list[Delivery]
    """Entries in force whose acknowledgement got lost: to be answered and settled again."""
    attempts: dict[tuple[Topic, str], int]
    """How often a run has ended with an entry handed out, not settled, and first in line."""
    server_ms: int
    emptied: frozenset[Topic] = frozenset()
    """Streams that end before the cursor: they were lost, and begin anew at `BEGINNING`."""


class Renewed(NamedTuple):
    """A place that is kept."""

    server_ms: int
    exhausted: frozenset[Topic] = frozenset()
    """Command streams that can take no more entries."""


class Settlement(NamedTuple):
    """What a run has done, to be made known in one piece."""

    number: int
    """1, 2, 3, ... within a lease; a repeated settlement keeps its number."""
    done: Mapping[Topic, Sequence[str]]
    cursor: Mapping[Topic, str]
    sequences: Mapping[str, int]
    """New last numbers, as `Attached.sequences`; -1 to forget a producer."""
    outcomes: Sequence[Entry] = ()
    dead: Sequence[Entry] = ()


class LeaseHeldError(Exception):
    """Somebody else holds the lease.

    Args:
      holder: who.
      seconds: until it expires.
      epoch: of that lease.
    """

    def __init__(self, holder: str, seconds: float, epoch: int = 0) -> None:
        super().__init__(f"held by {holder} for {seconds:.1f} s more")
        self.holder = holder
        self.seconds = seconds
        self.epoch = epoch


class OtherRunError(Exception):
    """Commands are signed for another run of this name than the one that lives; none was accepted.

    Args:
      identity: of the run that lives; empty where none takes commands yet.
    """

    def __init__(self, identity: str) -> None:
        super().__init__(f"the run's identity is {identity or 'not known yet'}")
        self.identity = identity


class Transport(Protocol):
    """Carries entries between processes. One contract suite drives every implementation.

    Guarantees, for each stream (a topic of a run):

    - An accepted entry is handed out in the order of acceptance, to each group at least once, until
      it is acknowledged; to `tail` in order while the stream keeps it.
    - `publish`, `settle` and `bury` may be repeated after a lost answer without a second effect.
    - A stream of policy REFUSE never loses an entry to a limit; one of policy FORGET never grows
      beyond its limit by more than a tenth.
    - Waiting costs nothing: a reader sleeps until an entry comes.

    A method raises `BusUnavailableError` where the server does not answer in time; whether it had
    an effect is then unknown, and repeating it is right.
    """

    @property
    def run(self) -> str:
        """Whose streams these are."""
        ...

    def stream(self, topic: Topic) -> str:
        """Name of a stream; part of what is signed."""
        ...

    async def open(self) -> int:
        """Connects; returns the server's time in milliseconds.

        Raises:
          BusUnavailableError: no server.
          BusSecurityError: others could reach it, and there is no key.
        """
        ...

    async def publish(
        self,
        topic: Topic,
        producer: str,
        first: int,
        entries: Sequence[Entry],
        *,
        identity: str | None = None,
    ) -> Published:
        """Adds entries numbered `first`, `first + 1`, ... by their producer; all or none.

        Args:
          topic: which stream.
          producer: who.
          first: number of the first entry.
          entries: in order.
          identity: of the run they are meant for; any where left out.

        Raises:
          BusyError: the stream is full and refuses.
          OtherRunError: another run of this name lives; nothing was accepted.
        """
        ...

    async def read(
        self,
        topics: Sequence[Topic],
        group: str,
        consumer: str,
        *,
        limit: int,
        wait_seconds: float | None,
    ) -> list[Delivery]:
        """Hands out new entries to one consumer of a group, at most `limit` a topic.

        Fewer, even if more are there, only where they have `READ_BYTES` or more together.

        Waits for the first one, for ever with None. A group that does not exist starts at the
        beginning, except a lease's. Only one read of a transport may be under way for the same
        topics and consumer.

        Raises:
          FencedError: the lease's group is gone; `renew` knows why.
        """
        ...

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """Entries after the given ones, without a group: everyone sees all of them."""
        ...

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """The last entry of each stream, for `tail`."""
        ...

    async def acknowledge(self, topic: Topic, group: str, entry_ids: Sequence[str]) -> int:
        """Says that entries need not be handed out again; returns how many were waiting for it."""
        ...

    async def claim(
        self, topic: Topic, group: str, consumer: str, *, idle_seconds: float, limit: int
    ) -> list[Delivery]:
        """Hands out anew what was handed out `idle_seconds` ago and never acknowledged.

        Raises:
          FencedError: the lease's group is gone; `renew` knows why.
        """
        ...

    async def bury(self, topic: Topic, group: str, entry_ids: Sequence[str], dead: Entry) -> None:
        """Acknowledges entries and adds a dead letter, in one piece."""
        ...

    async def attach(
        self,
        holder: str,
        *,
        lease_seconds: float,
        least_epoch: int = 0,
        cursor: Mapping[Topic, str] | None = None,
        should_take_over: bool = False,
        identity: str = "",
        counts_attempts: bool = True,
    ) -> Attached:
        """Takes a run's place. The commands after `cursor` will be handed out again.

        Args:
          holder: name of this process.
          lease_seconds: how long the place is kept without a renewal.
          least_epoch: the new epoch is larger.
          cursor: from a run's position; the last settled entries where left out.
          should_take_over: even from a living holder, who is then fenced off.
          identity: of the run, for which commands are signed; empty while it takes none.
          counts_attempts: the holder before has ended; False where it is this process itself.

        Raises:
          LeaseHeldError: somebody else lives there.
        """
        ...

    async def renew(
        self,
        lease: Lease,
        *,
        lease_seconds: float,
        identity: str = "",
        taken: Mapping[Topic, str] | None = None,
    ) -> Renewed:
        """Keeps the place and tells the run's identity.

        Args:
          lease: to keep.
          lease_seconds: how long without another renewal.
          identity: as `attach`.
          taken: of each command stream the last entry that the run has taken in; nothing later is
            settled yet. Where left out, it is not checked that later ones will be handed out.

        Raises:
          FencedError: it is lost. `epoch` is above the lease's where another process has proved
            to have taken it, and 0 where the server has lost it, or some of it, or where the
            group was moved past entries that the holder was not handed.
        """
        ...

    async def release(self, lease: Lease) -> None:
        """Gives the place up, if it is still held."""
        ...

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """Acknowledges, publishes outcomes and dead letters, and notes the position, in one piece.

        Raises:
          FencedError: the lease is not the newest one; nothing was done.
        """
        ...

    async def trim(self, topic: Topic, before: str) -> int:
        """Forgets entries before one; returns how many."""
        ...

    async def page(self, topic: Topic, *, after: str, limit: int) -> list[Delivery]:
        """Entries after one, without waiting."""
        ...

    async def discard(self, topic: Topic, entry_ids: Sequence[str]) -> int:
        """Removes entries for good; returns how many were there."""
        ...

    async def length(self, topic: Topic) -> int:
        """Entries a stream keeps."""
        ...

    async def holder(self) -> str | None:
        """Who holds the run's lease; None when nobody does."""
        ...

    async def living(self) -> list[str]:
        """Names of the runs that hold a lease on this server."""
        ...

    async def close(self) -> None:
        """Disconnects; later calls raise."""
        ...


def exhausted_words(streams: Iterable[str]) -> str:
    """What is wrong with streams whose last id is the largest there is, and the remedy."""
    names = list(streams)
    several = len(names) > 1
    return (
        f"the stream{'s' * several} {' and '.join(names) or 'of the run'} can take no more "
        f"entries, as the last id there is the largest possible (someone used XSETID or XADD with "
        f"it); remove or rename {'them' if several else 'it'} on the server (DEL, RENAME): the run "
        f"makes {'them' if several else 'it'} anew"
    )


def order(entry_id: str) -> tuple[int, int]:
    """Sorts entry names by age.

    >>> order("12-3") < order("12-10")
    True
    """
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def milliseconds(seconds: float) -> int:
    """Whole milliseconds, at least one."""
    return max(1, math.ceil(seconds * 1000))
