"""What the optimiser's step did to the adapters: how far they moved, and which ones broke.

All learning adapters are measured together, in a few operations whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Rows:
    """Parameters whose rows are equally long: adapters stacked in a parameter, or one adapter
    each.
    """

    params: list[nn.Parameter]
    numel: int
    entry: Tensor
    """int64[rows]: whose adapter each row belongs to."""
    _views: list[Tensor] = field(default_factory=list)

    def gather(self) -> Tensor:
        """[rows, numel], a copy."""
        places = [p.data_ptr() for p in self.params]
        if places != [view.data_ptr() for view in self._views]:  # none yet, or the model has moved
            self._views = [p.detach().reshape(-1, self.numel) for p in self.params]
        return torch.cat(self._views)

    def targets(self) -> list[Tensor]:
        """Where each row is written."""
        whole = [p.unbind() if p.numel() != self.numel else (p,) for p in self.params]
        return [part for parts in whole for part in parts]


class Learning:
    """The adapters that learn until the next `bridge.step`: one entry each.

    Args:
      banks: of each bank in which an adapter learns, its parameters, the flat slots they hold, and
        whether each parameter holds all these slots or the parameters come slot by slot.
    """

    def __init__(self, banks: Sequence[tuple[list[nn.Parameter], np.ndarray, bool]]) -> None:
        self.slots = np.concatenate([slots for _, slots, _ in banks] or [np.zeros(0, np.int64)])
        """int64[n]: the flat slot of each entry."""
        alike: dict[
            tuple[torch.device, torch.dtype, int], list[tuple[nn.Parameter, list[int]]]
        ] = {}
        first = 0
        for params, slots, is_stacked in banks:
            entries = list(range(first, first + len(slots)))
            first += len(slots)
            per_slot = len(params) if is_stacked else len(params) // len(slots)
            for k, p in enumerate(params):
                own = entries if is_stacked else [entries[k // per_slot]]
                alike.setdefault((p.device, p.dtype, p.numel() // len(own)), []).append((p, own))
        self.groups = [
            Rows(
                params=[p for p, _ in members],
                numel=numel,
                entry=torch.tensor([e for _, own in members for e in own]).to(device),
            )
            for (device, _, numel), members in alike.items()
        ]

    def snapshot(self) -> list[Tensor]:
        """The adapters' numbers now."""
        return [rows.gather() for rows in self.groups]

    def drift(self, before: Sequence[Tensor], device: torch.device) -> Tensor:
        """float32[n]: `|new - old| / |old|` of each adapter: 0 if that was 0, not finite if
        broken.
        """
        shape = (len(self.slots),)
        moved, size = (torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(2))
        for rows, old in zip(self.groups, before, strict=True):
            wide = old.float()
            change = (rows.gather().float() - wide).square().sum(1)
            entry = rows.entry.to(device)
            moved.index_add_(0, entry, change.to(device))
            size.index_add_(0, entry, wide.square().sum(1).to(device))
        return moved.sqrt() / size.sqrt().masked_fill(size == 0, torch.inf)

    def put_back(self, entry: int, before: Sequence[Tensor]) -> None:
        """Gives one adapter the numbers it had."""
        with torch.no_grad():
            for rows, old in zip(self.groups, before, strict=True):
                targets = rows.targets()
                for row in (rows.entry == entry).nonzero().flatten().tolist():
                    targets[row].copy_(old[row].reshape(targets[row].shape))
