"""What every backend takes and returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from esper_kernels.rule_torch import Leaves
from torch_bridge._plan import SitePlan

Adapters: TypeAlias = Mapping[str, Leaves]
"""The parameters of the n live adapters of each blueprint, `[n, ...]`."""


class Residual(NamedTuple):
    """What a forward pass leaves for the backward pass, beside `x` and the adapters."""

    statistics: Tensor
    """float32[C, 5]: the columns of `esper_kernels.ForwardStatistics`."""
    output_square: Tensor | None = None
    """float32[C]: sums of squares of the adapters' outputs, if the forward pass measured them."""
    intermediate: Tensor | None = None
    """What spares the backward pass a product; computed again where it is missing."""


class SiteGradients(NamedTuple):
    """What a backward pass returns."""

    d_x: Tensor
    d_adapters: Adapters
    statistics: Tensor
    """float32[C, 10]: the columns of `esper_kernels.Statistics`."""


class SiteBackend(Protocol):
    """Computes sites whose activations have their features in the last axis."""

    name: str

    def serves(self, plan: SitePlan, adapters: Adapters, x: Tensor) -> bool:
        """Whether it can compute a site in which an adapter lives.

        Args:
          plan: who lives at the site, with which gains.
          adapters: the live ones.
          x: [..., D], the activation.
        """

    def forward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, *, measures: bool
    ) -> tuple[Tensor, Residual | None]:
        """The grown activation.

        Args:
          plan: who lives at the site.
          adapters: the live ones.
          x: [..., D].
          measures: whether a backward pass may follow.

        Returns:
          `y` like `x`, in memory of its own, and what a backward pass needs; None if none follows.
        """

    def backward(
        self, plan: SitePlan, adapters: Adapters, x: Tensor, dy: Tensor, residual: Residual
    ) -> SiteGradients:
        """The gradients, and what both passes measured.

        Args:
          plan: as in the forward pass.
          adapters: as there.
          x: as there.
          dy: [..., D], the gradient of `y`.
          residual: what the forward pass of this backend returned. Fields that may be None may be
            missing though they were there.
        """


@contextmanager
def plain_numbers(x: Tensor) -> Iterator[None]:
    """Without a graph, and without autocast: an adapter computes in the dtype of its input."""
    device = x.device.type
    with torch.no_grad():
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield
