"""The module that sits in a target: its adapters' parameters, and its place in a state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esper_kernels import NUM_STATISTICS
from torch_bridge import _record
from torch_bridge._errors import BridgeError
from torch_bridge._plan import BankPlan, BankSlots, SitePlan
from torch_bridge._shared import NO_PICKLE, Shared
from torch_bridge._state import SiteState


class Adapter(nn.Module):  # type: ignore[misc] # torch is untyped here
    """The parameters of one slot, or of all slots of a bank, `[P, ...]`, where they are stacked."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            self.register_parameter(name, nn.Parameter(leaf.clone()))


class Seeds(nn.Module):  # type: ignore[misc]
    """The seeds of one target; a child of it, named `seeds`. Made by `grow`.

    Args:
      name: the site's.
      axis: of the features of its activation.
      plan: what it computes in the first step.
      banks: by blueprint and leaf, the parameters of all slots, `[P, ...]`.
      shared: what all sites of the model share.
      bank_slots: its banks in the layout.
      is_stacked: whether a bank's adapters are rows of one parameter.
    """

    def __init__(
        self,
        name: str,
        axis: int,
        plan: SitePlan,
        banks: Mapping[str, Mapping[str, Tensor]],
        shared: Shared,
        bank_slots: tuple[BankSlots, ...],
        *,
        is_stacked: bool,
    ) -> None:
        super().__init__()
        self.site = name
        self.axis = axis
        self.is_stacked = is_stacked
        self.shared = shared
        self.bank_slots = bank_slots
        shared.add(self)
        for bank in bank_slots:
            leaves, slots = banks[bank.name], range(bank.num_slots)
            apart = [Adapter({leaf: rows[slot] for leaf, rows in leaves.items()}) for slot in slots]
            self.add_module(bank.name, Adapter(leaves) if is_stacked else nn.ModuleList(apart))
        self.leaf_names = tuple((bank, leaf) for bank, leaves in banks.items() for leaf in leaves)
        """Blueprint and leaf of `all_rows`."""
        kernels = [bank.form.kernel for bank in bank_slots]
        self.kernel = kernels[0] if len(kernels) == 1 else None
        """What `esper_kernels` calls the only blueprint, if there is one and it knows it."""
        self.slot = plan.row
        """int32[C]: the slot of the chunk's adapter in the only bank, -1 for none."""
        self.gains = plan.gains
        """float32[C, 4]. Beside the plan, as compiled programs read the two."""
        self.tap = torch.zeros((plan.chunking.chunks, NUM_STATISTICS), requires_grad=True)
        """Requires a gradient where nothing else does; where inductor launches the kernels, its
        gradient is what they measured."""
        self.set_state(SiteState(plan, axis, self.leaf_names))
        self.packed_age: int | None = None
        """Where this site has the record of the lifecycle: the age of what is in it."""

    def set_state(self, state: SiteState) -> None:
        """Makes passes of this site read and write a state."""
        self.state = state
        self.number = state.number

    @property
    def plan(self) -> SitePlan:
        """Who lives here in this step."""
        return self.state.plan

    @plan.setter
    def plan(self, plan: SitePlan) -> None:
        self.state.plan = plan

    @property
    def first_seed(self) -> int:
        """The number of its first seed among all."""
        return self.bank_slots[0].first_seed

    def take_statistics(self) -> Tensor | None:
        """float32[C, 10]: what was measured since the last call, if anything was."""
        gradient, self.tap.grad = self.tap.grad, None
        if gradient is not None and self.plan.measures:
            self.state.add(gradient)
        return self.state.take()

    def add_record(self) -> None:
        """Makes this the site whose buffer holds the lifecycle."""
        lifecycle = self.shared.lifecycle
        record = _record.seal(lifecycle.pack(), lifecycle.age).to(self.tap.device)
        self.register_buffer("lifecycle", record, persistent=False)
        self.packed_age = lifecycle.age
        _record.own(self)

    def update_record(self) -> None:
        """Brings the record up to date, if this site has it."""
        record = self.record
        if record is None or record.is_meta or self.packed_age == self.shared.lifecycle.age:
            return
        lifecycle = self.shared.lifecycle
        now = _record.seal(lifecycle.pack(), lifecycle.age)
        if len(now) == len(record):
            _record.write_(record, now)
        else:  # the model has got more room
            self.__dict__["_buffers"]["lifecycle"] = now.to(record.device)
        self.packed_age = lifecycle.age

    @property
    def record(self) -> Tensor | None:
        """The buffer as it is, which may be older than the lifecycle."""
        record: Tensor | None = self.__dict__["_buffers"].get("lifecycle")
        return record

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        """Torch's registry: packed when it is read, as packing in every step would take time."""
        self.update_record()
        buffers: dict[str, Tensor | None] = self.__dict__["_buffers"]
        return buffers

    @_buffers.setter
    def _buffers(self, buffers: dict[str, Tensor | None]) -> None:
        self.__dict__["_buffers"] = buffers

    def receive(self) -> None:
        """Moves the model to what has been written into its record."""
        self.shared.is_average = not self.shared.lifecycle.is_driven
        self.restore(self.record)

    def restore(self, record: Any) -> None:
        """Takes a lifecycle over."""
        lifecycle = self.shared.lifecycle
        packed, age = _record.unseal(record)
        lifecycle.unpack(packed)
        # What a bridge drives is newer than all averages of it, whatever was loaded.
        lifecycle.age = max(lifecycle.age, age) if lifecycle.is_driven else age
        self.packed_age = None

    def parameters_of(self, bank: str, slots: tuple[int, ...] | None = None) -> list[nn.Parameter]:
        """The parameters of some slots, slot by slot; the stacked ones of a bank if they are."""
        module = self.get_submodule(bank)
        if self.is_stacked:
            return list(module.parameters())
        chosen = range(len(module)) if slots is None else slots
        return [p for slot in chosen for p in module[slot].parameters()]

    def names_of(self, bank: str) -> tuple[str, ...]:
        """The parameters' names in a bank."""
        return tuple(leaf for own, leaf in self.leaf_names if own == bank)

    def leaf(self, bank: str, name: str, slot: int) -> Tensor:
        """One parameter of one slot; a row of it where they are stacked."""
        module: Any = self._modules[bank]
        leaf: Tensor = (
            getattr(module, name)[slot] if self.is_stacked else getattr(module[slot], name)
        )
        return leaf

    def rows_of(self, bank: BankPlan) -> list[Tensor]:
        """Each of a bank's leaves for its live slots, `[n, ...]`; differentiable."""
        module: Any = self._modules[bank.name]
        if self.is_stacked:
            return [bank.select(getattr(module, name)) for name in bank.leaves]
        adapters = [module[slot] for slot in bank.slots]
        return [
            torch.stack([getattr(adapter, name) for adapter in adapters]) for name in bank.leaves
        ]

    def write_(self, bank: str, slot: int, leaves: Mapping[str, Tensor]) -> None:
        """Puts new numbers into one slot."""
        for name in self.names_of(bank):
            self.leaf(bank, name, slot).data.copy_(leaves[name])

    def make_room(self, bank_slots: tuple[BankSlots, ...]) -> None:
        """Gives the banks the slots that a larger layout has for them."""
        self.bank_slots = bank_slots
        for bank in bank_slots:
            self._add_slots(bank.name, bank.num_slots)
        self.plan = replace(self.plan)  # what was looked up for the old one is over
        self.packed_age = None

    def _add_slots(self, bank: str, num_slots: int) -> None:
        module: Any = self.get_submodule(bank)
        if self.is_stacked:
            for name, p in list(module.named_parameters()):
                more = p.new_zeros((num_slots - len(p), *p.shape[1:]))
                wide = torch.cat([p.detach(), more])
                setattr(module, name, nn.Parameter(wide, requires_grad=p.requires_grad))
            return
        first = dict(module[0].named_parameters())
        for _ in range(num_slots - len(module)):
            adapter = Adapter({name: torch.zeros_like(p.detach()) for name, p in first.items()})
            for name, p in adapter.named_parameters():
                p.requires_grad_(first[name].requires_grad)
            module.append(adapter)

    def all_rows(self) -> list[Tensor]:
        """Every leaf of every bank, `[P, ...]`, in the order of `leaf_names`."""
        rows: list[Tensor] = []
        for bank, name in self.leaf_names:
            module: Any = self.get_submodule(bank)
            if self.is_stacked:
                rows.append(getattr(module, name))
            else:
                rows.append(torch.stack([getattr(adapter, name) for adapter in module]))
        return rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Seeds:
        super()._apply(fn, recurse)
        self.packed_age = None
        device = fn(torch.empty(0, dtype=torch.int64, device=self.tap.device)).device
        if device != self.tap.device:
            self.tap = torch.zeros_like(self.tap, device=device, requires_grad=True)
            self.state.take()
            self.plan = self.plan.to(device)
            self.slot, self.gains = self.slot.to(device), self.plan.gains
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Seeds:
        twin: Seeds = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        self.update_record()
        for name, value in self.__dict__.items():
            is_own = name in {"tap", "state", "number"}
            twin.__dict__[name] = None if is_own else copy.deepcopy(value, memo)
        twin.tap = torch.zeros_like(self.tap, requires_grad=True)
        plan = replace(copy.deepcopy(self.plan, memo), is_watching=False)
        twin.set_state(SiteState(plan, self.axis, self.leaf_names))
        twin.shared.add(twin)
        if twin.record is not None:
            _record.own(twin)
        return twin

    def __reduce__(self) -> Any:
        raise BridgeError(NO_PICKLE)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        record = self._buffers.get("lifecycle")
        if record is not None:
            destination[prefix + "lifecycle"] = record.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "lifecycle"
        if self.record is not None and key in state_dict:
            self.restore(state_dict[key])
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        elif self.record is not None:
            rest[2].append(key)  # missing_keys
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        live = sum(len(bank.slots) for bank in self.plan.banks)
        return f"{self.site!r}, chunks={self.plan.chunking.chunks}, live={live}"


def first_tensor(
    owner: Any, module: nn.Module, output: Any
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that grows, and how an output is made with another in its position.

    Args:
      owner: the child of the target that grows its output. It is asked for the name of its site in
        an error alone: a compiler would hold whatever is read to its value, and each block would
        need a program of its own.
      module: the target.
      output: what the target returned.

    Raises:
      BridgeError: it is neither a tensor nor a tuple that begins with one.
    """
    if isinstance(output, Tensor):
        return output, _itself
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        rest = output[1:]
        if hasattr(output, "_fields"):
            return output[0], lambda y: type(output)(y, *rest)
        return output[0], lambda y: type(output)((y, *rest))
    raise BridgeError(
        f"target {owner.site!r} ({type(module).__name__}) returns {type(output).__name__}; seeds "
        "need a tensor, or a tuple that begins with one: choose a layer inside it"
    )


def _itself(y: Tensor) -> Tensor:
    return y
