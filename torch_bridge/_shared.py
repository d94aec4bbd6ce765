"""What all sites of one model share."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_bridge._errors import BridgeError
from torch_bridge._lifecycle import Lifecycle
from torch_bridge._plan import bank_slots

NO_PICKLE = (
    "a grown model cannot be pickled; save model.state_dict() with safetensors, grow a "
    "fresh model alike and load it there"
)


@dataclass
class Survey:
    """A survey that is under way."""

    moments: dict[str, Tensor] = field(default_factory=dict)
    """The second moments gathered so far, by site: rows, `x^T dy`, `x^T x`, `dy^T dy` in a row."""
    probes: list[Tensor] = field(default_factory=list)
    """Zeros whose gradient makes backward passes come to each site."""


class Shared:
    """What all sites of one model share: its lifecycle, and what happens in this step.

    Args:
      lifecycle: the state of every seed.
      refresh: gives the sites of a copy, which has no bridge, their plans.
    """

    def __init__(self, lifecycle: Lifecycle, refresh: Callable[[Shared], None]) -> None:
        self.lifecycle = lifecycle
        self.refresh = refresh
        self.sites: list[weakref.ref[Any]] = []
        """All sites; the copy of a part of a model has a part of them."""
        self.copies: weakref.WeakSet[Shared] = weakref.WeakSet()
        self.is_average = False
        """Whether something goes on writing the lifecycle of another model into this copy's."""
        self.is_busy = True
        """Whether any site lives or watches in this step. Compiled programs depend on it: one is
        the bare model's, the other one serves every step in which there is anything to do."""
        self.called: dict[int, set[str]] = {}
        """The sites called in the forward pass that a thread is in, by the thread's number."""
        self.survey: Survey | None = None

    def begin(self, model: nn.Module, args: Any) -> None:
        """The forward pre-hook of the whole model."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            self.called[threading.get_ident()] = set()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of the whole model."""
        if not torch.compiler.is_compiling():
            self.called.pop(threading.get_ident(), None)

    def add(self, site: Any) -> None:
        """A site, of `torch_bridge._site.Seeds`, joins."""
        self.sites.append(weakref.ref(site))

    def living_sites(self) -> list[Any]:
        """The sites that there are, in the order of their seeds."""
        living = [site for ref in self.sites if (site := ref()) is not None]
        return sorted(living, key=lambda site: site.first_seed)

    def make_room(self, capacity: int) -> None:
        """Gives every bank more slots; all seeds and adapters stay as they are.

        Copies that no bridge drives get the slots too: averages go through both models' parameters
        in pairs.
        """
        growth = self.lifecycle.growth
        if capacity <= growth.layout.capacity:
            return
        larger = growth.replace(capacity=capacity)
        self.lifecycle.enlarge(larger)
        slots = bank_slots(larger.layout)
        for site in self.living_sites():
            site.make_room(slots[site.site])
        for copied in list(self.copies):
            if not copied.lifecycle.is_driven:
                copied.lifecycle.make_room(capacity)

    def begin_averages(
        self, site: Any, bank: str, local: int, slot: int, leaves: Mapping[str, Tensor]
    ) -> None:
        """Lets averages of a newborn begin with it, and not with who had its slot before.

        Only where the average has no adapter in the slot, so that none of its outputs changes.
        """
        capacity = self.lifecycle.growth.layout.capacity
        for copied in self.copies:
            is_alike = copied.lifecycle.growth.layout.capacity == capacity
            if copied.is_average and is_alike and copied.lifecycle.owner()[slot] < 0:
                for own in copied.living_sites():
                    if own.first_seed == site.first_seed:
                        own.write_(bank, local, leaves)

    def __reduce__(self) -> Any:
        raise BridgeError(NO_PICKLE)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Makes what the sites of a copy share; they enter themselves."""
        lifecycle = copy.deepcopy(self.lifecycle, memo)
        twin = memo[id(self)] = self.__class__(lifecycle, self.refresh)
        twin.is_busy = self.is_busy
        self.copies.add(twin)
        if not lifecycle.is_driven:  # else its bridge was copied with it
            lifecycle.on_load = partial(self.refresh, twin)
            lifecycle.make_room = twin._make_room_in_copy
        return twin

    def _make_room_in_copy(self, capacity: int) -> None:
        self.make_room(capacity)
        self.refresh(self)  # no bridge does
