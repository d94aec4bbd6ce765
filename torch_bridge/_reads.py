"""Which weights the forward code of a model reads beside the layers that they belong to.

The functions that a forward pass may run are found from the modules' classes, hooks and attributes,
and their bytecode is read. `self.layers[0].weight` is followed through the objects as they are; a
weight of an object that cannot be followed (a local variable, an argument, a call's result) may be
any layer's, and so may one whose name is a string. Tensors are also looked for in closures,
partials and plain objects. Code that reads only its dtype or shape (`weight.dtype`) does not count.
"""

from __future__ import annotations

import gc
import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torch_bridge._bytecode import ANY_INDEX, LEAVES, LOOKUPS, Read, names_in, reads_in

_REGISTRIES = frozenset(name for name, value in vars(nn.Module()).items() if type(value) is dict)
_INFRASTRUCTURE = (
    "torch.",
    "torch_bridge.",
    "transformers.modeling_utils",
    "transformers.pytorch_utils",
    "transformers.utils",
    "transformers.integrations.",
    "lightning.",
    "pytorch_lightning.",
    "accelerate.",
)
"""Packages whose code reads no weight of a child in a forward pass but as the child does."""
_MOST_OBJECTS = 100_000
_CONTAINERS = (Mapping, list, tuple, set, frozenset, staticmethod)
_WRAPPERS = (partial, property, cached_property, classmethod)
"""What stands for a function, and gets the object that this is a method of."""
_ATOMS = (
    *(str, bytes, int, float, complex, type(None)),
    *(type, ModuleType, nn.Module, torch.dtype, torch.device),
)


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
    for function, owner in walk:
        environment = _variables(function)
        if owner is not None and function.__code__.co_argcount:
            environment.setdefault(function.__code__.co_varnames[0], owner)
        for read in reads_in(function.__code__):
            _note(reads, read, environment)
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


def _note(reads: Reads, read: Read, environment: Mapping[str, Any]) -> None:
    is_lookup = read.name in LOOKUPS
    objects = _resolved(read, environment)
    if objects is None:
        if not is_lookup:
            reads.unknown.add(read.name)
        elif read.is_called:  # others have attributes of these names
            reads.unknown |= set(LEAVES)
        return
    for module in objects:
        if isinstance(module, nn.Module):
            parts = list(module.modules()) if is_lookup else [module]
            leaves = LEAVES if is_lookup else (read.name,)
            reads.known |= {(id(part), leaf) for part in parts for leaf in leaves}


def _resolved(read: Read, environment: Mapping[str, Any]) -> list[Any] | None:
    """The objects that a path may lead to, None where that is unknown."""
    if read.root is None or read.root not in environment:
        return None
    objects = [environment[read.root]]
    for step in read.path:
        reached: list[Any] = []
        for value in objects:
            following = _values(value) if step == ANY_INDEX else _attribute(value, step)
            if following is None:
                return None
            reached += following
        objects = reached
    return objects


def _values(value: Any) -> list[Any] | None:
    if isinstance(value, nn.Module):
        return list(value._modules.values())
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set) else None


def _attribute(value: Any, name: str) -> list[Any] | None:
    for registry in ("_modules", "_parameters", "__dict__"):
        attributes = getattr(value, registry, {})
        if name in attributes:
            return [attributes[name]]
    return None


class _Walk:
    """Functions that a forward pass may run, and tensors that they may reach.

    Iterating gives each function with the object that it is a method of, None where there is none.
    """

    def __init__(self) -> None:
        self.tensors: set[int] = set()
        self.is_lost = False
        """Too many objects were met, or a weight is read by a name that was made elsewhere."""
        self._bound: list[tuple[Any, Any]] = []
        """What is left to do: a function, or what stands for one, and whose method it is."""
        self._loose: list[Any] = []
        """Everything else that is left to do."""
        self._methods: set[FunctionType] = set()
        """Functions that belong to an object; a decorator holds them without it."""
        self._seen: dict[tuple[int, int], Any] = {}
        """By identities; the objects stay alive, so that no identity is used twice."""

    def add_module(self, module: nn.Module) -> None:
        """Adds what runs in a module's forward pass, and what the module holds."""
        kind: Any = type(module)
        own = _attributes(kind)
        self._bound += [(own[name], module) for name in ("forward", "__call__") if name in own]
        skipped = _REGISTRIES | {"_compiled_call_impl"}
        self._loose += [value for name, value in vars(module).items() if name not in skipped]
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        self._loose += [hook for hook in hooks if not _is_infrastructure(hook)]

    def __iter__(self) -> Iterator[tuple[FunctionType, Any]]:
        while self._bound or self._loose:
            value, owner = self._bound.pop() if self._bound else (self._loose.pop(), None)
            if isinstance(value, Tensor):
                self.tensors.add(storage(value))
            if isinstance(value, (Tensor, *_ATOMS)) or (id(value), id(owner)) in self._seen:
                continue
            if owner is None and isinstance(value, FunctionType) and value in self._methods:
                continue
            if len(self._seen) > _MOST_OBJECTS:
                self.is_lost = True
                return
            self._seen[id(value), id(owner)] = value, owner
            if isinstance(value, FunctionType):
                self._follow_function(value, owner)
                if not _is_infrastructure(value):
                    yield value, owner
            else:
                self._follow(value, owner)

    def _follow_function(self, function: FunctionType, owner: Any) -> None:
        """Adds what a function may call or hold: methods, globals, defaults, cells."""
        wrapped = [*_cells(function).values(), getattr(function, "__wrapped__", None)]
        inner = [f for f in wrapped if isinstance(f, (FunctionType, MethodType, *_WRAPPERS))]
        if owner is not None:
            self._methods.add(function)
            self._bound += [(value, owner) for value in inner]
        if _is_infrastructure(function):
            self._loose += inner
            return
        kind: Any = type(owner)
        names, own = names_in(function.__code__), _attributes(kind)
        self._bound += [(own[name], owner) for name in names if name in own]
        self._loose += [*wrapped, *(function.__defaults__ or ())]
        self._loose += (function.__kwdefaults__ or {}).values()
        for value in _globals_of(function, names):
            if isinstance(value, type) and not issubclass(value, nn.Module):
                methods = _attributes(value)
                called = names | {"forward", "backward", "__call__"}
                self._loose += [methods[name] for name in called if name in methods]
            else:
                self._loose.append(value)

    def _follow(self, value: Any, owner: Any) -> None:
        """Adds what an object holds, and what it runs when it is called."""
        if isinstance(value, MethodType):
            self._bound.append((value.__func__, value.__self__))
            self._loose.append(value.__self__)
        elif isinstance(value, _WRAPPERS) and owner is not None:
            self._bound += [(inner, owner) for inner in gc.get_referents(value)]
        elif isinstance(value, (*_CONTAINERS, *_WRAPPERS)):
            self._loose += gc.get_referents(value)
        elif isinstance(value, operator.attrgetter):
            names = value.__reduce__()[1]
            self.is_lost |= any(str(name).rpartition(".")[2] in LEAVES for name in names)
        elif not _is_infrastructure(type(value)) and type(value).__module__ != "builtins":
            self._bound.append((inspect.getattr_static(type(value), "__call__", None), value))
            self._loose += gc.get_referents(value)


def _is_infrastructure(value: Any) -> bool:
    """Whether it comes from code that reads no weight."""
    return f"{getattr(value, '__module__', None)}.".startswith(_INFRASTRUCTURE)


@cache
def _attributes(kind: Any) -> dict[str, Any]:
    """What the classes of an object define, but for infrastructure."""
    known: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__ != "builtins" and not _is_infrastructure(base):
            known |= vars(base)
    return known


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
    names = names_in(function.__code__) - set(function.__code__.co_varnames)
    scope = function.__globals__
    return {name: scope[name] for name in names if name in scope} | _cells(function)


def _globals_of(function: FunctionType, names: Iterable[str]) -> Iterator[Any]:
    scope = function.__globals__
    for name in names:
        value = scope.get(name)
        if isinstance(value, ModuleType):
            is_ours = not f"{value.__name__}.".startswith(("torch.", "numpy.", "math."))
            yield from (vars(value)[other] for other in names if is_ours and other in vars(value))
        elif value is not None:
            yield value
