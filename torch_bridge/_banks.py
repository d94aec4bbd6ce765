"""The banks of a bridge: who lives in them, and who learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esper_kernels import NUM_GAINS
from torch_bridge._adapters import Form
from torch_bridge._optim import Partial, Watcher
from torch_bridge._plan import BankPlan, plan_bank
from torch_bridge._settle import Learning
from torch_bridge._shared import Shared
from torch_bridge._site import Seeds


class Bank(NamedTuple):
    """One bank of the layout and the module that holds its adapters."""

    site: Seeds
    name: str
    start: int
    num_slots: int
    first_seed: int
    form: Form


def banks_of(sites: Sequence[Seeds]) -> list[Bank]:
    """The banks of some sites, in the order of their slots."""
    banks = [Bank(site, *of) for site in sites for of in site.slots_of_banks]
    return sorted(banks, key=lambda bank: bank.start)


def tell_copy(shared: Shared) -> None:
    """Gives the sites of a copied model their plans, which no bridge does.

    Nothing is measured there, as nobody would read it.
    """
    sites, lifecycle = shared.living_sites(), shared.lifecycle
    banks = banks_of(sites)
    gains = lifecycle.gains()
    shared.is_busy = bool(np.any(gains != 0))
    tell_sites(sites, banks, gains, lifecycle.owner(), is_watching=False)


def tell_sites(
    sites: Sequence[Seeds],
    banks: Sequence[Bank],
    gains: np.ndarray,
    owner: np.ndarray,
    *,
    is_watching: bool,
) -> None:
    """Gives every site its plan for the next step.

    Args:
      sites: all of a model, or those that a copy of a part of it has.
      banks: theirs.
      gains: float32[Q, 4].
      owner: int32[Q].
      is_watching: whether dormant chunks are measured.
    """
    num_seeds = max([*(site.first_seed + site.plan.cut.chunks for site in sites), owner.max() + 1])
    by_seed = np.zeros((num_seeds, NUM_GAINS), np.float32)
    row, slot = (np.full((num_seeds,), -1, np.int32) for _ in range(2))
    is_held = owner >= 0
    by_seed[owner[is_held]] = gains[is_held]
    is_live = is_held & np.any(gains != 0, axis=1)
    plans: dict[int, list[BankPlan]] = {id(site): [] for site in sites}
    for bank in banks:
        here = slice(bank.start, bank.start + bank.num_slots)
        slots = np.flatnonzero(is_live[here])
        if not slots.size:
            continue
        chunks = owner[here][slots] - bank.first_seed
        site, names = bank.site, bank.site.names_of(bank.name)
        plan = plan_bank(
            site.plan.cut, bank.name, bank.form, names, slots, chunks, gains[here][slots]
        )
        row[bank.first_seed + np.sort(chunks)] = np.arange(len(slots))
        slot[bank.first_seed + chunks] = slots
        plans[id(bank.site)].append(plan)
    flats: dict[torch.device, list[Tensor]] = {}
    for site in sites:
        first = site.first_seed
        device, last = site.tap.device, first + site.plan.cut.chunks
        if device not in flats:
            flats[device] = [torch.tensor(of, device=device) for of in (by_seed, row, slot)]
        on_gains, on_row, site.slot = (_aligned(of[first:last]) for of in flats[device])
        site.plan = replace(
            site.plan,
            banks=tuple(of.to(device) for of in plans[id(site)]),
            gains=on_gains,
            row=on_row,
            is_watching=is_watching,
            bound={},
        )
        site.gains = on_gains


def _aligned(part: Tensor) -> Tensor:
    """In memory that begins at a multiple of 16 bytes, for which kernels start quickest."""
    return part.clone() if part.data_ptr() % 16 else part


def tell_optimizers(optimizers: Watcher, banks: Sequence[Bank], learns: np.ndarray) -> None:
    """Says which adapters the next optimiser's step may move; `learns` is bool[Q]."""
    resting: list[nn.Parameter] = []
    learning: list[tuple[list[nn.Parameter], np.ndarray, bool]] = []
    partial: list[Partial] = []
    for bank in banks:
        here = learns[bank.start : bank.start + bank.num_slots]
        yes, no = np.flatnonzero(here), np.flatnonzero(~here)
        if not bank.site.names_of(bank.name):
            continue
        if not yes.size:
            resting += bank.site.parameters_of(bank.name)
            continue
        slots, params = yes, bank.site.parameters_of(bank.name, tuple(yes.tolist()))
        if bank.site.is_stacked:
            slots = np.arange(bank.num_slots)
            if no.size:
                partial.append(Partial(params, torch.tensor(here, device=params[0].device)))
        else:
            resting += bank.site.parameters_of(bank.name, tuple(no.tolist()))
        learning.append((params, bank.start + slots, bank.site.is_stacked))
    optimizers.resting, optimizers.partial = resting, partial
    optimizers.learning = Learning(learning)
