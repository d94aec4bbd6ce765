"""The module that sits in a target: its adapters' parameters, and the hook that grows its
output.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esper_fn import Layout
from esper_kernels import NUM_STATISTICS
from torch_bridge import _kernels, _layer, _nested, _ops, _pure, _record
from torch_bridge._chunks import Sums, summed
from torch_bridge._errors import BridgeError
from torch_bridge._plan import BankPlan, BankSlots, SitePlan
from torch_bridge._shared import NO_PICKLE, Shared

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Adapter(nn.Module):  # type: ignore[misc] # torch is untyped here
    """The parameters of one slot, or of all slots of a bank, `[P, ...]`, where they are stacked."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            self.register_parameter(name, nn.Parameter(leaf))


class Seeds(nn.Module):  # type: ignore[misc]
    """The seeds of one target; a child of it, named `seeds`. Made by `grow`."""

    def __init__(
        self,
        name: str,
        axis: int,
        plan: SitePlan,
        banks: Mapping[str, list[dict[str, Tensor]]],
        shared: Shared,
        slots_of_banks: tuple[BankSlots, ...],
        *,
        is_stacked: bool,
    ) -> None:
        super().__init__()
        self.site = name
        self.axis = axis
        self.is_stacked = is_stacked
        self.plan = plan
        self.shared = shared
        self.slots_of_banks = slots_of_banks
        shared.sites.append(weakref.ref(self))
        self.leaf_names: list[tuple[str, str]] = []
        """Of `_all_rows`: bank and leaf."""
        self.places_of: dict[str, list[tuple[str, int]]] = {}
        """Of each bank the leaves, and where in `leaf_names` they are."""
        for bank, slots in banks.items():
            first = len(self.leaf_names)
            self.leaf_names += [(bank, leaf) for leaf in slots[0]]
            self.places_of[bank] = [(leaf, first + k) for k, leaf in enumerate(slots[0])]
            if is_stacked:
                stacked = {leaf: torch.stack([of[leaf] for of in slots]) for leaf in slots[0]}
                self.add_module(bank, Adapter(stacked))
            else:
                self.add_module(bank, nn.ModuleList(Adapter(of) for of in slots))
        self.activation: str | None = None
        """Of the only bank, if `esper_kernels` knows it by name."""
        self.slot = plan.row
        """int32[C]: the slot of the chunk's adapter in the only bank, -1 for none."""
        self.gains = plan.gains
        """float32[C, 4]. Beside the plan, as compiled programs read the two."""
        self.tap = torch.zeros((plan.cut.chunks, NUM_STATISTICS), requires_grad=True)
        """Requires a gradient where nothing else does; where inductor launches the kernels, its
        gradient is what they measured."""
        self.heard: list[Tensor | Sums] = []
        """None or one: what backward passes measured. A list, as setting a module's attribute takes
        longer."""
        self.handle = _ops.new_handle(self)
        self.packed_age: int | None = None
        """Where this site has the record of the lifecycle: the age of what is in it."""

    @property
    def first_seed(self) -> int:
        """Of its chunks among all seeds."""
        return self.slots_of_banks[0].first_seed

    # --- the record --------------------------------------------------------------------------

    def keep_record(self) -> None:
        """Makes this the site whose buffer holds the lifecycle."""
        lifecycle = self.shared.lifecycle
        record = _record.seal(lifecycle.pack(), lifecycle.age).to(self.tap.device)
        self.register_buffer("lifecycle", record, persistent=False)
        self.packed_age = lifecycle.age
        _record.own(self)

    def pack_record(self) -> None:
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
        found: Tensor | None = self.__dict__["_buffers"].get("lifecycle")
        return found

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        """Torch's registry: packed when it is read, as packing in every step would take time."""
        self.pack_record()
        found: dict[str, Tensor | None] = self.__dict__["_buffers"]
        return found

    @_buffers.setter
    def _buffers(self, buffers: dict[str, Tensor | None]) -> None:
        self.__dict__["_buffers"] = buffers

    def receive(self) -> None:
        """Moves the model to what has been written into its record."""
        self.shared.is_average = not self.shared.lifecycle.is_driven
        self.load(self.record)

    def load(self, record: Any) -> None:
        """Takes a lifecycle over."""
        lifecycle = self.shared.lifecycle
        packed, age = _record.unseal(record)
        lifecycle.unpack(packed)
        # What a bridge drives is newer than all averages of it, whatever was loaded.
        lifecycle.age = max(lifecycle.age, age) if lifecycle.is_driven else age
        self.packed_age = None

    # --- parameters --------------------------------------------------------------------------

    def parameters_of(self, bank: str, slots: tuple[int, ...] | None = None) -> list[nn.Parameter]:
        """The parameters of some slots, slot by slot; the stacked ones of a bank if they are."""
        module = self.get_submodule(bank)
        if self.is_stacked:
            return list(module.parameters())
        chosen = range(len(module)) if slots is None else slots
        return [p for slot in chosen for p in module[slot].parameters()]

    def names_of(self, bank: str) -> tuple[str, ...]:
        """The parameters' names in a bank."""
        return tuple(leaf for of, leaf in self.leaf_names if of == bank)

    def rows_of(self, bank: BankPlan) -> list[Tensor]:
        """Each of a bank's leaves for its live slots, `[n, ...]`; differentiable."""
        module: Any = self._modules[bank.bank]
        if not self.is_stacked:
            adapters = [module[slot] for slot in bank.slots]
            return [
                torch.stack([getattr(adapter, name) for adapter in adapters])
                for name in bank.leaves
            ]
        leaves = [getattr(module, name) for name in bank.leaves]
        return [of if bank.is_whole(of) else of.index_select(0, bank.rows) for of in leaves]

    def write_(self, bank: str, slot: int, leaves: Mapping[str, Tensor]) -> None:
        """Puts new numbers into one slot."""
        module: Any = self.get_submodule(bank)
        for name in self.names_of(bank):
            of = getattr(module, name)[slot] if self.is_stacked else getattr(module[slot], name)
            of.data.copy_(leaves[name])

    def make_room(self, layout: Layout) -> None:
        """Gives the banks the slots that a larger layout has for them."""
        slots = {
            (layout.sites[b.site].name, layout.names[b.blueprint]): b for b in layout.tables.banks
        }
        found = [(of, slots[self.site, of.name]) for of in self.slots_of_banks]
        self.slots_of_banks = tuple(
            of._replace(start=to.start, num_slots=to.num_slots) for of, to in found
        )
        for bank in self.slots_of_banks:
            self._add_slots(bank.name, bank.num_slots)
        self.plan = replace(self.plan, bound={})
        self.packed_age = None

    def _add_slots(self, bank: str, num_slots: int) -> None:
        module: Any = self.get_submodule(bank)
        if self.is_stacked:
            for name, of in list(module.named_parameters()):
                more = of.new_zeros((num_slots - len(of), *of.shape[1:]))
                wide = torch.cat([of.detach(), more])
                setattr(module, name, nn.Parameter(wide, requires_grad=of.requires_grad))
            return
        like = dict(module[0].named_parameters())
        for _ in range(num_slots - len(module)):
            adapter = Adapter({n: torch.zeros_like(of.detach()) for n, of in like.items()})
            for name, of in adapter.named_parameters():
                of.requires_grad_(like[name].requires_grad)
            module.append(adapter)

    def _all_rows(self) -> list[Tensor]:
        """Every leaf of every bank, `[P, ...]`, in the order of `leaf_names`."""
        every: list[Tensor] = []
        for bank in dict.fromkeys(of for of, _ in self.leaf_names):
            module: Any = self.get_submodule(bank)
            for name in self.names_of(bank):
                if self.is_stacked:
                    every.append(getattr(module, name))
                else:
                    every.append(torch.stack([getattr(adapter, name) for adapter in module]))
        return every

    # --- the forward -------------------------------------------------------------------------

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook of the target."""
        x, rebuild = _first(self, module, output)
        if torch.compiler.is_compiling():
            if not self.shared.is_busy and (x.requires_grad or not torch.is_grad_enabled()):
                return None
            return rebuild(self._compiled(x))
        if x.is_nested:
            self._count()
            return rebuild(self._nested(module, x))
        self._check(module, x)
        self._count()
        if _pure.is_transformed():
            return rebuild(self._pure(x)) if self.plan.banks else None
        y = self._measured(x)
        return None if y is None else rebuild(y)

    def _measured(self, x: Tensor) -> Tensor | None:
        return self._surveyed(x) if self.shared.moments is not None else self._grown(x)

    def _nested(self, module: nn.Module, x: Tensor) -> Tensor:
        is_pointwise = self.plan.topology == "vector"
        parts, together = _nested.apart(x, is_pointwise=is_pointwise)
        for part in parts:
            self._check(module, part)
        grown = [self._measured(part) for part in parts]
        if all(of is None for of in grown):
            return x
        return together([p if of is None else of for p, of in zip(parts, grown, strict=True)])

    def _compiled(self, x: Tensor) -> Tensor:
        rows = self._all_rows()
        if self.activation is not None and self.axis == -1:
            bank = {leaf: of for (_, leaf), of in zip(self.leaf_names, rows, strict=True)}
            grown = _kernels.grow_compiled(
                self.activation, bank, x, self.slot, self.gains, self.tap
            )
            if grown is not None:
                return grown
        y: Tensor = _ops.site_op(x, self.tap, rows, self.handle, self.axis)[0]
        return y

    def _grown(self, x: Tensor) -> Tensor | None:
        plan = self.plan
        if plan.banks:
            leaves = [leaf for bank in plan.banks for leaf in self.rows_of(bank)]
            return _ops.grafted(self, plan, self.axis, x, self.tap, *leaves)
        if not torch.is_grad_enabled():
            return None
        # A view that is written to in place loses the hook by which it would be measured.
        is_new = not x.requires_grad or (plan.is_watching and x._is_view())
        y = _ops.Anchored.apply(x, self.tap) if is_new else x
        if plan.is_watching:
            self._watch(y)
        return y if is_new else None

    def _pure(self, x: Tensor) -> Tensor:
        rows = [dict(zip(of.leaves, self.rows_of(of), strict=True)) for of in self.plan.banks]
        return _pure.grown(self.plan, self.axis, x, rows)

    def _watch(self, x: Tensor) -> None:
        """Measures dormant chunks by a hook of the tensor, which leaves the graph as it was."""
        cut, axis = self.plan.cut, self.axis
        with torch.no_grad():
            stats = _ops.watch(cut, x.movedim(axis, -1))

        def measure(dy: Tensor | None) -> None:
            if dy is None:
                raise BridgeError(
                    f"target {self.site!r}: no gradient comes back to it, as a layer behind it has "
                    "no derivative (a quantised one of torch.ao, say). Nothing can learn there: "
                    "leave it out by exclude=, or grow the model in floating point and quantise "
                    "it after bridge.unwrap()"
                )
            with torch.no_grad():
                self.hear(_ops.tell(cut, stats, dy.movedim(axis, -1)))

        x.register_hook(measure)

    def hear(self, told: Tensor | Sums) -> None:
        """Adds up what backward passes measure, in memory that nothing else keeps."""
        if self.heard:
            cut, place = self.plan.cut, self.tap.device
            told = summed(cut, self.heard.pop(), place) + summed(cut, told, place)
        self.heard.append(told)

    def take_heard(self) -> Tensor | Sums | None:
        """What was measured since the last call, if anything was."""
        found, self.tap.grad = self.tap.grad, None
        if found is not None and (self.plan.banks or self.plan.is_watching):
            self.hear(found)
        return self.heard.pop() if self.heard else None

    def _surveyed(self, x: Tensor) -> Tensor:
        shared = self.shared
        if torch.is_grad_enabled() and shared.with_moments:
            anchor = torch.zeros((), device=x.device, requires_grad=True)
            shared.anchors.append(anchor)
            x = _Probed.apply(self, x, anchor)
        if not self.plan.banks:
            return x
        with torch.no_grad():
            rows = [leaf for of in self.plan.banks for leaf in self.rows_of(of)]
        leaves = [leaf.detach() for leaf in rows]
        tap = self.tap.detach()
        return _ops.grafted(None, self.plan, self.axis, x, tap, *leaves)

    # --- checks ------------------------------------------------------------------------------

    def _check(self, module: nn.Module, x: Tensor) -> None:
        width = self.plan.cut.features
        if x.ndim <= (self.axis if self.axis > 0 else 0) or x.shape[self.axis] != width:
            raise BridgeError(
                f"target {self.site!r} ({type(module).__name__}): its output {tuple(x.shape)} has "
                f"no feature axis of {width} at axis {self.axis}; say features={{{self.site!r}: "
                "WIDTH} or choose another target"
            )
        if x.dtype not in DTYPES:
            raise BridgeError(
                f"target {self.site!r}: its output is {x.dtype}; seeds need float32, bfloat16 or "
                "float16, so leave the target out, or the model in one of these"
            )
        if x.device != self.tap.device:
            raise BridgeError(
                f"target {self.site!r}: its output is on {x.device}, its seeds are on "
                f"{self.tap.device}; move the whole model (model.to(...)), not single tensors of it"
            )

    def _count(self) -> None:
        called = self.shared.called.get(threading.get_ident())
        if called is None or torch._C._current_graph_task_id() != -1:
            return  # a part of the model alone, or a checkpoint's second run
        if self.site in called:
            raise BridgeError(
                f"target {self.site!r} is called more than once in one forward pass of the model: "
                "its seeds would serve two places at once; leave it out of targets, or call a "
                "module of its own at each place"
            )
        called.add(self.site)

    # --- module protocol ---------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Seeds:
        super()._apply(fn, recurse)
        self.packed_age = None
        device = fn(torch.empty(0, dtype=torch.int64, device=self.tap.device)).device
        if device != self.tap.device:
            self.tap = torch.zeros_like(self.tap, device=device, requires_grad=True)
            self.heard.clear()
            self.plan = self.plan.to(device)
            self.slot, self.gains = self.slot.to(device), self.plan.gains
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Seeds:
        own = {"tap", "handle", "heard"}
        twin: Seeds = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        self.pack_record()
        for name, of in self.__dict__.items():
            twin.__dict__[name] = None if name in own else copy.deepcopy(of, memo)
        twin.tap = torch.zeros_like(self.tap, requires_grad=True)
        twin.heard = []
        twin.handle = _ops.new_handle(twin)
        twin.plan = replace(twin.plan, is_watching=False, bound={})
        twin.shared.sites.append(weakref.ref(twin))
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
            self.load(state_dict[key])
            state_dict = {name: of for name, of in state_dict.items() if name != key}
        elif self.record is not None:
            rest[2].append(key)  # missing_keys
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        live = sum(len(bank.slots) for bank in self.plan.banks)
        return f"{self.site!r}, chunks={self.plan.cut.chunks}, live={live}"


class _Probed(torch.autograd.Function):  # type: ignore[misc]
    """The identity, whose backward pass gathers a survey's second moments."""

    @staticmethod
    def forward(ctx: Any, site: Seeds, x: Tensor, anchor: Tensor) -> Tensor:
        del anchor
        ctx.site = site
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        site: Seeds = ctx.site
        found = _layer.moments(site.plan.cut, x.movedim(site.axis, -1), dy.movedim(site.axis, -1))
        gathered = site.shared.moments
        if gathered is not None:
            old = gathered.get(site.site)
            gathered[site.site] = (
                found if old is None else [a + b for a, b in zip(old, found, strict=True)]
            )
        return None, dy, torch.zeros((), device=dy.device)


def _first(there: Any, module: nn.Module, output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that grows, and how an output is made with another in its place.

    What sits `there` is asked for the name of its site in an error alone: a compiler would hold
    whatever is read to its value, and each block would need a program of its own.
    """
    if isinstance(output, Tensor):
        return output, _itself
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        rest = output[1:]
        if hasattr(output, "_fields"):
            return output[0], lambda y: type(output)(y, *rest)
        return output[0], lambda y: type(output)((y, *rest))
    raise BridgeError(
        f"target {there.site!r} ({type(module).__name__}) returns {type(output).__name__}; seeds "
        "need a tensor, or a tuple that begins with one: choose a layer inside it"
    )


def _itself(y: Tensor) -> Tensor:
    return y
