"""Whether backward passes reach the targets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from torch_bridge._site import Seeds

_MIN_STEPS = 32
_MIN_WATCHED_STEPS = 4


class Reach:
    """Notes which sites were measured; says once which ones never were.

    A step need not reach every site: experts are chosen, layers dropped, heads take turns. A site
    that no step reaches is most likely a layer that its parent reads instead of calling it.
    """

    def __init__(self, sites: Sequence[Seeds], watch_every: int) -> None:
        self._names = [site.site for site in sites]
        self._starts = np.cumsum([0, *(site.plan.chunking.chunks for site in sites)])[:-1]
        self._is_reached = np.zeros(len(sites), bool)
        self._num_steps = 0
        self._enough_steps = max(_MIN_STEPS, _MIN_WATCHED_STEPS * watch_every)
        self._is_over = not watch_every

    def note(self, statistics: np.ndarray) -> None:
        """Takes one step's statistics, `[S, K]`."""
        if self._is_over:
            return
        self._is_reached |= np.logical_or.reduceat(statistics[:, 0] > 0, self._starts)
        self._num_steps += 1
        self._is_over = bool(self._is_reached.all())
        if self._is_over or self._num_steps < self._enough_steps:
            return
        self._is_over = True
        never = [self._names[site] for site in np.flatnonzero(~self._is_reached)]
        more = f" and {len(never) - _MOST_NAMES} more" if never[_MOST_NAMES:] else ""
        warnings.warn(
            f"{len(never)} of {len(self._names)} targets were reached by no backward pass in "
            f"{self._num_steps} steps, so nothing can grow there: "
            f"{', '.join(never[:_MOST_NAMES])}{more}. Their modules are never called (their "
            "parents may read the weights instead), or the loss does not depend on them; leave "
            "them out by exclude= if they stay unused",
            stacklevel=4,
        )


_MOST_NAMES = 12
