"""Which linear layers `all-linear` means: not heads, routers, shared ones or ones nobody calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

_HEAD = re.compile(
    r"(?!pre_?)(\w+_)?(heads?|classifiers?)(\d+|_\w+)?|scores?|logits|cls|qa_outputs"
)
_ROUTER = re.compile(r"gate|gating|router|switch|w_?g|\w+_(gate|router)|(gate|router)_net\w*")
_READ_BY_MAMBA = ("x_proj", "dt_proj", "out_proj")

HEAD = "output head"
ROUTER = "router"
NOT_CALLED = "read by its parent, not called"
ADAPTER = "adapter"
SHARED = "one module under several names"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch, of transformers, or a quantised one."""
    return (
        isinstance(module, nn.Linear)
        or is_transposed_linear(module)
        or _is_dynamic(module)
        or _is_adapted(module)
    )


def is_transposed_linear(module: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, whose weight is `[inputs, outputs]`."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _is_dynamic(module: nn.Module) -> bool:
    """A linear layer of `torch.ao` whose weight is packed, and which returns floating numbers."""
    own = type(module)
    return own.__name__ == "Linear" and own.__module__.startswith("torch.ao.nn.quantized.dynamic")


def _is_adapted(module: nn.Module) -> bool:
    """A linear layer that PEFT has put its adapters around."""
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Module) and is_linear(base)


def left_out(named: Mapping[str, nn.Module], model: nn.Module) -> dict[str, str]:
    """The linear layers that `all-linear` leaves out, and why.

    Where a model has no other linear layer than heads, they are not left out.
    """
    linear = {name: module for name, module in named.items() if is_linear(module)}
    times = Counter(map(id, named.values()))
    skipped = {name: SHARED for name, module in linear.items() if times[id(module)] > 1}
    skipped |= {name: reason for name in linear if (reason := _reason(name, named, model))}
    heads = _heads(linear, named, model)
    if all(name in skipped or name in heads for name in linear):
        return skipped
    return {**dict.fromkeys(heads, HEAD), **skipped}


def _reason(name: str, named: Mapping[str, nn.Module], model: nn.Module) -> str | None:
    above, _, last = name.rpartition(".")
    parent = named[above] if above else model
    if any(part.startswith("lora_") for part in name.split(".")) or last == "base_layer":
        return ADAPTER
    if isinstance(parent, nn.MultiheadAttention):
        return NOT_CALLED
    if hasattr(parent, "A_log") and last in _READ_BY_MAMBA:
        return NOT_CALLED
    return ROUTER if _is_router(last, above, named[name], parent) else None


def _is_router(last: str, above: str, module: nn.Module, parent: nn.Module) -> bool:
    if any("router" in part for part in above.split(".")):
        return True
    experts = [child for name, child in parent.named_children() if "expert" in name]
    if not experts:
        return False
    counts = [len(group) for group in experts if isinstance(group, (nn.ModuleList, nn.ModuleDict))]
    return bool(_ROUTER.fullmatch(last)) or getattr(module, "out_features", None) in counts


def _heads(
    linear: Mapping[str, nn.Module], named: Mapping[str, nn.Module], model: nn.Module
) -> set[str]:
    """Heads as a model declares or names them, or else the layer that comes last."""
    declared = [_declared(module) for module in (model, *named.values())]
    heads = {name for name, child in linear.items() if any(child is head for head in declared)}
    for name, module in named.items():
        if _has_head_name(name):
            several = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            roots = [f"{name}.{key}" for key, _ in module.named_children()] if several else [name]
            heads |= {last for root in roots if (last := _last_inside(root, linear))}
    if heads:
        return heads
    firsts: dict[int, str] = {}
    for name, child in named.items():
        firsts.setdefault(id(child), name)
    leaves = [
        name
        for name, child in named.items()
        if firsts[id(child)] == name
        and (name in linear or next(child.parameters(recurse=False), None) is not None)
    ]
    return {child for child in leaves[-1:] if child in linear and not _is_repeated(child, named)}


def _declared(module: nn.Module) -> nn.Module | None:
    """The head that a model of transformers names."""
    declare = getattr(module, "get_output_embeddings", None)
    try:
        head = declare() if callable(declare) else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _has_head_name(name: str) -> bool:
    """Whether a module outside of repeated blocks is called a head."""
    *above, last = name.split(".")
    return bool(_HEAD.fullmatch(last)) and not any(part.isdigit() for part in above)


def _last_inside(root: str, linear: Mapping[str, nn.Module]) -> str | None:
    inside = [name for name in linear if name == root or name.startswith(root + ".")]
    return inside[-1] if inside else None


def _is_repeated(name: str, named: Mapping[str, nn.Module]) -> bool:
    """Whether a layer is part of one of several like blocks."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        above, block = ".".join(parts[: depth - 1]), named[".".join(parts[:depth])]
        beside = [sibling for _, sibling in named[above].named_children()] if above else []
        if isinstance(named.get(above), (nn.ModuleList, nn.Sequential)) and any(
            type(sibling) is type(block) for sibling in beside if sibling is not block
        ):
            return True
    return False
