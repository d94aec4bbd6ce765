"""What the passes of a site read and write, wherever they run."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_bridge._plan import SitePlan

# A compiled program may hold tensors but no Python objects, and one program serves all sites that
# are alike. So its operations find a site by a number that they are passed as a tensor. The number
# belongs to one `SiteState` and ends with it; copies of a model have states, and numbers, of their
# own.
_STATES: weakref.WeakValueDictionary[int, SiteState] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class SiteState:
    """The plan of one site for this step, and what its backward passes measured.

    Args:
      plan: who lives at the site.
      axis: of the features of its activation.
      leaves: blueprint and name of each parameter, in the order in which compiled programs pass
        them.
    """

    def __init__(self, plan: SitePlan, axis: int, leaves: Sequence[tuple[str, str]]) -> None:
        self.plan, self.axis, self.leaves = plan, axis, tuple(leaves)
        self.statistics: Tensor | None = None
        """float32[C, 10] since the last `take`."""
        number = next(_NUMBERS)
        _STATES[number] = self
        self.number = torch.tensor(number)
        """The number by which compiled programs find this state."""

    def add(self, statistics: Tensor) -> None:
        """Adds up what backward passes measure, in memory that no program writes to."""
        known = self.statistics
        self.statistics = statistics if known is None else known + statistics

    def take(self) -> Tensor | None:
        """What was measured since the last call, if anything was."""
        statistics, self.statistics = self.statistics, None
        return statistics


def state_of(number: Tensor) -> SiteState:
    """The state that a compiled program means."""
    return _STATES[int(number)]
