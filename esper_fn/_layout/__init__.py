"""Where seeds sit, where their adapters live, and how both act on an activation."""

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
from esper_fn._layout._probe import Moments
from esper_fn._layout._scope import Mark, marked
from esper_fn._layout._seeds import NoSeeds, Seeds, Visits
from esper_fn._layout._site import Site, site, span
from esper_fn._layout._view import (
    per_slot_tree,
    slot_gains,
    statistics_of,
    view,
    zero_probes,
    zero_taps,
)
from esper_kernels import Statistics

__all__ = [
    "UNSERVED",
    "Directions",
    "Layout",
    "Mark",
    "Memory",
    "Moments",
    "NoSeeds",
    "Seeds",
    "Site",
    "Statistics",
    "Visits",
    "allocate",
    "give",
    "give_birth",
    "has_directed",
    "init_adapters",
    "make_layout",
    "marked",
    "no_directions",
    "per_slot_tree",
    "release",
    "select_slots",
    "site",
    "slot_gains",
    "span",
    "statistics_of",
    "view",
    "zero_probes",
    "zero_taps",
]
