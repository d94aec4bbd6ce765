"""Blueprint factories by name, for command lines and configuration files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esper_fn.base import Blueprint
from esper_fn.blueprints import _dense, _spatial
from esper_fn.errors import UnknownNameError

Factory = Callable[..., Blueprint]

_FACTORIES: dict[str, Factory] = {
    "noop": _dense.noop,
    "scale_shift": _dense.scale_shift,
    "low_rank": _dense.low_rank,
    "bottleneck": _dense.bottleneck,
    "gated": _dense.gated,
    "normalised": _dense.normalised,
    "squeeze_excite": _spatial.squeeze_excite,
    "depthwise_conv": _spatial.depthwise_conv,
    "bottleneck_conv": _spatial.bottleneck_conv,
    "self_attention": _spatial.self_attention,
}


def names() -> tuple[str, ...]:
    """The registered names, in order of registration."""
    return tuple(_FACTORIES)


def get(name: str, **sizes: Any) -> Blueprint:
    """The blueprint that the factory registered as `name` makes from `sizes`.

    Raises:
      UnknownNameError: nothing is registered under that name.

    >>> get("low_rank", rank=2).name
    'low_rank'
    """
    if name not in _FACTORIES:
        raise UnknownNameError("blueprint", name, names(), "register your own with `register`")
    return _FACTORIES[name](**sizes)


def register(name: str, factory: Factory) -> None:
    """Gives a factory a name.

    Raises:
      ValueError: the name is taken by another factory.
    """
    if _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"blueprint {name!r} is registered already; choose another name")
    _FACTORIES[name] = factory
