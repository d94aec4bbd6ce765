"""Where seeds sit, where their bodies live, and how both act on an activation."""

from esper_fn._lattice._allocate import (
    UNSERVED,
    allocate,
    give,
    give_birth,
    release,
    select_slots,
)
from esper_fn._lattice._directions import Directions, Memory, has_directed, no_directions
from esper_fn._lattice._forward import Reading
from esper_fn._lattice._lattice import Lattice, init_bodies, lattice
from esper_fn._lattice._probe import Moments
from esper_fn._lattice._scope import Mark, marked
from esper_fn._lattice._seeds import BareSeeds, Seeds, Visits
from esper_fn._lattice._site import Site, chunk_mask, site, span
from esper_fn._lattice._view import (
    per_slot_tree,
    readings_of,
    slot_gains,
    view,
    zero_probes,
    zero_taps,
)

__all__ = [
    "UNSERVED",
    "BareSeeds",
    "Directions",
    "Lattice",
    "Mark",
    "Memory",
    "Moments",
    "Reading",
    "Seeds",
    "Site",
    "Visits",
    "allocate",
    "chunk_mask",
    "give",
    "give_birth",
    "has_directed",
    "init_bodies",
    "lattice",
    "marked",
    "no_directions",
    "per_slot_tree",
    "readings_of",
    "release",
    "select_slots",
    "site",
    "slot_gains",
    "span",
    "view",
    "zero_probes",
    "zero_taps",
]
