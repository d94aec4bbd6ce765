"""What the optimiser's step did to the bodies: how far they moved, and which ones broke."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_bridge._optim import Kept


@dataclass(frozen=True)
class Settled:
    """One entry a bank whose bodies learn."""

    kept: list[Kept]
    drift: list[Tensor]
    """Of each, float32[n]: `|new - old| / |old|`, not finite where the body broke."""

    def finish(
        self,
        told: np.ndarray,
        slots: Sequence[np.ndarray],
        drift: np.ndarray,
        has_broken: np.ndarray,
    ) -> None:
        """Fills in `drift` and `has_broken`, `[Q]`, and puts broken bodies back.

        Args:
          told: `self.drift`, on the host.
          slots: the flat slots of each entry.
          drift: to be filled in.
          has_broken: to be filled in.
        """
        first = 0
        for kept, here in zip(self.kept, slots, strict=True):
            moved = told[first : first + len(here)]
            first += len(here)
            is_broken = ~np.isfinite(moved)
            drift[here] = np.where(is_broken, 0.0, moved)
            has_broken[here] |= is_broken
            for index in np.flatnonzero(is_broken).tolist():
                kept.put_back(index)


def settle(kept: Sequence[Kept]) -> Settled:
    """Measures on the device, without waiting for it."""
    return Settled(kept=list(kept), drift=[_drift(of) for of in kept])


def _drift(kept: Kept) -> Tensor:
    size, moved = (
        kept.squares(kept.before),
        kept.squares(
            [
                p.detach().float() - old.float()
                for p, old in zip(kept.params, kept.before, strict=True)
            ]
        ),
    )
    drift = moved.sqrt() / (size.sqrt() + 1e-12)
    return drift if kept.learns is None else torch.where(kept.learns, drift, 0.0)
