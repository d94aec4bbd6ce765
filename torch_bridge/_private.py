"""Which modules compute with a weight that is theirs alone and that they read as it stands.

Anything else may be read by code that nobody sees from here: a tied head, a hook, a subclass of
tensors. Every test errs on the careful side.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from torch_bridge._reads import module_of, reads_of, storage

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
"""The methods that torch gave each class, which a library may have replaced."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Weights:
    """What reads the weights of a model, found out once.

    Args:
      model: the whole of it.
      hooks: ids of the forward hooks of seeds.
    """

    def __init__(self, model: nn.Module, hooks: set[int]) -> None:
        self._hooks = hooks
        self._owners = _owners()
        self._reads = reads_of(model)

    def is_plain(self, module: nn.Module) -> bool:
        """Whether a module that has seeds computes what its class says, with its own parameters."""
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
            tensor is None or (_is_own(tensor) and self._is_unread(module, leaf, tensor))
            for leaf, tensor in _read(module).items()
        )

    def _is_unread(self, module: nn.Module, leaf: str, tensor: Tensor) -> bool:
        is_single = self._owners.get(storage(tensor)) == [(id(module), leaf)]
        return is_single and not self._reads.may_read(module, leaf, tensor)


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


def _is_own(tensor: Any) -> bool:
    """Whether it is an ordinary parameter, alone in memory that can be written."""
    return (
        type(tensor) is nn.Parameter
        and tensor.layout is torch.strided
        and tensor.dtype in _FLOATS
        and tensor.device.type != "meta"
        and not tensor.is_inference()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _owners() -> dict[int, list[tuple[int, str]]]:
    """The modules of this process that have a tensor's memory, and under which names.

    Not those of one model alone: what grows may be a part of a greater one, with a tied head.
    """
    owners: dict[int, list[tuple[int, str]]] = {}
    for part in gc.get_objects():
        if not issubclass(type(part), nn.Module):
            continue
        values = list(vars(part).items())
        if module_of(type(part)).startswith(("torch.nn.parallel.", "torch.distributed.")):
            values = []  # wrappers list what their module has
        for registry in _REGISTERED:
            values += (vars(part).get(registry) or {}).items()
        for key, value in values:
            for tensor in _tensors(value) if key not in _REGISTERED else ():
                owners.setdefault(storage(tensor), []).append((id(part), key))
    return owners


_REGISTERED = ("_parameters", "_buffers")


def _tensors(value: Any, depth: int = 2) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors(each, depth - 1)
    elif depth and isinstance(value, Mapping):
        for each in list(value.values()):
            yield from _tensors(each, depth - 1)
