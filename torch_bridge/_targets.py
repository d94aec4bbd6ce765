"""Which modules of a model get seeds, and what their outputs look like."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from torch_bridge import _linear
from torch_bridge._errors import BridgeError

Target: TypeAlias = str | type | Callable[[str, nn.Module], bool]
Targets: TypeAlias = Target | Sequence[Target]

ALL_LINEAR = "all-linear"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WIDTHS: list[tuple[Any, int, str]] = [
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1, "out_channels"),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1, "out_channels"),
    ((_BatchNorm, _InstanceNorm), 1, "num_features"),
    (nn.GroupNorm, 1, "num_channels"),
    ((nn.Embedding, nn.EmbeddingBag), -1, "embedding_dim"),
    (nn.MultiheadAttention, -1, "embed_dim"),
    ((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), -1, "linear2.out_features"),
]
"""The feature axis of a layer's output, and what has its width."""
_REGEX = re.compile(r"[\\^$*+?{}\[\]|()]")


class Match(NamedTuple):
    """One target."""

    name: str
    module: nn.Module
    features: int
    axis: int
    """The feature axis of its output: -1, or 1 as convolutions have it."""


def blocks(name: str) -> str:
    r"""The pattern of every child of the list `name`: one target a block.

    >>> print(blocks("h"))
    (.*\.)?h\.\d+
    """
    return rf"(.*\.)?{re.escape(name)}\.\d+"


def find(
    model: nn.Module,
    targets: Targets,
    features: Mapping[str, int] | None = None,
    exclude: Targets = (),
) -> tuple[list[Match], dict[str, str]]:
    """The modules that `targets` name and `exclude` does not, in the model's own order.

    Returns:
      The targets, and what `all-linear` left out, with the reason.

    Raises:
      BridgeError: a target matches nothing, or something that cannot carry seeds.
    """
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    patterns = _several(targets)
    if not patterns:
        raise BridgeError("targets is empty; name modules, or take 'all-linear'")
    for target in patterns:
        matching = {n: module for n, module in named.items() if _matches(target, n, module)}
        if not matching:
            raise BridgeError(_nothing("targets", target, named))
        if target == ALL_LINEAR:
            skipped = _linear.left_out(named, model)
            matching = {n: module for n, module in matching.items() if n not in skipped}
        chosen |= matching
    for target in _several(exclude):
        if not any(_matches(target, n, module) for n, module in named.items()):
            raise BridgeError(_nothing("exclude", target, named))
        chosen = {n: module for n, module in chosen.items() if not _is_under(target, n, named)}
    if not chosen:
        raise BridgeError(
            f"targets={targets!r} leaves nothing to grow: exclude={exclude!r}, and 'all-linear' "
            f"leaves out {skipped}; name at least one module in targets"
        )
    skipped = {name: reason for name, reason in skipped.items() if name not in chosen}
    modules = {name: module for name, module in named.items() if name in chosen}
    widths = by_pattern(features or {}, modules, "features", None)
    matches = [
        _match(*target, width) for target, width in zip(modules.items(), widths, strict=True)
    ]
    _check_shared(named, matches)
    return matches, skipped


def _several(targets: Targets) -> list[Any]:
    several = isinstance(targets, Sequence) and not isinstance(targets, str)
    return list(targets) if several else [targets]  # type: ignore[arg-type]


def _is_under(target: Any, name: str, named: Mapping[str, nn.Module]) -> bool:
    """Whether a pattern matches a module or one that it is inside of."""
    parts = name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(_matches(target, parent, named[parent]) for parent in above)


def by_pattern(
    values: Any,
    modules: Mapping[str, nn.Module],
    argument: str,
    default: Any,
) -> list[Any]:
    """One value a target, from a value for all or a mapping of patterns (the first match counts).

    Raises:
      BridgeError: a pattern that matches no target.
    """
    if not isinstance(values, Mapping):
        return [values] * len(modules)
    for pattern in values:
        if not any(_matches(pattern, name, module) for name, module in modules.items()):
            raise BridgeError(
                f"{argument} names {pattern!r}, which matches no target; targets are "
                f"{_some(modules)}"
            )
    return [
        next((value for p, value in values.items() if _matches(p, name, module)), default)
        for name, module in modules.items()
    ]


def _matches(target: Any, name: str, module: nn.Module) -> bool:
    if isinstance(target, type):
        return isinstance(module, target)
    if callable(target):
        return bool(target(name, module))
    if not isinstance(target, str):
        raise BridgeError(
            f"a target must be a name, a regular expression, a module class or a function of "
            f"(name, module), got {target!r}"
        )
    if target == ALL_LINEAR:
        return _linear.is_linear(module)
    if name == target or name.endswith("." + target):
        return True
    return bool(_REGEX.search(target)) and re.fullmatch(target, name) is not None


def _nothing(argument: str, target: Any, named: Mapping[str, nn.Module]) -> str:
    near: list[str] = []
    if isinstance(target, str):
        tails = {name.rsplit(".", 1)[-1] for name in named}
        near = difflib.get_close_matches(target, [*named, *tails], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"{argument}={target!r} matches none of the model's {len(named)} modules{hint} "
        f"(a name, the end of one, a regular expression for a whole name, 'all-linear', a module "
        f"class or a function; the modules are {_some(named)})"
    )


def _some(names: Any, most: int = 12) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f", and {len(every) - most} more" if every[most:] else "")


def _match(name: str, module: nn.Module, chosen: int | None) -> Match:
    if isinstance(module, _CONTAINERS):
        remedy = "a layer inside it" if list(module.children()) else "another module"
        raise BridgeError(
            f"target {name!r} is a {type(module).__name__}: seeds added to it would run as one of "
            f"its layers; name {remedy} instead, e.g. its last one ({name}.{len(module) - 1})"
        )
    if "seeds" in dict(module.named_children()) or hasattr(module, "seeds"):
        raise BridgeError(
            f"target {name!r} has an attribute `seeds` already: the model was grown before "
            "(call bridge.unwrap() first), or the name is taken"
        )
    known = _known(module)
    if known is not None:
        width, axis = known
        if chosen is not None and chosen != width:
            raise BridgeError(
                f"features says {chosen} for target {name!r}, a {type(module).__name__} whose "
                f"output has {width}"
            )
        return Match(name, module, width, axis)
    if chosen is None:
        raise BridgeError(
            f"target {name!r} ({type(module).__name__}): the width of its output is not known from "
            f"its class; say features={{{name!r}: WIDTH}} for the last axis of its output (or of "
            "the first one, if it returns a tuple)"
        )
    return Match(name, module, int(chosen), -1)


def _known(module: nn.Module) -> tuple[int, int] | None:
    """Features and feature axis of a layer's output."""
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (1 + module.bidirectional), -1
    for kinds, axis, attribute in _WIDTHS:
        if isinstance(module, kinds):
            return int(operator.attrgetter(attribute)(module)), axis
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return int(module.normalized_shape[-1]), -1
    if _linear.is_transposed_linear(module):
        return int(module.nf), -1
    width = getattr(module, "out_features", None)
    return (width, -1) if isinstance(width, int) and _linear.is_linear(module) else None


def _check_shared(named: Mapping[str, nn.Module], matches: Sequence[Match]) -> None:
    for match in matches:
        names = [name for name, module in named.items() if module is match.module]
        if len(names) > 1:
            raise BridgeError(
                f"target {match.name!r} is one module under {len(names)} names ({_some(names)}): "
                "its seeds would serve several places at once; give each its own module, or leave "
                "it out of targets"
            )
