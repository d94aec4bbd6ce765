"""JSON as files of a checkpoint hold it: bounded, and with one meaning only."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 256


def dumps(value: Any, *, is_checked: bool = False) -> bytes:
    """Writes a value as one line of UTF-8.

    Args:
      value: of dicts, lists, tuples, strings, numbers, None.
      is_checked: refuse also what `loads` would not read back: too deep, or two keys that JSON
        cannot tell apart.

    Raises:
      ValueError: NaN, infinities, and what else JSON cannot say.
    """
    try:
        data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not expressible in JSON: {error}") from None
    if is_checked:
        _check_form(value)
    return data


def loads(data: bytes, *, max_bytes: int) -> Any:
    """Parses strictly.

    Raises:
      ValueError: more than `max_bytes`, deeper than `MAX_DEPTH`, a key given twice, a number that
        is not finite, bytes that are not UTF-8, or no JSON at all.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes, at most {max_bytes} are read")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check_form(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise ValueError("a key is given twice")
    return items


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _check_form(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _check_keys(node)
                inner.extend(node.values())
            elif isinstance(node, list | tuple):
                inner.extend(node)
        level, depth = inner, depth + 1


def _check_keys(node: dict[Any, Any]) -> None:
    if all(type(key) is str for key in node):
        return
    texts = {key if isinstance(key, str) else json.dumps(key) for key in node}
    if len(texts) != len(node):
        raise ValueError(f"two of the keys {list(node)[:20]!r} are one in JSON")
