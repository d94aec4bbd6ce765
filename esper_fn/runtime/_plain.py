"""Settings and notes as JSON, with what it cannot say: infinities, NaN, keys of other types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from esper_fn.errors import CheckpointError

_MAX_DEPTH = 100


def encoded(value: Any, path: str, depth: int = 0) -> Any:
    """Plain JSON of a value; tuples and arrays become lists.

    Raises:
      CheckpointError: anything that neither JSON nor this can say; names its path.
    """
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{path[:200]}: nested deeper than {_MAX_DEPTH}")
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = _numbers(value, path)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if isinstance(value, Mapping):
        return _encoded_items(value, path, depth)
    if isinstance(value, list | tuple):
        return [encoded(one, f"{path}/{at}", depth + 1) for at, one in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"{path}: a {type(value).__name__} ({_short(value)}) cannot be saved; give a number, a "
        "string, a list or a dict of such, `str(...)` of it say"
    )


def _encoded_items(of: Mapping[Any, Any], path: str, depth: int) -> Any:
    items = [(key, encoded(inner, f"{path}/{key}", depth + 2)) for key, inner in of.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {"$items": [[encoded(key, f"{path}/{key}", depth + 2), one] for key, one in items]}


def _numbers(value: Any, path: str) -> Any:
    try:
        return np.asarray(value).tolist()
    except (TypeError, ValueError, RuntimeError) as error:  # a random key, or spread over processes
        raise CheckpointError(f"{path}: an array without numbers of its own: {error}") from None


def decoded(value: Any) -> Any:
    """The reverse of `encoded`, of what a file says."""
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return float(value["$float"])
        if value.keys() == {"$items"}:
            return {_key(decoded(key)): decoded(one) for key, one in value["$items"]}
        return {name: decoded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [decoded(inner) for inner in value]
    return value


def _key(key: Any) -> Any:
    return tuple(map(_key, key)) if isinstance(key, list) else key


def is_alike(one: Any, two: Any) -> bool:
    """Whether two settings are one: NaN is NaN, and keys are what JSON makes of them."""
    if isinstance(one, dict) and isinstance(two, dict):
        first, second = ({_name(key): inner for key, inner in of.items()} for of in (one, two))
        return first.keys() == second.keys() and all(is_alike(first[k], second[k]) for k in first)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(is_alike, one, two))
    return bool(one == two or (one != one and two != two))  # noqa: PLR0124 -- NaN


def _name(key: Any) -> str:
    return {True: "true", False: "false", None: "null"}[key] if _is_constant(key) else str(key)


def _is_constant(key: Any) -> bool:
    return key is None or isinstance(key, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
