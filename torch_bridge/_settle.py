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
    position: list[tuple[int, nn.Parameter, int | None]]
    """Entry and parameter of each row, and its index in a stacked parameter."""
    _views: list[Tensor] = field(default_factory=list)

    def gather(self) -> Tensor:
        """[rows, numel], a copy."""
        places = [p.data_ptr() for p in self.params]
        if places != [view.data_ptr() for view in self._views]:  # none yet, or the model has moved
            self._views = [p.detach().reshape(-1, self.numel) for p in self.params]
        return torch.cat(self._views)


class Learning:
    """The adapters that learn until the next `bridge.step`: one entry each.

    Args:
      banks: of each bank in which an adapter learns, its parameters, the flat slots they hold, and
        whether each parameter holds all these slots or the parameters come slot by slot.
    """

    def __init__(self, banks: Sequence[tuple[list[nn.Parameter], np.ndarray, bool]]) -> None:
        self.slots = np.concatenate([slots for _, slots, _ in banks] or [np.zeros(0, np.int64)])
        """int64[n]: the flat slot of each entry."""
        alike: dict[tuple[object, ...], list[tuple[nn.Parameter, list[int], bool]]] = {}
        first = 0
        for params, slots, is_stacked in banks:
            entries = list(range(first, first + len(slots)))
            first += len(slots)
            per_slot = len(params) if is_stacked else len(params) // len(slots)
            for k, p in enumerate(params):
                own = entries if is_stacked else [entries[k // per_slot]]
                key = (p.device, p.dtype, p.numel() // len(own))
                alike.setdefault(key, []).append((p, own, is_stacked))
        self.groups = [
            Rows(
                params=[p for p, _, _ in members],
                numel=members[0][0].numel() // len(members[0][1]),
                entry=torch.tensor([e for _, own, _ in members for e in own]).to(
                    members[0][0].device
                ),
                position=[
                    (e, p, row if stacked else None)
                    for p, own, stacked in members
                    for row, e in enumerate(own)
                ],
            )
            for members in alike.values()
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
                for row, (own, p, inner) in enumerate(rows.position):
                    if own == entry:
                        target = p if inner is None else p[inner]
                        target.copy_(old[row].reshape(target.shape))
