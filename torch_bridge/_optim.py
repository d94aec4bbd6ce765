"""What the bridge does around the steps of any torch optimiser, which it notices by itself.

Before a step, parameters of adapters that do not learn lose their gradient: torch's optimisers skip
such parameters wholly, weight decay and moments included. Where the adapters of a bank are stacked
in one parameter, rows that do not learn are put back after the step, moments included. A newborn's
state is removed, so that it starts afresh.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
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
    """A bank whose adapters are stacked, some of which learn and some rest."""

    params: list[nn.Parameter]
    learns: Tensor
    """bool[P]."""


class _Holds(NamedTuple):
    """What an optimiser holds, by the parameters' identities."""

    form: list[tuple[int, int]]
    """Identity and length of each group's list, as long as which all stays."""
    adapters: set[int]
    host: set[int]
    """Everything else."""
    last_step: int
    """The call of `bridge.step` that followed its last step."""


_PATIENCE_STEPS = 64
"""Calls of `bridge.step` for which an optimiser may rest while others step."""


class Watcher:
    """Notices the optimisers of one model and keeps resting adapters out of their steps."""

    def __init__(self, host: Iterable[nn.Parameter], adapters: Iterable[nn.Parameter]) -> None:
        self._host = {id(p) for p in host}
        self.set_adapters(adapters)
        self._holds: weakref.WeakKeyDictionary[Any, _Holds] = weakref.WeakKeyDictionary()
        self._num_steps = 0
        self.resting: list[nn.Parameter] = []
        """Parameters none of whose adapters learn."""
        self.learning = Learning(())
        self.partial: list[Partial] = []
        self.before: list[Tensor] | None = None
        """The learning adapters before the first step since the last `bridge.step`."""
        self._saved: dict[int, Tensor] = {}
        """The numbers before a step of stacked adapters and of their state, by identity."""
        self.scaler: Any = None
        self.scale = 1.0
        me = weakref.ref(self)
        self._handles = [
            register_optimizer_step_pre_hook(partial(_pre, me)),
            register_optimizer_step_post_hook(partial(_post, me)),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def set_adapters(self, adapters: Iterable[nn.Parameter]) -> None:
        """Says which parameters are adapters'."""
        self.adapters = list(adapters)
        self._adapters = {id(p) for p in self.adapters}

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def check(self, optimizer: Any) -> set[int]:
        """Notes which parameters an optimiser holds now; returns the adapters' among them."""
        lists = [group["params"] for group in optimizer.param_groups]
        form = [(id(params), len(params)) for params in lists]
        known = self._holds.get(optimizer)
        if known is None or known.form != form:
            every = {id(p) for params in lists for p in params}
            adapters = every & self._adapters
            if not adapters and not every & self._host:
                return adapters
            known = _Holds(form, adapters, every - adapters, 0)
        self._holds[optimizer] = known._replace(last_step=self._num_steps)
        return known.adapters

    def check_complete(self) -> None:
        """Holds the optimisers that step to having all adapters.

        One whose other parameters are stepped by another one now has been replaced, and one that
        has not stepped for long rests.

        Raises:
          BridgeError: adapters are in none of them, as with one made before `grow`, or made later
            of the model's own parameters.
        """
        every = list(self._holds.items())
        if not self._adapters or not every:
            return
        now = [
            (optimizer, holds) for optimizer, holds in every if holds.last_step == self._num_steps
        ]
        stepped = set().union(*(holds.host for _, holds in now))
        missing = set(self._adapters)
        for _, holds in every:
            is_replaced = holds.last_step < self._num_steps and holds.host & stepped
            is_resting = bool(now) and holds.last_step < self._num_steps - _PATIENCE_STEPS
            if not is_replaced and not is_resting:
                missing -= holds.adapters
        if not missing:
            return
        kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer, _ in now or every}))
        raise BridgeError(
            f"{len(missing)} of {len(self._adapters)} parameters of adapters are in no optimiser "
            f"that steps ({kinds}): it was made before grow(), or from a part of the model. Make "
            "it afterwards from model.parameters(), or add them: "
            "optimizer.add_param_group({'params': bridge.adapter_parameters()}). Where several "
            "optimisers share the adapters, attach them together: bridge.attach([first, second])"
        )

    def check_gradients(self, *, with_resting: bool) -> None:
        """Holds the adapters that learn, or all of them, to requiring a gradient.

        Raises:
          BridgeError: some do not, as after freezing the whole model.
        """
        learning = [p for rows in self.learning.groups for p in rows.params]
        frozen = [p for p in (self.adapters if with_resting else learning) if not p.requires_grad]
        if frozen:
            raise BridgeError(
                f"{len(frozen)} parameters of adapters have requires_grad=False and would never "
                "learn: the model was frozen after grow(), by hand or by PEFT. Say "
                "grow(freeze_host=True) in place of freezing it, or give them back: for p in "
                "bridge.adapter_parameters(): p.requires_grad_(True), and pass them to an optimiser"
            )

    def end_step(self) -> None:
        """A call of `bridge.step` ends."""
        self._num_steps += 1

    def before_step(self, optimizer: Any) -> None:
        """Takes resting adapters out of the step and remembers the others."""
        if not self.check(optimizer):
            return
        self.scale = self.scale_now()
        self.rest()
        if self.before is None and self.learning.groups:
            self.before = self.learning.snapshot()
        for bank in self.partial:
            for tensor in _with_state(optimizer, bank):
                self._saved[id(tensor)] = tensor.detach().clone()

    def scale_now(self) -> float:
        """The factor by which the next loss is multiplied."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def rest(self) -> None:
        """Takes the gradients of resting adapters away."""
        for p in self.resting:
            p.grad = None

    def after_step(self, optimizer: Any) -> None:
        """Puts resting rows of stacked adapters back."""
        saved, self._saved = self._saved, {}
        with torch.no_grad():
            for bank in self.partial if saved else ():
                for tensor in _with_state(optimizer, bank):
                    # What is not known was made in this very step.
                    old = saved.get(id(tensor), tensor.new_zeros(()))
                    learns = bank.learns.reshape(-1, *(1,) * (tensor.ndim - 1))
                    tensor.copy_(torch.where(learns, tensor, old))

    def forget(self, params: list[nn.Parameter], slot: int | None) -> None:
        """Removes what optimisers remember of a newborn: all of it, or one row where stacked."""
        for optimizer in self._holds:
            for p in params:
                if slot is None:
                    optimizer.state.pop(p, None)
                    p.grad = None
                    continue
                for row in _rows_of(optimizer, p):
                    row[slot] = 0


def _rows_of(optimizer: Any, p: nn.Parameter) -> list[Tensor]:
    """What an optimiser remembers of each number of a parameter."""
    remembered = optimizer.state.get(p, {}).values()
    return [value for value in remembered if isinstance(value, Tensor) and value.shape == p.shape]


def _with_state(optimizer: Any, bank: Partial) -> list[Tensor]:
    """The parameters of a bank, and what an optimiser remembers of them."""
    return [*bank.params, *(row for p in bank.params for row in _rows_of(optimizer, p))]


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


def _post(me: Any, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    watcher = me()
    if watcher is not None:
        watcher.after_step(optimizer)
