"""Reads and writes strict JSON, and checks each line of a run folder against a table.

Strict means that a number that is not finite is written as null, and is refused when read.
"""

from __future__ import annotations

import enum
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from esper_fn.report._words import ARMS, GROWING_ARMS, STAGES

MAX_LINE_BYTES: Final = 16 * 2**20
MAX_VALUES: Final = 1_000_000
"""In one piece of JSON that is read."""
_MAX_DEPTH: Final = 32


def plain(value: object, name: str = "value", depth: int = 0) -> Any:
    """Turns `value` into JSON: enums by name, arrays as lists, non-finite numbers as None.

    Raises:
      ValueError: `value` holds something that JSON has no form for, or nests too deeply.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name} nests deeper than {_MAX_DEPTH} levels; flatten it")
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return _plain_mapping(value, name, depth)
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    to_list = getattr(value, "tolist", None)  # numpy and JAX arrays and scalars
    if callable(to_list):
        return plain(to_list(), name, depth + 1)
    raise ValueError(
        f"{name} is a {type(value).__name__}, which JSON cannot hold; give None, a bool, a number,"
        " a string, an array, or lists and mappings of these"
    )


def _plain_mapping(value: Mapping[Any, object], name: str, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(key, enum.Enum):
            text = key.name
        elif isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
            text = str(key)
        else:
            raise ValueError(f"{name} has the key {key!r}; keys must be strings or integers")
        result[text] = plain(item, f"{name}[{text!r}]", depth + 1)
    return result


def loads(text: str | bytes) -> Any:
    """Parses strict JSON.

    Raises:
      ValueError: `text` is not JSON, or holds NaN, Infinity, or a number too large for a float.
    """
    data = text.encode() if isinstance(text, str) else text
    # Before it is parsed: an empty list takes 3 bytes here and 60 in memory.
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES} values; record fewer seeds a line")
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON; numbers that are not finite are written as null")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a float")
    return value


class Field(NamedTuple):
    """What one key of a line must hold."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_measured(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(item is None or isinstance(item, int | float) for item in value.values())
    )


_TEXT: Final = Field("a string", lambda v: isinstance(v, str))
_COUNT: Final = Field("an integer of 0 or more", _is_count)
_NUMBER: Final = Field("a number or null", _is_number)
_STAGE: Final = Field(f"one of {', '.join(STAGES)}", lambda v: isinstance(v, str) and v in STAGES)

EVENT: Final[Mapping[str, Field]] = {
    "arm": Field(f"one of {', '.join(GROWING_ARMS)}", lambda v: v in GROWING_ARMS),
    "step": _COUNT,
    "seed": _COUNT,
    "site": _TEXT,
    "chunk": _COUNT,
    "blueprint": Field("a string or null", lambda v: v is None or isinstance(v, str)),
    "from": _STAGE,
    "to": _STAGE,
    "cause": _TEXT,
    "measured": Field("a mapping of names to numbers or null", _is_measured),
}

METRICS: Final[Mapping[str, Field]] = {
    "arm": Field(f"one of {', '.join(ARMS)}", lambda v: v in ARMS),
    "step": _COUNT,
    "loss": _NUMBER,
    "test_accuracy": _NUMBER,
    "test_loss": _NUMBER,
    "parameters": Field("an integer of 0 or more, or null", lambda v: v is None or _is_count(v)),
    "stages": Field(
        "a mapping of stages to counts, or null",
        lambda v: (
            v is None
            or (isinstance(v, dict) and all(k in STAGES and _is_count(n) for k, n in v.items()))
        ),
    ),
    "alpha": Field(
        "a mapping of seeds to numbers, or null",
        lambda v: (
            v is None
            or (isinstance(v, dict) and all(k.isdecimal() and _is_number(a) for k, a in v.items()))
        ),
    ),
}


def check(record: Any, table: Mapping[str, Field]) -> dict[str, Any]:
    """Returns `record` when it holds what `table` requires; a missing key counts as null.

    Raises:
      ValueError: a key holds something else; the message names key, value and allowed set.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a mapping, got {type(record).__name__}")
    for key, field in table.items():
        if not field.accepts(record.get(key)):
            actual = repr(record[key])[:80] if key in record else "missing"
            raise ValueError(f"{key!r} is {actual}; it must be {field.allowed}")
    return record
