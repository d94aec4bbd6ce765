"""What a message says of an argument that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def described(value: object) -> str:
    """A value's kind, short: `a list`, or `the function plateau, not called`.

    >>> described([1]), described(described)
    ('a list', 'the function described, not called')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}, not called"
    if isinstance(value, Callable) and hasattr(value, "__name__"):  # type: ignore[arg-type]
        return f"the function {value.__name__}, not called"
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def check_key(key: object) -> None:
    """Raises `TypeError` unless `key` may be a random key."""
    if not (hasattr(key, "dtype") and hasattr(key, "shape")):
        raise TypeError(f"key must be a random key, `jax.random.key(0)` say, got {described(key)}")


def check_kind(argument: str, value: object, kind: Any, remedy: str) -> None:
    """Raises `TypeError` unless `value` is a `kind`, naming what came and the remedy."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{argument} must be {article} {kind.__name__}, got {described(value)}; {remedy}"
        )
