"""All sites of a host and the room for their adapters: tables, allocation, directions."""

from esper_fn._layout._allocate import (
    UNSERVED,
    allocate,
    give,
    give_birth,
    release,
    select_slots,
)
from esper_fn._layout._directions import Directions, Memory, has_directed, no_directions
from esper_fn._layout._layout import Layout, init_adapters, make_layout
from esper_fn._layout._view import (
    per_slot_tree,
    slot_gains,
    statistics_of,
    view,
    zero_probes,
    zero_taps,
)

__all__ = [
    "UNSERVED",
    "Directions",
    "Layout",
    "Memory",
    "allocate",
    "give",
    "give_birth",
    "has_directed",
    "init_adapters",
    "make_layout",
    "no_directions",
    "per_slot_tree",
    "release",
    "select_slots",
    "slot_gains",
    "statistics_of",
    "view",
    "zero_probes",
    "zero_taps",
]
