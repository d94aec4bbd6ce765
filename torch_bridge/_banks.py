"""The banks of a bridge: who lives in them, and who learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from esper_kernels import NUM_GAINS, Gains
from torch_bridge._optim import Partial, Watcher
from torch_bridge._plan import BankPlan, BankSlots, plan_bank
from torch_bridge._settle import Learning
from torch_bridge._shared import Shared
from torch_bridge._site import Seeds


def banks_of(sites: Sequence[Seeds]) -> list[tuple[Seeds, BankSlots]]:
    """The banks of some sites, each with its site."""
    return [(site, bank) for site in sites for bank in site.bank_slots]


def refresh_copy(shared: Shared) -> None:
    """Gives the sites of a copied model their plans, which no bridge does.

    Nothing is measured there, as nobody would read it.
    """
    sites, lifecycle = shared.living_sites(), shared.lifecycle
    gains = lifecycle.gains()
    shared.is_busy = bool(np.any(gains != 0))
    update_plans(sites, gains, lifecycle.owner(), is_watching=False)


def update_plans(
    sites: Sequence[Seeds], gains: np.ndarray, owner: np.ndarray, *, is_watching: bool
) -> None:
    """Gives every site its plan for the next step.

    Args:
      sites: all of a model, or those that a copy of a part of it has.
      gains: float32[Q, 4], the columns of `Gains`.
      owner: int32[Q].
      is_watching: whether dormant chunks are measured.
    """
    plans, columns = _live_banks(sites, gains, owner)
    flats: dict[torch.device, list[Tensor]] = {}
    for site, banks in zip(sites, plans, strict=True):
        device, plan = site.tap.device, site.plan
        if device not in flats:
            flats[device] = [torch.tensor(column, device=device) for column in columns]
        own = slice(site.first_seed, site.first_seed + plan.chunking.chunks)
        site.gains, row, site.slot = (_aligned(column[own]) for column in flats[device])
        site.plan = replace(
            plan,
            banks=tuple(bank.to(device) for bank in banks),
            gains=site.gains,
            row=row,
            is_watching=is_watching,
        )


def _live_banks(
    sites: Sequence[Seeds], gains: np.ndarray, owner: np.ndarray
) -> tuple[list[list[BankPlan]], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The plans of the banks of each site in which an adapter lives, and columns of all seeds.

    The columns are their gains, float32[S, 4]; the row of each one's adapter among the live ones of
    its bank and its slot there, int32[S], -1 for none. Seeds count on from site to site.
    """
    ends = [site.first_seed + site.plan.chunking.chunks for site in sites]
    num_seeds = max([*ends, owner.max() + 1])
    row, slot = (np.full((num_seeds,), -1, np.int32) for _ in range(2))
    seed_gains = np.zeros((num_seeds, NUM_GAINS), np.float32)
    is_owned = owner >= 0
    seed_gains[owner[is_owned]] = gains[is_owned]
    is_live = is_owned & np.any(gains != 0, axis=1)
    plans: list[list[BankPlan]] = []
    for site in sites:
        plans.append([])
        for bank in site.bank_slots:
            slots = np.flatnonzero(is_live[bank.slots])
            if not slots.size:
                continue
            seeds, own_gains = owner[bank.slots][slots], gains[bank.slots][slots]
            names, chunks = site.names_of(bank.name), seeds - bank.first_seed
            plans[-1].append(plan_bank(site.plan.chunking, bank, names, slots, chunks, own_gains))
            row[np.sort(seeds)] = np.arange(len(slots))
            slot[seeds] = slots
    return plans, (seed_gains, row, slot)


def _aligned(part: Tensor) -> Tensor:
    """Moves numbers to where kernels start quickest: a multiple of 16 bytes."""
    return part.clone() if part.data_ptr() % 16 else part


def update_learning(optimizers: Watcher, sites: Sequence[Seeds], gains: np.ndarray) -> None:
    """Says which adapters the next optimiser's step may move.

    Args:
      optimizers: what watches the optimisers; it is changed.
      sites: all of the model.
      gains: float32[Q, 4], the columns of `Gains`.
    """
    learns = Gains.from_columns(gains).param_grad_scale != 0
    resting: list[nn.Parameter] = []
    learning: list[tuple[list[nn.Parameter], np.ndarray, bool]] = []
    partial: list[Partial] = []
    for site, bank in banks_of(sites):
        own = learns[bank.slots]
        yes, no = np.flatnonzero(own), np.flatnonzero(~own)
        if not site.names_of(bank.name):
            continue
        if not yes.size:
            resting += site.parameters_of(bank.name)
            continue
        slots, params = yes, site.parameters_of(bank.name, tuple(yes.tolist()))
        if site.is_stacked:
            slots = np.arange(bank.num_slots)
            if no.size:
                partial.append(Partial(params, torch.tensor(own, device=params[0].device)))
        else:
            resting += site.parameters_of(bank.name, tuple(no.tolist()))
        learning.append((params, bank.start + slots, site.is_stacked))
    optimizers.resting, optimizers.partial = resting, partial
    optimizers.learning = Learning(learning)
