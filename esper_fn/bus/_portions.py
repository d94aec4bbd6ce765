"""Entries of any size from a Redis server, in portions: of too large ones their size only."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from esper_fn.bus._link import OverlongReplyError
from esper_fn.bus._replies import largest_bytes
from esper_fn.bus._topics import Topic
from esper_fn.bus._transport import BEGINNING, READ_BYTES, Delivery, milliseconds

_LOGGER = logging.getLogger(__name__)
_MOST_ENTRIES = 500


class Portion(NamedTuple):
    """Some entries, and how to go on."""

    deliveries: list[Delivery]
    is_all: bool
    at: str
    """Where the next portion begins."""


class Portions:
    """Reads streams by the script `PORTION`.

    Where an ordinary command brings more than `_link.MOST_REPLY_BYTES`, this brings little more
    than `READ_BYTES`, whatever anybody wrote. It needs more of the server, and cannot wait.

    Args:
      run: the script, with keys and arguments.
      stream: name of a topic's.
    """

    def __init__(
        self,
        run: Callable[[list[str], list[Any]], Awaitable[Any]],
        stream: Callable[[Topic], str],
    ) -> None:
        self._run = run
        self._stream = stream
        self._overloaded: set[str] = set()
        """Readers that had too large an answer."""

    async def read(
        self,
        role: str,
        topics: Sequence[Topic],
        whole: Callable[[], Awaitable[list[Delivery]]],
        portion: Callable[[Topic], Awaitable[Portion]],
    ) -> list[Delivery]:
        """All at once while that is little; else in portions until there is nothing more.

        Args:
          role: of the reader.
          topics: that it reads.
          whole: reads them at once, and may wait.
          portion: reads some of one.
        """
        if role not in self._overloaded:
            try:
                return await whole()
            except OverlongReplyError as error:
                _LOGGER.info("%s; it is read in portions", error)
                self._overloaded.add(role)
        parts = [await portion(topic) for topic in topics]
        if all(part.is_all for part in parts):
            self._overloaded.discard(role)
        return [one for part in parts for one in part.deliveries]

    async def _portion(self, topic: Topic, limit: int, *what: Any) -> Portion:
        rows, is_all, at = await self._run(
            [self._stream(topic)],
            [min(limit, _MOST_ENTRIES), READ_BYTES, largest_bytes(topic), *what],
        )
        found = [
            Delivery(topic, entry_id.decode(), payload, signature, count, withheld)
            for entry_id, withheld, payload, signature, count in rows
        ]
        return Portion(found, bool(is_all), at.decode())

    async def after(self, topic: Topic, last: str, limit: int) -> Portion:
        """Entries after one."""
        return await self._portion(topic, limit, "after", last)

    async def last_id(self, topic: Topic) -> str:
        """The last entry."""
        found = (await self._portion(topic, 1, "last")).deliveries
        return found[0].entry_id if found else BEGINNING

    async def new(self, topic: Topic, group: str, consumer: str, last: str, limit: int) -> Portion:
        """New entries of a group, before them those handed to a consumer after `last`."""
        return await self._portion(topic, limit, "new", group, consumer, last)

    async def page(self, topic: Topic, last: str, limit: int) -> list[Delivery]:
        """So many entries after one, whatever they weigh together."""
        found: list[Delivery] = []
        while len(found) < limit:
            part = await self.after(topic, last, limit - len(found))
            found += part.deliveries
            last = part.at
            if part.is_all:
                break
        return found

    async def idle(
        self, topic: Topic, group: str, consumer: str, *, seconds: float, limit: int
    ) -> list[Delivery]:
        """Entries that were handed out so long ago, claimed."""
        found: list[Delivery] = []
        at, least_ms = BEGINNING, milliseconds(seconds) if seconds else 0
        while len(found) < limit:
            what = ("idle", group, consumer, least_ms, at)
            part = await self._portion(topic, limit - len(found), *what)
            found += part.deliveries
            at = part.at
            if part.is_all:
                break
        return found

    async def named(self, topic: Topic, counts: Mapping[str, int]) -> list[Delivery]:
        """Entries by name, as far as they are there, with the deliveries they had."""
        found: list[Delivery] = []
        names = list(counts)
        while names:
            part = await self._portion(topic, len(names), "named", *names[:_MOST_ENTRIES])
            found += [d._replace(deliveries=counts[d.entry_id]) for d in part.deliveries]
            names = names[int(part.at) :]
        return found
