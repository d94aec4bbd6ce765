"""What all sites of one model share."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_bridge._errors import BridgeError

if TYPE_CHECKING:
    from torch_bridge._site import Seeds

NO_PICKLE = (
    "a grown model cannot be pickled; save model.state_dict() with safetensors, grow a "
    "fresh model alike and load it there"
)


class Shared:
    """What all sites of one model share: its lifecycle, and what happens in this step.

    Args:
      lifecycle: the state of every seed.
      tell: gives the sites of a copy, which has no bridge, their plans.
    """

    def __init__(self, lifecycle: Any, tell: Callable[[Shared], None]) -> None:
        self.lifecycle = lifecycle
        self.tell = tell
        self.sites: list[weakref.ref[Seeds]] = []
        """Those there are; the copy of a part of a model has a part of them."""
        self.copies: weakref.WeakSet[Shared] = weakref.WeakSet()
        self.is_average = False
        """Whether something goes on writing the lifecycle of another model into this copy's."""
        self.is_busy = True
        """Whether any site lives or watches in this step. Compiled programs depend on it: one is
        the bare model's, the other one serves every step in which there is anything to do."""
        self.called: dict[int, set[str]] = {}
        """The sites called in the forward pass that a thread is in, by the thread's number."""
        self.moments: dict[str, list[Tensor]] | None = None
        """Where a survey gathers second moments; None outside of one."""
        self.anchors: list[Tensor] = []
        self.with_moments = False

    def begin(self, model: nn.Module, args: Any) -> None:
        """The forward pre-hook of the whole model."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            self.called[threading.get_ident()] = set()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of the whole model."""
        if not torch.compiler.is_compiling():
            self.called.pop(threading.get_ident(), None)

    def living_sites(self) -> list[Seeds]:
        """In the order of their seeds."""
        found = [site for of in self.sites if (site := of()) is not None]
        return sorted(found, key=lambda site: site.first_seed)

    def make_room(self, capacity: int) -> None:
        """Gives every bank more slots; all seeds and adapters stay as they are.

        Copies that no bridge drives get the slots too: averages go through both models' parameters
        in pairs.
        """
        layout, age = self.lifecycle.growth.layout, self.lifecycle.age
        if capacity <= layout.capacity:
            return
        larger = self.lifecycle.growth.replace(capacity=capacity)
        before = self.lifecycle.pack()
        self.lifecycle.begin(larger)
        self.lifecycle.restore(before)
        self.lifecycle.age = age
        for site in self.living_sites():
            site.make_room(larger.layout)
        for copied in list(self.copies):
            if not copied.lifecycle.is_driven:
                copied.lifecycle.make_room(capacity)

    def begin_averages(
        self, site: Seeds, bank: str, local: int, slot: int, leaves: Mapping[str, Tensor]
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
        """Of the copy; its sites enter themselves."""
        lifecycle = copy.deepcopy(self.lifecycle, memo)
        twin = memo[id(self)] = self.__class__(lifecycle, self.tell)
        twin.is_busy = self.is_busy
        self.copies.add(twin)
        if not lifecycle.is_driven:  # else its bridge was copied with it
            me = weakref.ref(twin)
            lifecycle.on_load = lambda: (shared := me()) and shared.tell(shared)
            lifecycle.make_room = partial(_make_room_in_copy, me)
        return twin


def _make_room_in_copy(of: weakref.ref[Shared], capacity: int) -> None:
    shared = of()
    if shared is not None:
        shared.make_room(capacity)
        shared.tell(shared)  # no bridge does
