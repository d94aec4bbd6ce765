"""What the bridge does around the steps of any torch optimiser, which it notices by itself.

Before a step, parameters of bodies that do not learn lose their gradient: torch's optimisers skip
such parameters wholly, weight decay and moments included. Where the bodies of a bank are stacked
in one parameter, rows that do not learn are put back after the step, moments included. A newborn's
state is removed, so that it starts afresh.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_bridge._errors import BridgeError


class Kept:
    """The learning bodies of one bank before a step."""

    def __init__(
        self, params: list[nn.Parameter], num_leaves: int, learns: Tensor | None, is_stacked: bool
    ) -> None:
        self.params = params
        """Body by body; where they are stacked, `[P, ...]` each."""
        self.num_leaves = num_leaves
        self.learns = learns
        """bool[P] where stacked and not all learn."""
        self.is_stacked = is_stacked
        self.before = [p.detach().clone() for p in params]
        self.state: list[tuple[Tensor, Tensor]] = []
        """Rows of an optimiser's state, and what they were."""

    def squares(self, values: list[Tensor]) -> Tensor:
        """float32[n]: the sum of squares of each body, of values that belong to `params`."""
        if self.is_stacked:
            return sum(of.float().square().flatten(1).sum(1) for of in values)  # type: ignore[return-value]
        each = torch.stack([of.float().square().sum() for of in values])
        return each.reshape(-1, self.num_leaves).sum(1)

    def put_back(self, index: int) -> None:
        """Gives one body its old numbers."""
        with torch.no_grad():
            if self.is_stacked:
                for p, old in zip(self.params, self.before, strict=True):
                    p[index] = old[index]
                return
            here = slice(index * self.num_leaves, (index + 1) * self.num_leaves)
            for p, old in zip(self.params[here], self.before[here], strict=True):
                p.copy_(old)


class Learning(NamedTuple):
    """A bank in which a body learns; see `Kept`."""

    params: list[nn.Parameter]
    num_leaves: int
    learns: Tensor | None
    is_stacked: bool


class Watcher:
    """Notices the optimisers of one model and keeps resting bodies out of their steps."""

    def __init__(self, host: Iterable[nn.Parameter], bodies: Iterable[nn.Parameter]) -> None:
        self._host = {id(p) for p in host}
        self.bodies = list(bodies)
        self._bodies = {id(p) for p in self.bodies}
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._held: set[int] = set()
        self._is_complete = not self._bodies
        self.resting: list[nn.Parameter] = []
        """Parameters none of whose bodies learn."""
        self.learning: list[Learning] = []
        self.kept: list[Kept] = []
        self.scaler: Any = None
        self.scale = 1.0
        me = weakref.ref(self)
        self._handles = [
            register_optimizer_step_pre_hook(lambda of, args, kwargs: _pre(me, of)),
            register_optimizer_step_post_hook(lambda of, args, kwargs: _post(me, of)),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def check(self, optimizer: Any) -> None:
        """Notes which bodies an optimiser holds, if it has anything to do with the model."""
        if optimizer in self.seen and self._is_complete:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held & (self._host | self._bodies):
            self.seen.add(optimizer)
            self._held |= held & self._bodies
            self._is_complete = self._held == self._bodies

    def check_complete(self) -> None:
        """Holds the optimisers seen so far to having all bodies.

        Raises:
          BridgeError: bodies are in none of them, as with one made before `grow`.
        """
        if self._is_complete or not self.seen:
            return
        kinds = ", ".join(sorted({type(of).__name__ for of in self.seen}))
        raise BridgeError(
            f"{len(self._bodies - self._held)} of {len(self._bodies)} parameters of bodies are in "
            f"no optimiser ({kinds}): it was made before grow(), or from a part of the model. Make "
            "it afterwards from model.parameters(), or add them: "
            "optimizer.add_param_group({'params': bridge.body_parameters()})"
        )

    def before_step(self, optimizer: Any) -> None:
        """Takes resting bodies out of the step and remembers the others."""
        self.check(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held & self._bodies:
            return
        if self.scaler is not None:
            self.scale = float(self.scaler.get_scale())
        for p in self.resting:
            p.grad = None
        for bank in self.learning:
            if not any(id(p) in held for p in bank.params):
                continue
            kept = Kept(*bank)
            if bank.learns is not None:
                kept.state = [
                    (of, of.detach().clone())
                    for p in bank.params
                    for of in optimizer.state.get(p, {}).values()
                    if isinstance(of, Tensor) and of.shape == p.shape
                ]
            self.kept.append(kept)

    def after_step(self, optimizer: Any) -> None:
        """Puts resting rows of stacked bodies back."""
        with torch.no_grad():
            for kept in self.kept:
                if kept.learns is None:
                    continue
                for p, old in zip(kept.params, kept.before, strict=True):
                    _put_back(p, old, kept.learns)
                known = {id(of) for of, _ in kept.state}
                for of, old in kept.state:
                    _put_back(of, old, kept.learns)
                for p in kept.params:
                    for of in optimizer.state.get(p, {}).values():
                        is_row = isinstance(of, Tensor) and of.shape == p.shape
                        if is_row and id(of) not in known:
                            _put_back(of, torch.zeros_like(of), kept.learns)
                kept.state = []

    def forget(self, params: list[nn.Parameter], slot: int | None) -> None:
        """Removes what optimisers remember of a newborn: all of it, or one row where stacked."""
        for optimizer in self.seen:
            for p in params:
                if slot is None:
                    optimizer.state.pop(p, None)
                    p.grad = None
                    continue
                for of in optimizer.state.get(p, {}).values():
                    if isinstance(of, Tensor) and of.shape == p.shape:
                        of[slot] = 0


def _put_back(of: Tensor, old: Tensor, learns: Tensor) -> None:
    of.copy_(torch.where(learns.reshape(-1, *(1,) * (of.ndim - 1)), of, old))


def _pre(me: Any, optimizer: Optimizer) -> None:
    watcher = me()
    if watcher is not None:
        watcher.before_step(optimizer)


def _post(me: Any, optimizer: Optimizer) -> None:
    watcher = me()
    if watcher is not None:
        watcher.after_step(optimizer)
