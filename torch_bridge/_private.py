"""Which modules compute with a weight that is theirs alone and that they read as it stands.

Anything else may be read by code that nobody sees from here: a tied head, a hook, a subclass of
tensors. Every test errs on the careful side.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_PLAIN = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
)
_FORWARDS = {kind: (kind.forward, kind.__call__) for kind in _PLAIN}
"""As torch made them: a library may have put others in their places."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOOKING_UP = {
    "get_input_embeddings",
    "get_output_embeddings",
    "get_parameter",
    "get_submodule",
    "modules",
    "named_modules",
    "children",
    "named_children",
    "parameters",
    "named_parameters",
    "state_dict",
}
"""Other ways by which code comes to a layer's weight."""


class Weights:
    """What reads the weights of a model, found out once.

    Args:
      model: the whole of it.
      hooks: ids of the forward hooks of seeds.
    """

    def __init__(self, model: nn.Module, hooks: set[int]) -> None:
        self._hooks = hooks
        self._owners = _owners()
        self._parts = dict(model.named_modules())
        self._readers = [
            (part, names) for part in self._parts.values() for names in _names_read(part)
        ]

    def is_plain(self, name: str, module: nn.Module) -> bool:
        """Whether a module computes what its class says, with its parameters, and then grows.

        Args:
          name: of the module in the model.
          module: one that has seeds.
        """
        kind = type(module)
        is_known = kind in _FORWARDS and _FORWARDS[kind] == (kind.forward, kind.__call__)
        if not (is_known or is_transposed_linear(module)):
            return False
        if any(callable(getattr(kind, key, None)) for key in module.__dict__):
            return False  # a forward, or a part of one, of its own
        if module._forward_pre_hooks or set(module._forward_hooks) - self._hooks:
            return False
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        if getattr(module, "max_norm", None) is not None:
            return False
        return all(
            of is None or (_is_own(of) and self._is_unread(name, module, leaf, of))
            for leaf, of in _read(module).items()
        )

    def _is_unread(self, name: str, module: nn.Module, leaf: str, of: Tensor) -> bool:
        if self._owners.get(_storage(of)) != [(id(module), leaf)]:
            return False
        parts = name.split(".")
        parent = self._parts.get(".".join(parts[:-1]))
        # `self.layers[0].weight` and `for layer in self.layers` name the list.
        alias = next((part for part in reversed(parts) if not part.isdigit()), "")
        return not any(
            leaf in names
            and (alias in names or names & _LOOKING_UP or (parts[-1].isdigit() and at is parent))
            for at, names in self._readers
        )


def is_transposed_linear(module: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, whose weight is `[inputs, outputs]`."""
    kind = type(module)
    return (
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
        and kind.forward.__module__ == kind.__module__
        and kind.__call__ is nn.Module.__call__
    )


def _read(module: nn.Module) -> dict[str, Any]:
    """The tensors a layer computes with, None where it has no such one."""
    return {leaf: getattr(module, leaf, None) for leaf in ("weight", "bias")}


def _is_own(of: Any) -> bool:
    """Whether it is an ordinary parameter, alone in memory that can be written."""
    return (
        type(of) is nn.Parameter
        and of.layout is torch.strided
        and of.dtype in _FLOATS
        and of.device.type != "meta"
        and not of.is_inference()
        and of.untyped_storage().nbytes() == of.numel() * of.element_size()
    )


def _storage(of: Tensor) -> int:
    """Where its memory begins, 0 where it has none."""
    try:
        return of.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of fake and of wrapped tensors
        return 0


def _owners() -> dict[int, list[tuple[int, str]]]:
    """By memory, the modules of this process that have it, and under which names.

    Not those of one model alone: what grows may be a part of a greater one, with a tied head.
    """
    found: dict[int, list[tuple[int, str]]] = {}
    for part in gc.get_objects():
        if not issubclass(type(part), nn.Module):
            continue
        values = list(vars(part).items())
        if _module_of(type(part)).startswith(("torch.nn.parallel.", "torch.distributed.")):
            values = []  # wrappers list what their module has
        for registry in _REGISTERED:
            values += (vars(part).get(registry) or {}).items()
        for key, of in values:
            for tensor in _tensors(of) if key not in _REGISTERED else ():
                found.setdefault(_storage(tensor), []).append((id(part), key))
    return found


_REGISTERED = ("_parameters", "_buffers")


def _tensors(of: Any, depth: int = 2) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif depth and isinstance(of, (list, tuple, set)):
        for each in of:
            yield from _tensors(each, depth - 1)
    elif depth and isinstance(of, Mapping):
        for each in list(of.values()):
            yield from _tensors(each, depth - 1)


def _names_read(module: nn.Module) -> Iterator[frozenset[str]]:
    """The names that each function reads which runs in a module's forward pass.

    Layers of torch are known: those that read their children's weights compute as the children do.
    """
    kind: Any = type(module)
    if not (kind.__module__.startswith("torch.nn.") or is_transposed_linear(module)):
        yield from _names_read_by(kind)
    own: list[Any] = [of for of in vars(module).values() if callable(of)]
    for registry in (module._forward_hooks, module._forward_pre_hooks):
        own += [of for of in registry.values() if not _module_of(of).startswith("torch_bridge.")]
    for of in own:
        if not isinstance(of, nn.Module):
            yield from (frozenset(_names_in(each.__code__)) for each in _functions_of(of))


@cache
def _names_read_by(kind: Any) -> tuple[frozenset[str], ...]:
    """Of the functions that the forward pass of a class may call, as far as names tell."""
    known: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base is not object and not _module_of(base).startswith("torch.nn."):
            known |= vars(base)
    waiting = [of for of in (known.get(name) for name in ("forward", "__call__")) if of is not None]
    found: dict[Any, frozenset[str]] = {}
    while waiting:
        for function in _functions_of(waiting.pop()):
            if function in found or _module_of(function).startswith("torch."):
                continue
            names = found[function] = frozenset(_names_in(function.__code__))
            scope = function.__globals__
            waiting += [known[name] for name in names if name in known]
            waiting += [of for name in names if isinstance(of := scope.get(name), FunctionType)]
    return tuple(found.values())


def _module_of(of: Any) -> str:
    return getattr(of, "__module__", None) or ""


def _functions_of(of: Any, depth: int = 4) -> Iterator[FunctionType]:
    """A function itself, however it is wrapped."""
    if isinstance(of, FunctionType):
        yield of
    if not depth:
        return
    inner = [getattr(of, name, None) for name in ("fget", "__func__", "func", "__wrapped__")]
    if isinstance(of, FunctionType):
        inner += [cell.cell_contents for cell in of.__closure__ or () if _is_filled(cell)]
    for each in inner:
        if isinstance(each, (FunctionType, MethodType, partial, property)):
            yield from _functions_of(each, depth - 1)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield from constant.split(".")
        elif isinstance(constant, CodeType):
            yield from _names_in(constant)
