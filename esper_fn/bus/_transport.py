"""The seam between the bus and what carries it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from redis.exceptions import RedisError

from esper_fn.bus._messages import Topic
from esper_fn.errors import BusSecurityError, BusUnavailableError

RUN_GROUP = "run:"
"""Prefix of the consumer groups through which runs read commands; each lease has its own group."""
BEGINNING = "0-0"
READ_BYTES = 1 << 20
"""A read that returned so many bytes may have left entries behind."""
OUTAGES = (BusUnavailableError, BusSecurityError, RedisError)
"""What a transport raises while its server is away or refuses."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Allowed names of runs."""


class Entry(NamedTuple):
    """What a publisher adds to a stream."""

    payload: bytes
    signature: bytes = b""


class Delivery(NamedTuple):
    """An entry as a reader gets it. `entry_id` is `milliseconds-number` and rises in a stream."""

    topic: Topic
    entry_id: str
    payload: bytes
    signature: bytes = b""
    deliveries: int = 1
    """Number of times it was delivered, this time included."""
    withheld_bytes: int = 0
    """Size of an entry whose bytes were not read: it is too large, or of a foreign form."""

    @property
    def size_bytes(self) -> int:
        """Size of the payload, or of the whole entry where its bytes were not read."""
        return self.withheld_bytes or len(self.payload)


class Publication(NamedTuple):
    """The result of `publish`."""

    num_new: int
    """Entries added now; the others were added by an earlier attempt."""
    generation: str
    """Random name of the server's data; another name means that all data were lost."""


class Lease(NamedTuple):
    """The right to drive a run, until it expires or another process takes over."""

    holder: str
    epoch: int
    """Rises with each lease; calls with an older epoch are fenced."""

    @property
    def group(self) -> str:
        """The consumer group of this lease; the next lease destroys it."""
        return f"{RUN_GROUP}{self.epoch}"


class Attachment(NamedTuple):
    """The result of `attach`."""

    lease: Lease
    generation: str
    cursor: dict[Topic, str]
    """The last entry of each command stream up to which all commands are applied."""
    sequences: dict[str, int]
    """Last applied sequence number by `producer/topic`; empty on a new server."""
    leftovers: list[Delivery]
    """Applied entries that were not acknowledged; they are answered and settled again."""
    attempts: dict[tuple[Topic, str], int]
    """How often a worker ended while an entry was the first one delivered and not settled."""
    server_ms: int
    lost: frozenset[Topic] = frozenset()
    """Streams that end before the cursor: they were lost and start again at `BEGINNING`."""


class Renewal(NamedTuple):
    """The result of `renew`."""

    server_ms: int
    exhausted: frozenset[Topic] = frozenset()
    """Command streams that cannot take more entries."""


class Settlement(NamedTuple):
    """Acknowledgements, outcomes and the new position, published as one transaction."""

    number: int
    """1, 2, 3, ... within a lease; a repeated settlement keeps its number."""
    acks: Mapping[Topic, Sequence[str]]
    cursor: Mapping[Topic, str]
    sequences: Mapping[str, int]
    """New last numbers, as `Attachment.sequences`; -1 removes a producer."""
    outcomes: Sequence[Entry] = ()
    dead: Sequence[Entry] = ()


class OtherRunError(Exception):
    """Commands are signed for another run of this name; none was accepted.

    Args:
      identity: identity of the active run; empty while none accepts commands.
    """

    def __init__(self, identity: str) -> None:
        super().__init__(f"the run's identity is {identity or 'not known yet'}")
        self.identity = identity


class Transport(Protocol):
    """Carries entries between processes. One suite of contract tests drives all implementations.

    Guarantees, for each stream (a topic of a run):

    - Entries are delivered in the order of acceptance: to each group at least once, until they are
      acknowledged, and to `tail` while the stream keeps them.
    - `publish` and `settle` may be repeated after a lost answer without a second effect.
    - A stream that refuses at its limit loses no entry to it; any other stream exceeds its limit
      by at most a tenth.
    - A waiting reader sleeps until an entry comes.

    A method raises `BusUnavailableError` if the server does not answer in time. It is then unknown
    whether the call had an effect; repeat it.
    """

    run: str
    """Name of the run."""

    def stream(self, topic: Topic) -> str:
        """Name of a topic's stream; signatures cover it."""
        ...

    async def open(self) -> int:
        """Connects; returns the server's time in milliseconds.

        Raises:
          BusUnavailableError: there is no server.
          BusSecurityError: other machines can reach the server, and there is no key.
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
    ) -> Publication:
        """Adds entries numbered `first`, `first + 1`, ... by their producer; all or none.

        Args:
          topic: the stream to add to.
          producer: id of the publishing connection.
          first: sequence number of the first entry.
          entries: the entries, in order.
          identity: identity of the run that they are for; without it they are for any run.

        Raises:
          BusyError: the stream is full; nothing was accepted.
          OtherRunError: another run of this name is active; nothing was accepted.
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
        """Delivers new entries to a consumer of a group, at most `limit` for each topic.

        It delivers fewer than there are only if they have at least `READ_BYTES`. It waits for the
        first one, for ever with None. A group that does not exist starts at the beginning, unless
        it is the group of a lease. At most one read of the same topics and consumer may run.

        Raises:
          FencedError: the group of the lease is gone; `renew` finds out why.
        """
        ...

    async def tail(
        self, after: Mapping[Topic, str], *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """Reads entries after the given ones without a group, so that each reader sees all."""
        ...

    async def last_ids(self, topics: Sequence[Topic]) -> dict[Topic, str]:
        """Finds the last entry of each stream, for `tail`."""
        ...

    async def acknowledge(self, topic: Topic, group: str, entry_ids: Sequence[str]) -> int:
        """Acknowledges entries; returns how many of them were not acknowledged before."""
        ...

    async def claim(
        self, topic: Topic, group: str, consumer: str, *, idle_seconds: float, limit: int
    ) -> list[Delivery]:
        """Delivers again what was delivered `idle_seconds` ago and never acknowledged.

        Raises:
          FencedError: the group of the lease is gone; `renew` finds out why.
        """
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
    ) -> Attachment:
        """Takes the lease of the run. Commands after `cursor` are delivered again.

        Args:
          holder: name of this process.
          lease_seconds: the lease expires without a renewal for so long.
          least_epoch: the new epoch is larger than this.
          cursor: from the position of the run; by default the last settled entries.
          should_take_over: take the lease from an active holder too, which is then fenced.
          identity: identity of the run, for signed commands; empty while it accepts none.
          counts_attempts: whether the former holder has ended; False if it is this process.

        Raises:
          LeaseHeldError: another process has the lease.
        """
        ...

    async def renew(
        self,
        lease: Lease,
        *,
        lease_seconds: float,
        identity: str = "",
        last_read: Mapping[Topic, str] | None = None,
    ) -> Renewal:
        """Renews the lease and publishes the run's identity.

        Args:
          lease: the lease.
          lease_seconds: the lease expires without another renewal for so long.
          identity: as for `attach`.
          last_read: the last entry of each command stream that the run has read; no later one is
            settled. Without it, the call does not check that later ones will be delivered.

        Raises:
          FencedError: the lease is lost. `epoch` is above that of the lease if another process
            has taken it, and 0 if the server has lost data of it, or if the group was moved past
            entries that the holder did not get.
        """
        ...

    async def release(self, lease: Lease) -> None:
        """Ends the lease, if it is still valid."""
        ...

    async def settle(self, lease: Lease, settlement: Settlement) -> None:
        """Acknowledges entries, publishes outcomes and dead letters, and stores the position.

        Raises:
          FencedError: the lease is not the newest one; nothing was changed.
        """
        ...

    async def trim(self, topic: Topic, before: str) -> int:
        """Removes the entries before one; returns how many there were."""
        ...

    async def discard(self, topic: Topic, entry_ids: Sequence[str]) -> int:
        """Removes entries; returns how many there were."""
        ...

    async def holder(self) -> str | None:
        """Name of the process that has the lease of the run, if any."""
        ...

    async def active_runs(self) -> list[str]:
        """Names of all runs on this server whose lease is valid."""
        ...

    async def close(self) -> None:
        """Disconnects; later calls raise `BusUnavailableError`."""
        ...


def exhausted_text(streams: Iterable[str]) -> str:
    """Explains streams whose last id is the largest possible one, with the remedy."""
    names = list(streams)
    several = len(names) > 1
    return (
        f"the stream{'s' * several} {' and '.join(names) or 'of the run'} can take no more "
        f"entries, as the last id there is the largest possible (someone used XSETID or XADD with "
        f"it); remove or rename {'them' if several else 'it'} on the server (DEL, RENAME): the run "
        f"makes {'them' if several else 'it'} anew"
    )


def entry_key(entry_id: str) -> tuple[int, int]:
    """Key to sort entries by age.

    >>> entry_key("12-3") < entry_key("12-10")
    True
    """
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def milliseconds(seconds: float) -> int:
    """Rounds up to whole milliseconds, at least one."""
    return max(1, math.ceil(seconds * 1000))
