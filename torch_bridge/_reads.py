"""Which weights the forward code of a model reads beside the layers that they belong to.

The functions that a forward pass may run are found from the modules' classes, hooks and attributes,
and their bytecode is read. `self.layers[0].weight` is followed through the objects as they are; a
weight of an object that cannot be followed (a local variable, an argument, a call's result) may be
any layer's, and so may one whose name is a string. Tensors are also looked for in closures,
partials and plain objects. Code that reads only its dtype or shape (`weight.dtype`) does not count.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torch_bridge._bytecode import ANY_INDEX, LEAVES, LOOKUPS, Read, names_in, reads_in

_REGISTRIES = frozenset(
    name for name in vars(nn.Module()) if isinstance(vars(nn.Module())[name], dict)
)
_INFRASTRUCTURE = (
    "torch.",
    "torch_bridge.",
    "transformers.modeling_utils",
    "transformers.utils",
    "transformers.integrations.",
    "lightning.",
    "pytorch_lightning.",
    "accelerate.",
)
"""Packages whose code reads no weight of a child in a forward pass but as the child does."""
_MOST_OBJECTS = 100_000


class Reads:
    """What code outside of a layer may read of it."""

    def __init__(self) -> None:
        self.known: set[tuple[int, str]] = set()
        """Identity of a module, and the name of a parameter that is read of it."""
        self.unknown: set[str] = set()
        """Names of parameters that are read of unknown objects."""
        self.tensors: set[int] = set()
        """Memory of tensors in closures, partials and plain objects."""

    def may_read(self, module: nn.Module, leaf: str, tensor: Tensor) -> bool:
        """Whether a parameter may be read by somebody else than its module."""
        is_named = leaf in self.unknown or (id(module), leaf) in self.known
        return is_named or storage(tensor) in self.tensors


def reads_of(model: nn.Module) -> Reads:
    """What the forward passes of a model's modules read."""
    reads, walk = Reads(), _Walk()
    for module in model.modules():
        walk.add_module(module)
    while walk.waiting:
        function, environment = walk.waiting.pop()
        for read in reads_in(function.__code__):
            _note(reads, read, environment | _variables(function))
        walk.follow(function)
    reads.tensors = walk.tensors
    if walk.is_lost:
        reads.unknown |= set(LEAVES)
    return reads


def storage(tensor: Tensor) -> int:
    """Where its memory begins, 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of fake and of wrapped tensors
        return 0


def module_of(value: Any) -> str:
    """The name of the package file something comes from."""
    return getattr(value, "__module__", None) or ""


def _note(reads: Reads, read: Read, environment: Mapping[str, Any]) -> None:
    is_lookup = read.name in LOOKUPS
    objects = _resolved(read, environment)
    if objects is None:
        if not is_lookup:
            reads.unknown.add(read.name)
        elif read.is_called:  # others have attributes of these names
            reads.unknown |= set(LEAVES)
        return
    for owner in objects:
        if isinstance(owner, nn.Module):
            parts = list(owner.modules()) if is_lookup else [owner]
            leaves = LEAVES if is_lookup else (read.name,)
            reads.known |= {(id(part), leaf) for part in parts for leaf in leaves}


def _resolved(read: Read, environment: Mapping[str, Any]) -> list[Any] | None:
    """The objects that a path may lead to, None where that is unknown."""
    if read.root is None or read.root not in environment:
        return None
    objects = [environment[read.root]]
    for step in read.path:
        reached: list[Any] = []
        for owner in objects:
            following = _values(owner) if step == ANY_INDEX else _attribute(owner, step)
            if following is None:
                return None
            reached += following
        objects = reached
    return objects


def _values(owner: Any) -> list[Any] | None:
    if isinstance(owner, nn.Module):
        return list(owner._modules.values())
    if isinstance(owner, Mapping):
        return list(owner.values())
    return list(owner) if isinstance(owner, list | tuple | set) else None


def _attribute(owner: Any, name: str) -> list[Any] | None:
    for names in (
        *(getattr(owner, registry, None) for registry in ("_modules", "_parameters")),
        owner,
    ):
        inside = names if isinstance(names, dict) else getattr(names, "__dict__", {})
        if name in inside:
            return [inside[name]]
    return None


class _Walk:
    """Functions that a forward pass may run, and tensors that they may reach."""

    def __init__(self) -> None:
        self.waiting: list[tuple[FunctionType, dict[str, Any]]] = []
        self.tensors: set[int] = set()
        self.is_lost = False
        """Too many objects were met."""
        self._methods: set[FunctionType] = set()
        """Functions that belong to an object; a decorator holds them without it."""
        self._seen: set[Any] = set()
        self._alive: list[Any] = []
        """So that no identity is used twice."""

    def add_module(self, module: nn.Module) -> None:
        """Adds the functions of a module's forward pass."""
        kind: Any = type(module)
        if not (module_of(kind).startswith("torch.nn.") or _is_known_layer(kind)):
            for function in _methods(kind):
                self._add(function, module)
        for name, value in vars(module).items():
            if name not in _REGISTRIES and name != "_compiled_call_impl":
                self._reach(value)
        for registry in (module._forward_hooks, module._forward_pre_hooks):
            for value in registry.values():
                if not module_of(value).startswith("torch_bridge."):
                    self._reach(value)

    def follow(self, function: FunctionType) -> None:
        """Adds what a function may call or hold: its globals, defaults, cells."""
        names = names_in(function.__code__)
        for value in _globals_of(function, names):
            if isinstance(value, type):
                if not issubclass(value, nn.Module) and not _is_infrastructure(value):
                    for name in names | {"forward", "backward", "__call__"}:
                        self._reach_function(vars(value).get(name))
            else:
                self._reach(value)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._reach(value)
        for value in _cells(function).values():
            self._reach(value)

    def _add(self, function: FunctionType, self_: Any = None) -> None:
        if _is_infrastructure(function) or (self_ is None and function in self._methods):
            return
        if self_ is not None:
            self._methods.add(function)
        key = (function, None if self_ is None else id(self_))
        if key in self._seen:
            return
        self._seen.add(key)
        first = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
        self.waiting.append((function, dict.fromkeys(first, self_) if self_ is not None else {}))

    def _reach_function(self, value: Any) -> None:
        for function in _functions_of(value):
            self._add(function)

    def _reach(self, root: Any) -> None:
        """Looks for tensors and functions in an object and all that it holds."""
        waiting = [root]
        while waiting:
            value = waiting.pop()
            if isinstance(value, Tensor):
                self.tensors.add(storage(value))
                continue
            if value is None or isinstance(
                value, str | bytes | int | float | complex | type | nn.Module
            ):
                continue
            if (
                isinstance(value, ModuleType | torch.dtype | torch.device)
                or id(value) in self._seen
            ):
                continue
            if len(self._seen) > _MOST_OBJECTS:
                self.is_lost = True
                return
            self._seen.add(id(value))
            self._alive.append(value)
            waiting += self._inside(value)

    def _inside(self, value: Any) -> Iterable[Any]:
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, list | tuple | set | frozenset):
            return list(value)
        if isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, MethodType):
            self._add_bound(value)
            return [] if isinstance(value.__self__, nn.Module) else [value.__self__]
        if isinstance(value, FunctionType):
            self._add(value)
            wrapped = getattr(value, "__wrapped__", None)
            return [] if wrapped is None else [wrapped]
        if isinstance(value, operator.attrgetter):
            names = value.__reduce__()[1]
            self.is_lost |= any(str(name).rpartition(".")[2] in LEAVES for name in names)
            return []
        if _is_infrastructure(type(value)) or module_of(type(value)) == "builtins":
            return []
        return self._inside_plain(value)

    def _inside_plain(self, value: Any) -> list[Any]:
        """The attributes of an object of an unknown class; what it runs when called is added."""
        for function in _functions_of(inspect.getattr_static(type(value), "__call__", None)):
            self._add(function, value)
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own = [getattr(value, name, None) for name in slots if isinstance(name, str)]
        return [*getattr(value, "__dict__", {}).values(), *own]

    def _add_bound(self, method: MethodType) -> None:
        for function in _functions_of(method.__func__):
            self._add(function, method.__self__)


def _is_infrastructure(value: Any) -> bool:
    return module_of(value).startswith(_INFRASTRUCTURE) or module_of(value) == "torch"


def _is_known_layer(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


@cache
def _methods(kind: Any) -> tuple[FunctionType, ...]:
    """The methods that the forward pass of a class may call, as far as names show."""
    known: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base is not object and not _is_infrastructure(base):
            known |= vars(base)
    waiting = [
        method
        for method in (known.get(name) for name in ("forward", "__call__"))
        if method is not None
    ]
    methods: dict[FunctionType, None] = {}
    while waiting:
        for function in _functions_of(waiting.pop()):
            if function not in methods:
                methods[function] = None
                waiting += [known[name] for name in names_in(function.__code__) if name in known]
    return tuple(methods)


def _functions_of(value: Any, depth: int = 4) -> Iterator[FunctionType]:
    """A function itself, however it is wrapped."""
    if isinstance(value, FunctionType):
        yield value
    if depth:
        inner = [getattr(value, name, None) for name in ("fget", "__func__", "func", "__wrapped__")]
        if isinstance(value, FunctionType):
            inner += _cells(value).values()
        for each in inner:
            if isinstance(each, FunctionType | MethodType | partial | property):
                yield from _functions_of(each, depth - 1)


def _cells(function: FunctionType) -> dict[str, Any]:
    """The variables of a closure that have a value."""
    cells = {}
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=False):
        try:
            cells[name] = cell.cell_contents
        except ValueError:
            continue
    return cells


def _variables(function: FunctionType) -> dict[str, Any]:
    """What a function's names mean, but for its own variables."""
    names = names_in(function.__code__)
    scope = function.__globals__
    mine = set(function.__code__.co_varnames)
    variables = {name: scope[name] for name in names if name in scope and name not in mine}
    return variables | _cells(function)


def _globals_of(function: FunctionType, names: frozenset[str]) -> Iterator[Any]:
    scope = function.__globals__
    for name in names:
        value = scope.get(name)
        if isinstance(value, ModuleType):
            is_ours = not f"{value.__name__}.".startswith(("torch.", "numpy.", "math."))
            yield from (vars(value)[other] for other in names if is_ours and other in vars(value))
        elif value is not None:
            yield value
