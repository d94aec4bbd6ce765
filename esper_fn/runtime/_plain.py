"""Settings and notes as JSON, with infinities, NaN and keys of any type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from esper_fn._text import short
from esper_fn.errors import CheckpointError

_MAX_DEPTH = 100


def encoded(value: Any, path: str, depth: int = 0) -> Any:
    """Turns a value into plain JSON; tuples and arrays become lists.

    Args:
      value: numbers, strings, arrays, and lists, tuples and dictionaries of such.
      path: of the value, for messages.
      depth: of what is around it.

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
        return [encoded(item, f"{path}/{index}", depth + 1) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"{path}: a {type(value).__name__} ({short(value)}) cannot be saved; give a number, a "
        "string, a list or a dict of such, `str(...)` of it say"
    )


def _encoded_items(value: Mapping[Any, Any], path: str, depth: int) -> Any:
    items = [(key, encoded(inner, f"{path}/{key}", depth + 2)) for key, inner in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {"$items": [[encoded(key, f"{path}/{key}", depth + 2), inner] for key, inner in items]}


def _numbers(value: Any, path: str) -> Any:
    try:
        return np.asarray(value).tolist()
    except (TypeError, ValueError, RuntimeError) as error:  # a random key, or spread over processes
        raise CheckpointError(f"{path}: an array without numbers of its own: {error}") from None


def decoded(value: Any) -> Any:
    """Turns what a file says back into a value; the reverse of `encoded`."""
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return float(value["$float"])
        if value.keys() == {"$items"}:
            return {_key(decoded(key)): decoded(inner) for key, inner in value["$items"]}
        return {name: decoded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [decoded(inner) for inner in value]
    return value


def _key(key: Any) -> Any:
    return tuple(map(_key, key)) if isinstance(key, list) else key


def is_alike(first: Any, second: Any) -> bool:
    """Whether two decoded values are equal, NaN being equal to NaN."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(is_alike(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(is_alike, first, second))
    return bool(first == second or (first != first and second != second))  # noqa: PLR0124 -- NaN
