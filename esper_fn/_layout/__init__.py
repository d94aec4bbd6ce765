"""All sites of a host and the slots of their adapters: tables, allocation, trees of banks."""

from esper_fn._layout._allocate import allocate, free_slots
from esper_fn._layout._banks import (
    bank_indices,
    join_banks,
    map_banks,
    select_slots,
    split_by_bank,
)
from esper_fn._layout._layout import (
    Bank,
    Layout,
    alike_banks,
    init_adapters,
    make_layout,
    serves,
)
from esper_fn._layout._view import (
    evaluation_seeds,
    slot_gains,
    statistics_of,
    view,
    zero_probes,
    zero_taps,
)

__all__ = [
    "Bank",
    "Layout",
    "alike_banks",
    "allocate",
    "bank_indices",
    "evaluation_seeds",
    "free_slots",
    "init_adapters",
    "join_banks",
    "make_layout",
    "map_banks",
    "select_slots",
    "serves",
    "slot_gains",
    "split_by_bank",
    "statistics_of",
    "view",
    "zero_probes",
    "zero_taps",
]
