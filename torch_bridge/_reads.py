"""Which weights the forward code of a model reads beside the layers that they belong to.

The functions that a forward pass may run are found from the modules' classes, hooks and attributes,
and their bytecode is read. `self.layers[0].weight` is followed through the objects as they are; a
weight of an object that cannot be followed (a local variable, an argument, a call's result) may be
any layer's, and so may one whose name is a string. Tensors are also looked for in closures,
partials and plain objects. To ask for a weight's kind or shape (`weight.dtype`) is no reading.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEAVES = ("weight", "bias")
_LOOKUPS = frozenset(
    (
        "get_parameter",
        "get_submodule",
        "get_input_embeddings",
        "get_output_embeddings",
        "modules",
        "named_modules",
        "children",
        "named_children",
        "parameters",
        "named_parameters",
        "state_dict",
    )
)
"""Other ways by which code comes to a layer's weight."""
_HARMLESS = frozenset(
    ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "requires_grad")
)
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
_ANY = "[]"
"""A subscript in a path, whatever its index."""
_MOST_OBJECTS = 100_000


class Reads:
    """What code outside of a layer may read of it."""

    def __init__(self) -> None:
        self.known: set[tuple[int, str]] = set()
        """Identity of a module, and the name of a parameter that is read of it."""
        self.unknown: set[str] = set()
        """Names of parameters that are read of objects nobody can tell."""
        self.held: set[int] = set()
        """Memory of tensors in closures, partials and plain objects."""

    def may_read(self, module: nn.Module, leaf: str, of: Tensor) -> bool:
        """Whether a parameter may be read by somebody else than its module."""
        is_named = leaf in self.unknown or (id(module), leaf) in self.known
        return is_named or storage(of) in self.held


class _Read(NamedTuple):
    """`root.path.name` in a function's code."""

    root: str | None
    """A variable's name; None where it is something else."""
    path: tuple[str, ...]
    name: str
    is_called: bool


def reads_of(model: nn.Module) -> Reads:
    """What the forward passes of a model's modules read."""
    found, walk = Reads(), _Walk()
    for module in model.modules():
        walk.add_module(module)
    while walk.waiting:
        function, environment = walk.waiting.pop()
        for read in _reads_in(function.__code__):
            _note(found, read, environment | _variables(function))
        walk.follow(function)
    found.held = walk.held
    if walk.is_lost:
        found.unknown |= set(LEAVES)
    return found


def storage(of: Tensor) -> int:
    """Where its memory begins, 0 where it has none."""
    try:
        return of.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of fake and of wrapped tensors
        return 0


def module_of(of: Any) -> str:
    """The name of the package file something comes from."""
    return getattr(of, "__module__", None) or ""


def _note(found: Reads, read: _Read, environment: Mapping[str, Any]) -> None:
    is_lookup = read.name in _LOOKUPS
    objects = _resolved(read, environment)
    if objects is None:
        if not is_lookup:
            found.unknown.add(read.name)
        elif read.is_called:  # others have attributes of these names
            found.unknown |= set(LEAVES)
        return
    for of in objects:
        if isinstance(of, nn.Module):
            parts = list(of.modules()) if is_lookup else [of]
            leaves = LEAVES if is_lookup else (read.name,)
            found.known |= {(id(part), leaf) for part in parts for leaf in leaves}


def _resolved(read: _Read, environment: Mapping[str, Any]) -> list[Any] | None:
    """The objects that a path may lead to, None where that cannot be told."""
    if read.root is None or read.root not in environment:
        return None
    objects = [environment[read.root]]
    for step in read.path:
        reached: list[Any] = []
        for of in objects:
            following = _values(of) if step == _ANY else _attribute(of, step)
            if following is None:
                return None
            reached += following
        objects = reached
    return objects


def _values(of: Any) -> list[Any] | None:
    if isinstance(of, nn.Module):
        return list(of._modules.values())
    if isinstance(of, Mapping):
        return list(of.values())
    return list(of) if isinstance(of, list | tuple | set) else None


def _attribute(of: Any, name: str) -> list[Any] | None:
    for names in (*(getattr(of, registry, None) for registry in ("_modules", "_parameters")), of):
        inside = names if isinstance(names, dict) else getattr(names, "__dict__", {})
        if name in inside:
            return [inside[name]]
    return None


class _Walk:
    """Functions that a forward pass may run, and tensors that they may reach."""

    def __init__(self) -> None:
        self.waiting: list[tuple[FunctionType, dict[str, Any]]] = []
        self.held: set[int] = set()
        self.is_lost = False
        """Too many objects were met."""
        self._methods: set[FunctionType] = set()
        """Those that belong to an object; a decorator holds them without it."""
        self._seen: set[Any] = set()
        self._kept: list[Any] = []
        """So that no identity is used twice."""

    def add_module(self, module: nn.Module) -> None:
        """Adds the functions of a module's forward pass."""
        kind: Any = type(module)
        if not (module_of(kind).startswith("torch.nn.") or _is_known_layer(kind)):
            for function in _methods(kind):
                self._add(function, module)
        for name, of in vars(module).items():
            if name not in _REGISTRIES and name != "_compiled_call_impl":
                self._reach(of)
        for registry in (module._forward_hooks, module._forward_pre_hooks):
            for of in registry.values():
                if not module_of(of).startswith("torch_bridge."):
                    self._reach(of)

    def follow(self, function: FunctionType) -> None:
        """Adds what a function may call or hold: its globals, defaults, cells."""
        names = _names_in(function.__code__)
        for of in _globals_of(function, names):
            if isinstance(of, type):
                if not issubclass(of, nn.Module) and not _is_infrastructure(of):
                    for name in names | {"forward", "backward", "__call__"}:
                        self._reach_function(vars(of).get(name))
            else:
                self._reach(of)
        for of in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._reach(of)
        for of in _cells(function).values():
            self._reach(of)

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

    def _reach_function(self, of: Any) -> None:
        for function in _functions_of(of):
            self._add(function)

    def _reach(self, root: Any) -> None:
        """Looks for tensors and functions in an object and all that it holds."""
        waiting = [root]
        while waiting:
            of = waiting.pop()
            if isinstance(of, Tensor):
                self.held.add(storage(of))
                continue
            if of is None or isinstance(of, str | bytes | int | float | complex | type | nn.Module):
                continue
            if isinstance(of, ModuleType | torch.dtype | torch.device) or id(of) in self._seen:
                continue
            if len(self._seen) > _MOST_OBJECTS:
                self.is_lost = True
                return
            self._seen.add(id(of))
            self._kept.append(of)
            waiting += self._inside(of)

    def _inside(self, of: Any) -> Iterable[Any]:
        if isinstance(of, Mapping):
            return list(of.values())
        if isinstance(of, list | tuple | set | frozenset):
            return list(of)
        if isinstance(of, partial):
            return [of.func, *of.args, *of.keywords.values()]
        if isinstance(of, MethodType):
            self._add_bound(of)
            return [] if isinstance(of.__self__, nn.Module) else [of.__self__]
        if isinstance(of, FunctionType):
            self._add(of)
            wrapped = getattr(of, "__wrapped__", None)
            return [] if wrapped is None else [wrapped]
        if isinstance(of, operator.attrgetter):
            names = of.__reduce__()[1]
            self.is_lost |= any(str(name).rpartition(".")[2] in LEAVES for name in names)
            return []
        if _is_infrastructure(type(of)) or module_of(type(of)) == "builtins":
            return []
        return self._inside_plain(of)

    def _inside_plain(self, of: Any) -> list[Any]:
        """Of an object of somebody's class: attributes, and what it does when it is called."""
        for function in _functions_of(inspect.getattr_static(type(of), "__call__", None)):
            self._add(function, of)
        slots = [name for kind in type(of).__mro__ for name in getattr(kind, "__slots__", ())]
        own = [getattr(of, name, None) for name in slots if isinstance(name, str)]
        return [*getattr(of, "__dict__", {}).values(), *own]

    def _add_bound(self, of: MethodType) -> None:
        for function in _functions_of(of.__func__):
            self._add(function, of.__self__)


def _is_infrastructure(of: Any) -> bool:
    return module_of(of).startswith(_INFRASTRUCTURE) or module_of(of) == "torch"


def _is_known_layer(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


@cache
def _methods(kind: Any) -> tuple[FunctionType, ...]:
    """The methods that the forward pass of a class may call, as far as names tell."""
    known: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base is not object and not _is_infrastructure(base):
            known |= vars(base)
    waiting = [of for of in (known.get(name) for name in ("forward", "__call__")) if of is not None]
    found: dict[FunctionType, None] = {}
    while waiting:
        for function in _functions_of(waiting.pop()):
            if function not in found:
                found[function] = None
                waiting += [known[name] for name in _names_in(function.__code__) if name in known]
    return tuple(found)


def _functions_of(of: Any, depth: int = 4) -> Iterator[FunctionType]:
    """A function itself, however it is wrapped."""
    if isinstance(of, FunctionType):
        yield of
    if depth:
        inner = [getattr(of, name, None) for name in ("fget", "__func__", "func", "__wrapped__")]
        if isinstance(of, FunctionType):
            inner += _cells(of).values()
        for each in inner:
            if isinstance(each, FunctionType | MethodType | partial | property):
                yield from _functions_of(each, depth - 1)


def _cells(function: FunctionType) -> dict[str, Any]:
    """The variables of a closure that have a value."""
    found = {}
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _variables(function: FunctionType) -> dict[str, Any]:
    """What a function's names mean, but for its own variables."""
    names = _names_in(function.__code__)
    scope = function.__globals__
    mine = set(function.__code__.co_varnames)
    found = {name: scope[name] for name in names if name in scope and name not in mine}
    return found | _cells(function)


def _globals_of(function: FunctionType, names: frozenset[str]) -> Iterator[Any]:
    scope = function.__globals__
    for name in names:
        of = scope.get(name)
        if isinstance(of, ModuleType):
            is_ours = not f"{of.__name__}.".startswith(("torch.", "numpy.", "math."))
            yield from (vars(of)[other] for other in names if is_ours and other in vars(of))
        elif of is not None:
            yield of


@cache
def _names_in(code: CodeType) -> frozenset[str]:
    inner = [of for of in code.co_consts if isinstance(of, CodeType)]
    return frozenset(code.co_names).union(*map(_names_in, inner))


@cache
def _reads_in(code: CodeType) -> tuple[_Read, ...]:
    """The parameters that a function's code reads, and the lookups it makes."""
    steps = [of for of in dis.get_instructions(code) if of.opname not in _SKIPPED]
    found = []
    for at, of in enumerate(steps):
        if of.opname in _ATTRIBUTES and of.argval in (*LEAVES, *_LOOKUPS):
            start, root, path = _path_to(steps, at - 1)
            if not _is_harmless(steps, at) and not _is_asked(steps, start):
                is_called = of.opname == "LOAD_METHOD" or "self" in of.argrepr
                found.append(_Read(root, path, of.argval, is_called))
        elif of.opname == "LOAD_CONST" and isinstance(of.argval, str):
            leaf = of.argval.rpartition(".")[2]
            if leaf in LEAVES and not _is_asked(steps, _path_to(steps, at - 1)[0]):
                found.append(_Read(None, (), leaf, is_called=False))
        elif of.opname == "LOAD_CONST" and isinstance(of.argval, CodeType):
            found += _reads_in(of.argval)
    return tuple(found)


_SKIPPED = frozenset(("CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "RESUME", "PUSH_NULL"))
_ATTRIBUTES = frozenset(("LOAD_ATTR", "LOAD_METHOD"))
_CALLS = frozenset(("CALL", "GET_ITER", "PRECALL", "CALL_FUNCTION", "CALL_METHOD"))


def _is_harmless(steps: list[dis.Instruction], at: int) -> bool:
    """Whether only a kind or shape is asked for: `weight.dtype`, `next(x.parameters()).device`."""
    is_lookup = steps[at].argval in _LOOKUPS
    following = at + 1
    while is_lookup and following < len(steps) and steps[following].opname in _CALLS:
        following += 1
    return (
        following < len(steps)
        and steps[following].opname in _ATTRIBUTES
        and steps[following].argval in _HARMLESS
    )


def _is_asked(steps: list[dis.Instruction], start: int) -> bool:
    """Whether what begins at `start` is asked what it is: `isinstance(layer.weight, Tensor)`."""
    before = steps[start - 1] if start > 0 else None
    return (
        before is not None
        and before.opname == "LOAD_GLOBAL"
        and before.argval in {"hasattr", "isinstance"}
    )


def _path_to(steps: list[dis.Instruction], at: int) -> tuple[int, str | None, tuple[str, ...]]:
    """Where the value begins that lies on the stack after instruction `at`; variable and path."""
    path: list[str] = []
    while at >= 0:
        of = steps[at]
        if of.opname in _ATTRIBUTES:
            path.append(of.argval)
            at -= 1
        elif of.opname == "BINARY_SUBSCR" or (of.opname == "BINARY_OP" and of.argrepr == "[]"):
            path.append(_ANY)
            index = steps[at - 1]
            if isinstance(index.argval, tuple) and index.opname.startswith("LOAD_FAST"):
                return at - 1, index.argval[0], tuple(reversed(path))
            if not index.opname.startswith("LOAD_") or index.opname in _ATTRIBUTES:
                break
            at -= 2
        elif of.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "STORE_FAST_LOAD")):
            name = of.argval[-1] if isinstance(of.argval, tuple) else of.argval
            return at, name, tuple(reversed(path))
        else:
            break
    return -1, None, ()
