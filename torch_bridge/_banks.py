"""The banks of a bridge: who lives in them, and who learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esper_kernels import NUM_GAINS, Gains
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

    @property
    def slots(self) -> slice:
        """Its slots among all."""
        return slice(self.start, self.start + self.num_slots)


def banks_of(sites: Sequence[Seeds]) -> list[Bank]:
    """The banks of some sites, in the order of their slots."""
    banks = [Bank(site, *bank) for site in sites for bank in site.bank_slots]
    return sorted(banks, key=lambda bank: bank.start)


def refresh_copy(shared: Shared) -> None:
    """Gives the sites of a copied model their plans, which no bridge does.

    Nothing is measured there, as nobody would read it.
    """
    sites, lifecycle = shared.living_sites(), shared.lifecycle
    gains = lifecycle.gains()
    shared.is_busy = bool(np.any(gains != 0))
    update_plans(sites, banks_of(sites), gains, lifecycle.owner(), is_watching=False)


class _Seats(NamedTuple):
    """Which adapter serves each seed, where seeds count on from site to site."""

    gains: np.ndarray
    """float32[S, 4]."""
    row: np.ndarray
    """int32[S]: its row among the live adapters of its bank, -1 for none."""
    slot: np.ndarray
    """int32[S]: its slot in its bank, -1 for none."""


def update_plans(
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
      gains: float32[Q, 4], the columns of `Gains`.
      owner: int32[Q].
      is_watching: whether dormant chunks are measured.
    """
    plans, seats = _live_banks(sites, banks, gains, owner)
    flats: dict[torch.device, list[Tensor]] = {}
    for site in sites:
        device, plan = site.tap.device, site.plan
        if device not in flats:
            flats[device] = [torch.tensor(column, device=device) for column in seats]
        own = slice(site.first_seed, site.first_seed + plan.chunking.chunks)
        site.gains, row, site.slot = (_aligned(column[own]) for column in flats[device])
        site.plan = replace(
            plan,
            banks=tuple(bank.to(device) for bank in plans[id(site)]),
            gains=site.gains,
            row=row,
            is_watching=is_watching,
        )


def _live_banks(
    sites: Sequence[Seeds], banks: Sequence[Bank], gains: np.ndarray, owner: np.ndarray
) -> tuple[dict[int, list[BankPlan]], _Seats]:
    """The plans of the banks in which an adapter lives, by the site's identity."""
    ends = [site.first_seed + site.plan.chunking.chunks for site in sites]
    num_seeds = max([*ends, owner.max() + 1])
    row, slot = (np.full((num_seeds,), -1, np.int32) for _ in range(2))
    seats = _Seats(np.zeros((num_seeds, NUM_GAINS), np.float32), row, slot)
    is_owned = owner >= 0
    seats.gains[owner[is_owned]] = gains[is_owned]
    is_live = is_owned & np.any(gains != 0, axis=1)
    plans: dict[int, list[BankPlan]] = {id(site): [] for site in sites}
    for bank in banks:
        slots = np.flatnonzero(is_live[bank.slots])
        if not slots.size:
            continue
        chunks = owner[bank.slots][slots] - bank.first_seed
        names, chunking = bank.site.names_of(bank.name), bank.site.plan.chunking
        own_gains = gains[bank.slots][slots]
        plan = plan_bank(chunking, bank.name, bank.form, names, slots, chunks, own_gains)
        row[bank.first_seed + np.sort(chunks)] = np.arange(len(slots))
        slot[bank.first_seed + chunks] = slots
        plans[id(bank.site)].append(plan)
    return plans, seats


def _aligned(part: Tensor) -> Tensor:
    """Moves numbers to where kernels start quickest: a multiple of 16 bytes."""
    return part.clone() if part.data_ptr() % 16 else part


def update_learning(optimizers: Watcher, banks: Sequence[Bank], gains: np.ndarray) -> None:
    """Says which adapters the next optimiser's step may move.

    Args:
      optimizers: what watches the optimisers; it is changed.
      banks: all of the model.
      gains: float32[Q, 4], the columns of `Gains`.
    """
    learns = Gains.from_columns(gains).param_grad_scale != 0
    resting: list[nn.Parameter] = []
    learning: list[tuple[list[nn.Parameter], np.ndarray, bool]] = []
    partial: list[Partial] = []
    for bank in banks:
        own = learns[bank.slots]
        yes, no = np.flatnonzero(own), np.flatnonzero(~own)
        if not bank.site.names_of(bank.name):
            continue
        if not yes.size:
            resting += bank.site.parameters_of(bank.name)
            continue
        slots, params = yes, bank.site.parameters_of(bank.name, tuple(yes.tolist()))
        if bank.site.is_stacked:
            slots = np.arange(bank.num_slots)
            if no.size:
                partial.append(Partial(params, torch.tensor(own, device=params[0].device)))
        else:
            resting += bank.site.parameters_of(bank.name, tuple(no.tolist()))
        learning.append((params, bank.start + slots, bank.site.is_stacked))
    optimizers.resting, optimizers.partial = resting, partial
    optimizers.learning = Learning(learning)
