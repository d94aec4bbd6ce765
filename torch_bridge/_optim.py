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
from torch_bridge._settle import Learning


class Partial(NamedTuple):
    """A bank whose bodies are stacked, some of which learn and some rest."""

    params: list[nn.Parameter]
    learns: Tensor
    """bool[P]."""


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
        self.learning = Learning(())
        self.partial: list[Partial] = []
        self.before: list[Tensor] | None = None
        """The learning bodies before the first step since the last `bridge.step`."""
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scaler: Any = None
        self.scale = 1.0
        me = weakref.ref(self)
        self._handles = [
            register_optimizer_step_pre_hook(lambda of, args, kwargs: _pre(me, of, args, kwargs)),
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
        self.rest()
        if self.before is None and self.learning.groups:
            self.before = self.learning.snapshot()
        for bank in self.partial:
            of_state = [of for p in bank.params for of in _rows_of(optimizer, p)]
            for of in (*bank.params, *of_state):
                self._saved.append((of, of.detach().clone(), bank.learns))

    def rest(self) -> None:
        """Takes the gradients of resting bodies away."""
        for p in self.resting:
            p.grad = None

    def after_step(self, optimizer: Any) -> None:
        """Puts resting rows of stacked bodies back."""
        with torch.no_grad():
            known = {id(of) for of, _, _ in self._saved}
            for of, old, learns in self._saved:
                _put_back(of, old, learns)
            self._saved.clear()
            for bank in self.partial:
                for p in bank.params:
                    for of in _rows_of(optimizer, p):
                        if id(of) not in known:  # made in this very step
                            _put_back(of, torch.zeros_like(of), bank.learns)

    def forget(self, params: list[nn.Parameter], slot: int | None) -> None:
        """Removes what optimisers remember of a newborn: all of it, or one row where stacked."""
        for optimizer in self.seen:
            for p in params:
                if slot is None:
                    optimizer.state.pop(p, None)
                    p.grad = None
                    continue
                for of in _rows_of(optimizer, p):
                    of[slot] = 0


def _rows_of(optimizer: Any, p: nn.Parameter) -> list[Tensor]:
    """What an optimiser remembers of each number of a parameter."""
    remembered = optimizer.state.get(p, {}).values()
    return [of for of in remembered if isinstance(of, Tensor) and of.shape == p.shape]


def _put_back(of: Tensor, old: Tensor, learns: Tensor) -> None:
    of.copy_(torch.where(learns.reshape(-1, *(1,) * (of.ndim - 1)), of, old))


def _pre(me: Any, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """Before a step, or, where the backward pass is in the step's closure, after that."""
    watcher = me()
    if watcher is None:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        watcher.before_step(optimizer)
        return None
    num_calls = 0

    def with_watcher() -> Any:
        nonlocal num_calls
        loss = closure()
        with torch.no_grad():
            if num_calls:  # some optimisers ask again in the same step
                watcher.rest()
            else:
                watcher.before_step(optimizer)
        num_calls += 1
        return loss

    return args[:1], {**kwargs, "closure": with_watcher}


def _post(me: Any, optimizer: Optimizer) -> None:
    watcher = me()
    if watcher is not None:
        watcher.after_step(optimizer)
