"""JSON as files of a checkpoint hold it: bounded, and with one meaning only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from esper_fn.errors import CheckpointError, CorruptCheckpointError

MAX_DEPTH = 256


def dumps(value: Any) -> bytes:
    """Writes a value, of dicts, lists, tuples, strings, numbers and None, as one line of UTF-8.

    Raises:
      ValueError: NaN, infinities, what else JSON cannot say, and what `loads` would not read back:
        too deep, or two keys that JSON cannot tell apart.
    """
    try:
        data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not expressible in JSON: {error}") from None
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
            parse_constant=_finite,
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


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _check_form(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                texts = {key if isinstance(key, str) else json.dumps(key) for key in node}
                if len(texts) != len(node):
                    raise ValueError(f"two of the keys {list(node)[:20]!r} are one in JSON")
                inner.extend(node.values())
            elif isinstance(node, list | tuple):
                inner.extend(node)
        level, depth = inner, depth + 1


@contextmanager
def corrupt_if_malformed(problem: str) -> Iterator[None]:
    """Turns what Python raises at content of another form into a `CorruptCheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{problem}: {error}") from None
