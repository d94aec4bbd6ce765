"""What a step measured, from the devices to the lifecycle in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_fn.types import Layout, Statistics
from esper_kernels import NUM_STATISTICS
from torch_bridge._distributed import Group
from torch_bridge._optim import Watcher
from torch_bridge._settle import Learning
from torch_bridge._site import Seeds

_GRADIENT_SQUARE = Statistics._fields.index("gradient_square")
_UTILITY = Statistics._fields.index("utility")


class Transfer:
    """Numbers on the move from a device to the host."""

    def __init__(self, numbers: Tensor, *, is_waiting: bool) -> None:
        self._event: Any = None
        if is_waiting or numbers.device.type != "cuda":
            self._host = numbers.cpu()
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(numbers.device))

    def finish(self) -> np.ndarray:
        """The numbers, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy().copy()


class Measured(NamedTuple):
    """One step, for the lifecycle."""

    numbers: Transfer
    """Statistics, the loss, the drifts."""
    learning: Learning
    before: list[Tensor] | None
    """The learning adapters before the optimiser's step, if there was one."""
    scale: float
    """The factor by which the loss was multiplied."""


def measure(
    sites: Sequence[Seeds],
    optimizers: Watcher,
    group: Group,
    loss: Tensor | float,
    *,
    is_waiting: bool,
) -> Measured:
    """Takes what was measured, and sends it off with the loss and the adapters' drifts.

    Args:
      sites: all of the model.
      optimizers: what they did.
      group: the ranks whose measurements are added up.
      loss: the training loss.
      is_waiting: whether the host waits for the device.
    """
    with torch.no_grad():
        device = sites[0].tap.device
        numbers = group.sum(_statistics_and_loss(sites, loss, device))
        if optimizers.before is not None:
            drift = optimizers.learning.drift(optimizers.before, device)
            numbers = torch.cat([numbers, drift])
    before, optimizers.before = optimizers.before, None
    return Measured(
        numbers=Transfer(numbers, is_waiting=is_waiting),
        learning=optimizers.learning,
        before=before,
        scale=optimizers.scale,
    )


def read(
    measured: Measured, group: Group, layout: Layout
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """What arrived, for `Lifecycle.advance`; adapters that broke get their old numbers back.

    Args:
      measured: by `measure`.
      group: the ranks whose measurements were added up.
      layout: sites, blueprints and capacity.

    Returns:
      Statistics, float32[S, K], and loss, of the mean over all ranks; drift, float32[Q]; what has
      broken, bool[Q].
    """
    numbers = measured.numbers.finish()
    num_seeds, num_slots = layout.num_seeds, layout.num_slots
    size = num_seeds * NUM_STATISTICS
    statistics, loss = numbers[:size].reshape(num_seeds, NUM_STATISTICS), float(numbers[size])
    factor = measured.scale * group.size
    if factor != 1:
        statistics[:, _UTILITY] /= factor
        statistics[:, _GRADIENT_SQUARE] /= factor**2
    drift, has_broken = np.zeros(num_slots, np.float32), np.zeros(num_slots, bool)
    if measured.before is not None:
        moved, slots = numbers[size + 1 :], measured.learning.slots
        is_broken = ~np.isfinite(moved)
        drift[slots], has_broken[slots] = np.where(is_broken, 0.0, moved), is_broken
        for entry in np.flatnonzero(is_broken).tolist():
            measured.learning.put_back(entry, measured.before)
    return statistics, loss / group.size, drift, has_broken


def _statistics_and_loss(
    sites: Sequence[Seeds], loss: Tensor | float, device: torch.device
) -> Tensor:
    """float32[S K + 1]: zeros where nothing was measured."""
    parts = [site.take_statistics() for site in sites]
    value = torch.as_tensor(loss, dtype=torch.float32).detach().reshape(1)
    num_seeds = sum(site.plan.chunking.chunks for site in sites)
    if all(part is None for part in parts):
        numbers = torch.zeros((num_seeds * NUM_STATISTICS + 1,), device=device, dtype=torch.float32)
        numbers[-1:].copy_(value)
        return numbers
    rows = [
        torch.zeros(site.plan.chunking.chunks * NUM_STATISTICS, device=device, dtype=torch.float32)
        if part is None
        else part.to(device).reshape(-1)
        for site, part in zip(sites, parts, strict=True)
    ]
    return torch.cat([*rows, value.to(device)])
