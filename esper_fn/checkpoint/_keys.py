"""Keys of dictionaries as JSON, and back with their types: numbers, enums, tuples, strings."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from esper_fn._records import enum_type, name_of, qualified
from esper_fn._text import short
from esper_fn.checkpoint._json import corrupt_if_malformed
from esper_fn.checkpoint._leaf import MAX_INT_BITS, MAX_INT_DIGITS, WHOLE_DTYPES
from esper_fn.errors import CheckpointError, CorruptCheckpointError

MAX_TUPLE_DEPTH = 8
_NUMPY = WHOLE_DTYPES | {"float16", "float32", "float64"}


def key_to_json(key: Any, path: str, depth: int = 0) -> Any:
    """Turns a key into JSON: a string stays, any other key becomes `{type: value}`.

    Args:
      key: of a dictionary.
      path: of the dictionary, for messages.
      depth: of tuples around the key.

    Raises:
      CheckpointError: a key of a type that cannot be stored.
    """
    kind = type(key)
    if isinstance(key, enum.Enum):
        members = [member.name for member in key] if isinstance(key, enum.Flag) else [key.name]
        return {"enum": [name_of(kind) or qualified(kind), *members]}
    if isinstance(key, np.generic) and str(key.dtype) in _NUMPY:
        value = key.item()
        return {"numpy": [str(key.dtype), value.hex() if isinstance(value, float) else str(value)]}
    if isinstance(key, str):
        return str(key)
    if key is None or kind is bool:
        return {"constant": key}
    if kind is int and key.bit_length() <= MAX_INT_BITS:
        return {"int": str(key)}
    if kind in (float, bytes):
        return {kind.__name__: key.hex()}
    if kind is tuple and depth < MAX_TUPLE_DEPTH:
        return {"tuple": [key_to_json(part, path, depth + 1) for part in key]}
    raise CheckpointError(
        f"{path or 'the value'}: the dictionary key {short(key)} is a {qualified(kind)}; "
        "a key may be a string, int, bool, float, None, bytes, NumPy number, enum member, or a "
        "tuple of these: convert it"
    )


def label(row: Any) -> str:
    """Names a key in paths: `5` for the int, the member's name for an enum."""
    if isinstance(row, str):
        return row
    ((kind, value),) = row.items()
    if kind == "float":
        return repr(float.fromhex(value))
    if kind == "enum":
        return "|".join(value[1:])
    if kind == "tuple":
        return f"({','.join(map(label, value))})"
    return str(value[1]) if kind == "numpy" else str(value)


def keys_from_json(rows: list[Any], like: Any = None) -> list[Any]:
    """Turns the JSON of keys back into keys.

    Args:
      rows: from `key_to_json`, by way of a file.
      like: a dictionary whose keys tell enums that are not registered.

    Raises:
      CorruptCheckpointError: no keys, or two that are equal.
      CheckpointError: an enum that is neither registered nor among the keys of `like`.
    """
    kinds = {qualified(kind): kind for kind in _enums(like if isinstance(like, dict) else ())}
    with corrupt_if_malformed(f"keys of a node are {short(rows)}"):
        keys = [_from_json(row, kinds, 0) for row in rows]
    if len(dict.fromkeys(keys)) != len(keys):
        raise CorruptCheckpointError(f"two keys of a node are equal: {short(rows)}")
    return keys


def _enums(keys: Iterable[Any]) -> Iterable[type[Any]]:
    for key in keys:
        if isinstance(key, enum.Enum):
            yield type(key)
        elif type(key) is tuple:
            yield from _enums(key)


def _from_json(row: Any, kinds: dict[str, type[Any]], depth: int) -> Any:
    if isinstance(row, str):
        return row
    if depth > MAX_TUPLE_DEPTH:
        raise ValueError("nested too deeply")
    ((kind, value),) = row.items()
    if kind == "constant" and (value is None or type(value) is bool):
        return value
    if kind == "int" and isinstance(value, str) and len(value) < MAX_INT_DIGITS:
        return int(value)
    if kind == "tuple" and isinstance(value, list):
        return tuple(_from_json(part, kinds, depth + 1) for part in value)
    if kind == "numpy":
        return _number(*value)
    if kind == "enum":
        return _member(kinds, *value)
    return {"float": float.fromhex, "bytes": bytes.fromhex}[kind](value)


def _number(dtype: str, text: str) -> Any:
    if dtype not in _NUMPY:
        raise ValueError(dtype)
    if dtype == "bool":
        return {"True": np.True_, "False": np.False_}[text]
    value: Any = float.fromhex(text) if dtype.startswith("float") else int(text)
    return np.dtype(dtype).type(value)


def _member(kinds: dict[str, type[Any]], type_name: str, *members: str) -> Any:
    kind = enum_type(type_name) or kinds.get(type_name)
    if kind is None:
        raise CheckpointError(
            f"the checkpoint has dictionary keys of the enum {type_name!r}, which is not "
            "registered in this process: call `checkpoint.register(TYPE, NAME)`, or pass `like=` a "
            "value with such keys"
        )
    missing = [name for name in members if name not in kind.__members__]
    if missing:
        raise CheckpointError(
            f"the checkpoint has a key {type_name}.{missing[0]}; here it has only "
            f"{', '.join(kind.__members__)}: restore with the version that wrote it"
        )
    if issubclass(kind, enum.Flag):
        return reduce(or_, (kind[member] for member in members), kind(0))
    (only,) = members
    return kind[only]
