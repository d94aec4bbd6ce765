"""What a message says of an argument that is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeGuard


def describe(value: object) -> str:
    """A value's kind, short: `a list`, or `the function plateau, not called`.

    >>> describe([1]), describe(describe)
    ('a list', 'the function describe, not called')
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
        raise TypeError(f"key must be a random key, `jax.random.key(0)` say, got {describe(key)}")


def check_kind(argument: str, value: object, kind: Any, remedy: str) -> None:
    """Raises `TypeError` unless `value` is a `kind`, naming what came and the remedy."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{argument} must be {article} {kind.__name__}, got {describe(value)}; {remedy}"
        )


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an int of at least `least`, and no bool.

    >>> is_count(1), is_count(0), is_count(True)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_numbers(**values: object) -> None:
    """Raises `TypeError` for an argument that is no number; arrays without axes are numbers."""
    for argument, value in values.items():
        if not _is_number(value):
            raise TypeError(f"{argument} must be a number, got {describe(value)}{_bare(value)}")


def check_counts(**values: object) -> None:
    """Raises `TypeError` for an argument that is no number, `ValueError` for NaN or infinity."""
    for argument, value in values.items():
        if not _is_number(value):
            raise TypeError(
                f"{argument} must be a whole number, got {describe(value)}{_bare(value)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{argument} must be a whole number, got {value!r}")


def check_function(argument: str, value: object, call: str) -> None:
    """Raises `TypeError` unless a value can be called."""
    if not callable(value):
        raise TypeError(
            f"{argument} must be a function, called as `{call}`, got {describe(value)}; pass the "
            "function itself, not what it returns"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (hasattr(value, "dtype") and getattr(value, "shape", 0) == ())


def _bare(value: object) -> str:
    """The remedy for a number in quotes."""
    return "; write it without quotes" if isinstance(value, str | bytes) else ""
