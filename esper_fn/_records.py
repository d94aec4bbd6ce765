"""The types that files may name: NamedTuples of states, and enums whose members are keys."""

from __future__ import annotations

import enum
from typing import Any, TypeVar

from esper_fn.errors import CheckpointError

Kind = TypeVar("Kind", bound=type[Any])

_BY_NAME: dict[str, type[Any]] = {}
_BY_TYPE: dict[type[Any], str] = {}


def is_named_tuple(kind: Any) -> bool:
    """Whether a type is a NamedTuple's."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def is_enum(kind: Any) -> bool:
    """Whether a type is an enum."""
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def qualified(kind: type[Any]) -> str:
    """`module.Name` of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def record(kind: Kind) -> Kind:
    """Lets a type of this package come back from a file, under its room's name and its own.

    A decorator: `esper_fn.policies._limits.BudgetState` is `esper_fn.policies.BudgetState` in a
    file.
    """
    rooms = [part for part in kind.__module__.split(".") if not part.startswith("_")]
    register(kind, ".".join([*rooms, kind.__name__.lstrip("_")]))
    return kind


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
    if not (is_named_tuple(kind) or is_enum(kind)):
        raise CheckpointError(f"register takes a NamedTuple type or an enum, got {kind!r}")
    name = qualified(kind) if name is None else name
    if _BY_NAME.get(name, kind) is not kind:
        raise CheckpointError(
            f"{name!r} is the name of {_BY_NAME[name]!r} already; give another `name`"
        )
    _BY_NAME[name] = kind
    _BY_TYPE[kind] = name


def name_of(kind: type[Any]) -> str | None:
    """What files call a type; None for a type that is not registered."""
    return _BY_TYPE.get(kind)


def named_tuple(name: str) -> type[Any] | None:
    """The NamedTuple type that files call `name`; None for no registered one."""
    kind = _BY_NAME.get(name)
    return kind if is_named_tuple(kind) else None


def enum_type(name: str) -> type[Any] | None:
    """The enum that files call `name`; None for no registered one."""
    kind = _BY_NAME.get(name)
    return kind if is_enum(kind) else None
