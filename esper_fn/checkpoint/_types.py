"""The closed set of NamedTuples and enums that a checkpoint may be made of.

A file names the type of a node; the name is looked up here and nowhere else. Nothing is imported,
called or found by a name that stands in a file.
"""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

import optax
import optax.contrib
import optax.transforms

from esper_fn import optim, rollback
from esper_fn._growth import GrowthState
from esper_fn._layout import _directions
from esper_fn.errors import CheckpointError
from esper_fn.governors import _standard
from esper_fn.grafting import _schedules
from esper_fn.lifecycle import LossTrack, SeedState, Settings, Stage
from esper_fn.lifecycle._state import Telemetry
from esper_fn.policies import _grow, _limits, _rules

_BY_NAME: dict[str, type[Any]] = {}
_BY_TYPE: dict[type[Any], str] = {}


def is_named_tuple(kind: type[Any]) -> bool:
    """Whether a type is a NamedTuple's."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def qualified(kind: type[Any]) -> str:
    """`module.Name` of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def register(kind: type[Any], name: str | None = None) -> None:
    """Lets a NamedTuple type of yours, or an enum whose members are keys, come back from a file.

    Call it where the type is defined, before restoring. Types of Esper-fn and Optax are known.

    Args:
      kind: a NamedTuple or enum type.
      name: what files call it, for good; `module.Name` when left out.

    Raises:
      CheckpointError: no such type, or a name that another type has.

    >>> from typing import Any, NamedTuple
    >>> class Mine(NamedTuple):
    ...     count: Any
    >>> register(Mine, "mine.Mine")
    """
    if not (is_named_tuple(kind) or _is_enum(kind)):
        raise CheckpointError(f"register takes a NamedTuple type or an enum, got {kind!r}")
    called = qualified(kind) if name is None else name
    if _BY_NAME.get(called, kind) is not kind:
        raise CheckpointError(
            f"{called!r} is the name of {_BY_NAME[called]!r} already; give another `name`"
        )
    _BY_NAME[called] = kind
    _BY_TYPE[kind] = called


def name_of(kind: type[Any]) -> str | None:
    """What files call a type; None for a type that was not registered."""
    return _BY_TYPE.get(kind)


def type_of(name: str) -> type[Any] | None:
    """The NamedTuple type that files call `name`; None for no registered one."""
    kind = _BY_NAME.get(name)
    return None if kind is None or _is_enum(kind) else kind


def enum_of(name: str) -> type[Any] | None:
    """The enum that files call `name`; None for no registered one."""
    kind = _BY_NAME.get(name)
    return kind if kind is not None and _is_enum(kind) else None


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _register_all(module: ModuleType, prefix: str) -> None:
    for name, kind in sorted(vars(module).items()):
        if is_named_tuple(kind) and name == kind.__name__ and kind not in _BY_TYPE:
            register(kind, f"{prefix}.{name}")


for _kind in (GrowthState, SeedState, Telemetry, LossTrack, Settings, Stage, optim.PerAdapterState):
    register(_kind, f"esper_fn.{_kind.__name__}")
register(rollback.Ring, "esper_fn.rollback.Ring")
register(rollback.Snapshot, "esper_fn.rollback.Snapshot")
for _module, _prefix in (
    (_directions, "esper_fn.telemetry"),
    (_schedules, "esper_fn.grafting"),
    (_rules, "esper_fn.policies"),
    (_grow, "esper_fn.policies"),
    (_limits, "esper_fn.policies"),
    (_standard, "esper_fn.governors"),
    (optax, "optax"),
    (optax.transforms, "optax.transforms"),
    (optax.contrib, "optax.contrib"),
):
    _register_all(_module, _prefix)
