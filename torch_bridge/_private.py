"""Which modules compute with a weight that is theirs alone and that they read as it stands.

Anything else may be read by code that nobody sees from here: a tied head, a hook, a subclass of
tensors. Every test errs on the careful side.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from torch_bridge._linear import is_transposed_linear
from torch_bridge._reads import reads_of, storage

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
_FORWARDS = {kind: kind.forward for kind in _PLAIN}
"""The forward methods that torch gave each class, which a library may have replaced."""
_CALL = nn.Module.__call__
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
        kind: Any = type(module)
        if is_transposed_linear(module):
            is_known = kind.forward.__module__ == kind.__module__
        else:
            is_known = _FORWARDS.get(kind) == kind.forward
        if not is_known or kind.__call__ is not _CALL:
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
            for leaf in ("weight", "bias")
            for tensor in [getattr(module, leaf, None)]
        )

    def _is_unread(self, module: nn.Module, leaf: str, tensor: Tensor) -> bool:
        is_single = self._owners.get(storage(tensor)) == [(id(module), leaf)]
        return is_single and not self._reads.may_read(module, leaf, tensor)


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
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module):
            for registry in ("_parameters", "_buffers"):
                for leaf, tensor in (vars(module).get(registry) or {}).items():
                    if tensor is not None:
                        owners.setdefault(storage(tensor), []).append((id(module), leaf))
    return owners
