"""The seam between the bus and what carries it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from redis.exceptions import RedisError

from esper_fn.bus._messages import LIMITS, Topic
from esper_fn.errors import BusSecurityError, BusUnavailableError, BusyError, FencedError

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
    seconds: float
    """The lease expires without a renewal for so long."""

    @property
    def group(self) -> str:
        """The consumer group of this lease; the next lease destroys it."""
        return f"{RUN_GROUP}{self.epoch}"


class LeaseRequest(NamedTuple):
    """What `attach` asks for.

    Attributes:
      holder: name of this process.
      seconds: the lease expires without a renewal for so long.
      least_epoch: the new epoch is larger than this.
      cursor: from the position of the run; by default the last settled entries.
      should_take_over: take the lease from an active holder too, which is then fenced.
      identity: identity of the run, for signed commands; empty while it accepts none.
      counts_attempts: whether the former holder has ended; False if it is this process.
    """

    holder: str
    seconds: float
    least_epoch: int = 0
    cursor: Mapping[Topic, str] | None = None
    should_take_over: bool = False
    identity: str = ""
    counts_attempts: bool = True


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

    - Entries are delivered in the order of acceptance: commands to each lease at least once, until
      they are settled, and all of them to `tail` while the stream keeps them.
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
        self, topic: Topic, producer: str, first: int, entries: Sequence[Entry], identity: str = ""
    ) -> Publication:
        """Adds entries numbered `first`, `first + 1`, ... by their producer; all or none.

        Args:
          topic: the stream to add to.
          producer: id of the publishing connection.
          first: sequence number of the first entry.
          entries: the entries, in order.
          identity: identity of the run that they are for; if empty they are for any run.

        Raises:
          BusyError: the stream is full; nothing was accepted.
          OtherRunError: another run of this name is active; nothing was accepted.
        """
        ...

    async def read(
        self, lease: Lease, topic: Topic, *, limit: int, wait_seconds: float | None
    ) -> list[Delivery]:
        """Delivers new commands to the holder of a lease, at most `limit`.

        It delivers fewer than there are only if they have at least `READ_BYTES`. It waits for the
        first one, for ever with None. At most one read of the same topic and lease may run.

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

    async def claim(self, lease: Lease, topic: Topic) -> list[Delivery]:
        """Delivers again what was delivered with a lease and never acknowledged.

        Raises:
          FencedError: the group of the lease is gone; `renew` finds out why.
        """
        ...

    async def attach(self, request: LeaseRequest) -> Attachment:
        """Takes the lease of the run. Commands after the cursor are delivered again.

        Raises:
          LeaseHeldError: another process has the lease.
        """
        ...

    async def renew(
        self, lease: Lease, *, identity: str = "", last_read: Mapping[Topic, str] | None = None
    ) -> Renewal:
        """Renews the lease and publishes the run's identity.

        Args:
          lease: the lease.
          identity: as in `LeaseRequest`.
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
    return (
        f"{' and '.join(streams) or 'a stream of the run'} can take no more entries, as the last "
        "id there is the largest possible (someone used XSETID or XADD with it); remove or rename "
        "it on the server (DEL, RENAME): the run makes it anew"
    )


def entry_key(entry_id: str) -> tuple[int, int]:
    """Key to sort entries by age.

    >>> entry_key("12-3") < entry_key("12-10")
    True
    """
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def busy_error(stream: str, num_waiting: int, topic: Topic) -> BusyError:
    """The error of a stream that is full."""
    return BusyError(
        f"{num_waiting:,} entries wait on {stream}, at most {LIMITS[topic].max_entries:,}; send "
        "more slowly, or wait for outcomes"
    )


def fenced_error(run: str, lease: Lease, epoch: int = 0, holder: str = "") -> FencedError:
    """The error of a lease that is not the newest one, whose epoch and holder are known or not."""
    if epoch <= lease.epoch or holder == lease.holder:
        return FencedError(f"the lease of run {run!r} (epoch {lease.epoch}) is over or was removed")
    return FencedError(
        f"run {run!r} is driven by {holder} now (epoch {epoch}); this process held epoch "
        f"{lease.epoch} and must not go on",
        epoch,
    )


def entry_id(key: tuple[int, int]) -> str:
    """The entry id of a key."""
    return f"{key[0]}-{key[1]}"


def milliseconds(seconds: float) -> int:
    """Rounds up to whole milliseconds, at least one."""
    return max(1, math.ceil(seconds * 1000))
