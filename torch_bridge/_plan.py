"""Who is alive at a site: facts for Python that decide what runs, and indices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_fn.blueprints import Topology
from esper_fn.types import Layout
from esper_kernels import NUM_GAINS, Chunking, Gains
from torch_bridge._adapters import Form, form_of


@dataclass(frozen=True, eq=False)
class BankPlan:
    """The live adapters of one bank, in the order of their chunks."""

    name: str
    """The blueprint's."""
    form: Form
    leaves: tuple[str, ...]
    """The names of its parameters."""
    rows: Tensor
    """[n]: the slot of each adapter."""
    chunk: Tensor
    """[n]: the chunk it serves."""
    slots: tuple[int, ...]
    """`rows` for Python."""
    is_leading: bool
    """Whether they are the first n slots, in order."""
    mask: Tensor
    """bool[n, F]: real features."""
    columns: Tensor | None
    """[n F] features in an uneven split, D where padded; None for an even one."""
    is_all: bool
    """Every chunk of an even split is served, in order."""
    acts: bool
    """Whether an adapter acts; of n adapters some may have an `output_scale` of 0."""
    is_felt: bool
    """Whether an adapter has an `input_grad_scale`; that of some may be 0."""
    is_full: bool
    """Every adapter acts, learns with a gain of 1, is felt and is not damped."""
    is_damped: bool
    """Whether an adapter is damped; of n adapters some may have a damping of 0."""

    def is_whole(self, leaf: Tensor) -> bool:
        """Whether `[P, ...]` are the parameters of the live adapters, in order."""
        return self.is_leading and len(self.slots) == leaf.shape[0]

    def select(self, leaf: Tensor) -> Tensor:
        """The rows of the live adapters out of `[P, ...]`."""
        return leaf if self.is_whole(leaf) else leaf.index_select(0, self.rows)

    def scatter(self, gradient: Tensor, leaf: Tensor) -> Tensor:
        """The gradient of the live adapters as one of `leaf`, `[P, ...]`."""
        if self.is_whole(leaf):
            return gradient
        return torch.zeros_like(leaf).index_copy_(0, self.rows, gradient)

    def to(self, device: torch.device) -> BankPlan:
        """The same on another device."""
        columns = None if self.columns is None else self.columns.to(device)
        return replace(
            self,
            rows=self.rows.to(device),
            chunk=self.chunk.to(device),
            mask=self.mask.to(device),
            columns=columns,
        )


class BankSlots(NamedTuple):
    """A bank of the layout: which of all slots are its own, and whose."""

    name: str
    start: int
    num_slots: int
    first_seed: int
    """The number of its site's first seed."""
    form: Form

    @property
    def slots(self) -> slice:
        """Its slots among all."""
        return slice(self.start, self.start + self.num_slots)


def plan_bank(
    chunking: Chunking,
    bank: BankSlots,
    leaves: tuple[str, ...],
    slots: np.ndarray,
    chunks: np.ndarray,
    gains: np.ndarray,
) -> BankPlan:
    """The plan of a bank's live adapters, on the CPU.

    Args:
      chunking: of the site.
      bank: its slots.
      leaves: the names of its parameters.
      slots: int[n], local to the bank.
      chunks: int[n].
      gains: float32[n, 4], the columns of `Gains`.
    """
    order = np.argsort(chunks, kind="stable")
    slots, chunks = slots[order].astype(np.int64), chunks[order].astype(np.int64)
    columns = None
    if not chunking.is_even:
        columns = torch.from_numpy(chunking.columns[chunks].reshape(-1).astype(np.int64))
    own = Gains.from_columns(gains)
    is_damped = bool(np.any(own.output_damping != 0))
    return BankPlan(
        name=bank.name,
        form=bank.form,
        leaves=leaves,
        rows=torch.from_numpy(slots),
        chunk=torch.from_numpy(chunks),
        slots=tuple(slots.tolist()),
        is_leading=bool(np.array_equal(slots, np.arange(len(slots)))),
        mask=torch.from_numpy(chunking.mask[chunks]),
        columns=columns,
        is_all=chunking.is_even and len(chunks) == chunking.chunks,
        acts=bool(np.any(own.output_scale != 0)),
        is_felt=bool(np.any(own.input_grad_scale != 0)),
        is_full=not is_damped
        and bool(np.all(gains[:, :3] != 0) and np.all(own.param_grad_scale == 1)),
        is_damped=is_damped,
    )


def bank_slots(layout: Layout) -> dict[str, tuple[BankSlots, ...]]:
    """The banks of each site.

    Raises:
      BridgeError: a blueprint has no torch form.
    """
    starts = np.cumsum([0, *(site.num_seeds for site in layout.sites)]).tolist()
    slots: dict[str, tuple[BankSlots, ...]] = {site.name: () for site in layout.sites}
    for bank in layout.tables.banks:
        name, site = layout.names[bank.blueprint], layout.sites[bank.site]
        form = form_of(layout.blueprints[bank.blueprint], site.spec)
        slots[site.name] += (BankSlots(name, bank.start, bank.num_slots, starts[bank.site], form),)
    return slots


@dataclass(frozen=True, eq=False)
class SitePlan:
    """What a site computes until the next `bridge.step`."""

    chunking: Chunking
    topology: Topology
    banks: tuple[BankPlan, ...]
    """The banks in which an adapter lives."""
    gains: Tensor
    """float32[C, 4]: the columns of `Gains`."""
    row: Tensor
    """int32[C]: the row of the chunk's adapter in the one live bank, -1 for none."""
    is_watching: bool
    """Whether dormant chunks are measured too."""

    @classmethod
    def dormant(cls, chunking: Chunking, topology: Topology) -> SitePlan:
        """A site at which nothing lives and nothing is measured."""
        return cls(
            chunking=chunking,
            topology=topology,
            banks=(),
            gains=torch.zeros((chunking.chunks, NUM_GAINS)),
            row=torch.full((chunking.chunks,), -1, dtype=torch.int32),
            is_watching=False,
        )

    @property
    def measures(self) -> bool:
        """Whether a backward pass measures anything."""
        return bool(self.banks) or self.is_watching

    @cached_property
    def output_scale(self) -> Tensor:
        """[C, 1, 1] of `gains`."""
        return Gains.from_columns(self.gains).output_scale[:, None, None]

    @cached_property
    def input_grad_scale(self) -> Tensor:
        """[C, 1, 1] of `gains`."""
        return Gains.from_columns(self.gains).input_grad_scale[:, None, None]

    def to(self, device: torch.device) -> SitePlan:
        """The same on another device."""
        return replace(
            self,
            banks=tuple(bank.to(device) for bank in self.banks),
            gains=self.gains.to(device),
            row=self.row.to(device),
        )
