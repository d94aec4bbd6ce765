"""What a step measured, from the devices to the lifecycle in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import esper_fn as ef
from esper_kernels import NUM_STATISTICS
from torch_bridge._chunks import Sums, summed, told_of
from torch_bridge._distributed import Group
from torch_bridge._optim import Watcher
from torch_bridge._settle import Learning
from torch_bridge._site import Seeds

_GRADIENT_SQUARE = ef.Statistics._fields.index("gradient_square")
_UTILITY = ef.Statistics._fields.index("utility")


class Transfer:
    """Numbers on their way from a device to the host."""

    def __init__(self, told: Tensor, *, is_waiting: bool) -> None:
        self._event: Any = None
        if is_waiting or told.device.type != "cuda":
            self._host = told.cpu()
            return
        self._host = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
        self._host.copy_(told, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(told.device))

    def finish(self) -> np.ndarray:
        """The numbers, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy().copy()


class Measured(NamedTuple):
    """One step, for the lifecycle."""

    told: Transfer
    """Statistics, the loss, the drifts."""
    learning: Learning
    before: list[Tensor] | None
    """The learning adapters before the optimiser's step, if there was one."""
    scale: float


class Read(NamedTuple):
    """The same on the host, as `Lifecycle.advance` takes it."""

    statistics: np.ndarray
    """float32[S, K]."""
    loss: float
    drift: np.ndarray
    """float32[Q]."""
    has_broken: np.ndarray
    """bool[Q]."""


def measure(
    sites: Sequence[Seeds],
    optimizers: Watcher,
    group: Group,
    loss: Tensor | float,
    *,
    is_waiting: bool,
) -> Measured:
    """Takes what was measured, and sends them off with the loss and the adapters' drifts."""
    with torch.no_grad():
        place = sites[0].tap.device
        told = group.sum(_statistics_and_loss(sites, loss, place))
        if optimizers.before is not None:
            drift = optimizers.learning.drift(optimizers.before, place)
            told = torch.cat([told, drift])
    before, optimizers.before = optimizers.before, None
    return Measured(
        told=Transfer(told, is_waiting=is_waiting),
        learning=optimizers.learning,
        before=before,
        scale=optimizers.scale,
    )


def read(of: Measured, group: Group, layout: ef.Layout) -> Read:
    """What arrived; adapters that broke get their old numbers back."""
    told = of.told.finish()
    num_seeds, num_slots = layout.num_seeds, layout.num_slots
    size = num_seeds * NUM_STATISTICS
    statistics, loss = group.of_mean(
        told[:size].reshape(num_seeds, NUM_STATISTICS), float(told[size])
    )
    if of.scale != 1:
        statistics[:, _UTILITY] /= of.scale
        statistics[:, _GRADIENT_SQUARE] /= of.scale**2
    drift, has_broken = np.zeros(num_slots, np.float32), np.zeros(num_slots, bool)
    if of.before is not None:
        moved, slots = told[size + 1 :], of.learning.slots
        is_broken = ~np.isfinite(moved)
        drift[slots], has_broken[slots] = np.where(is_broken, 0.0, moved), is_broken
        for entry in np.flatnonzero(is_broken).tolist():
            of.learning.put_back(entry, of.before)
    return Read(statistics, loss, drift, has_broken)


def _statistics_and_loss(
    sites: Sequence[Seeds], loss: Tensor | float, place: torch.device
) -> Tensor:
    """float32[S K + 1]: zeros where nothing was measured."""
    cuts = [site.plan.cut for site in sites]
    heard = [site.take_heard() for site in sites]
    value = torch.as_tensor(loss, dtype=torch.float32).detach().reshape(1)
    if all(of is None for of in heard):
        told = torch.zeros(
            (sum(cut.chunks for cut in cuts) * NUM_STATISTICS + 1,),
            device=place,
            dtype=torch.float32,
        )
        told[-1:].copy_(value)
        return told
    sums = [(cut, of) for cut, of in zip(cuts, heard, strict=True) if isinstance(of, Sums)]
    parts: list[np.ndarray] = []
    if sums:
        ends = np.cumsum([cut.chunks for cut, _ in sums])
        parts = np.split(told_of([cut for cut, _ in sums], [of for _, of in sums]), ends[:-1])
    rows = iter(parts)
    every = [
        torch.from_numpy(next(rows)) if isinstance(of, Sums) else summed(cut, of, place)
        for cut, of in zip(cuts, heard, strict=True)
    ]
    return torch.cat([*(of.to(place).reshape(-1) for of in every), value.to(place)])
