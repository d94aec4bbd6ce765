"""Values as the server's scripts want them."""

from __future__ import annotations

from typing import Any

from esper_fn.bus._topics import COMMAND_TOPICS, POLICIES, Topic
from esper_fn.bus._transport import RUN_GROUP, Lease, Settlement


def settlement_arguments(lease: Lease, settlement: Settlement) -> list[Any]:
    """For the script `SETTLE`, which says what stands where."""
    done = {topic: settlement.done.get(topic, ()) for topic in COMMAND_TOPICS}
    arguments: list[Any] = [
        lease.epoch,
        settlement.number,
        RUN_GROUP,
        POLICIES[Topic.OUTCOMES].max_entries,
        POLICIES[Topic.DEAD].max_entries,
        len(settlement.outcomes),
        len(settlement.dead),
        len(settlement.sequences),
        lease.holder,
    ]
    for topic in COMMAND_TOPICS:
        arguments += (settlement.cursor.get(topic, ""), len(done[topic]))
    for topic in COMMAND_TOPICS:
        arguments += done[topic]
    for payload, signature in (*settlement.outcomes, *settlement.dead):
        arguments += (payload, signature)
    for name, number in settlement.sequences.items():
        arguments += (name, number)
    return arguments
