"""Where seeds sit, where their bodies live, and how both act on an activation."""

from esper_fn._lattice._allocate import (
    UNSERVED,
    allocate,
    give,
    give_birth,
    release,
    select_slots,
)
from esper_fn._lattice._forward import NUM_CHANNELS, Reading
from esper_fn._lattice._lattice import Bank, Lattice, init_bodies, lattice, serves
from esper_fn._lattice._probe import Moments
from esper_fn._lattice._seeds import BareSeeds, Seeds, SiteView, Visits
from esper_fn._lattice._site import Chunking, Site, chunk_mask, site, span
from esper_fn._lattice._view import (
    Probes,
    Taps,
    per_slot_tree,
    readings_of,
    slot_gains,
    view,
    zero_probes,
    zero_taps,
)

__all__ = [
    "NUM_CHANNELS",
    "UNSERVED",
    "Bank",
    "BareSeeds",
    "Chunking",
    "Lattice",
    "Moments",
    "Probes",
    "Reading",
    "Seeds",
    "Site",
    "SiteView",
    "Taps",
    "Visits",
    "allocate",
    "chunk_mask",
    "give",
    "give_birth",
    "init_bodies",
    "lattice",
    "per_slot_tree",
    "readings_of",
    "release",
    "select_slots",
    "serves",
    "site",
    "slot_gains",
    "span",
    "view",
    "zero_probes",
    "zero_taps",
]
