"""Checks before anything is written whether it can be saved and read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from esper_fn.checkpoint._folder import MAX_RECORD_BYTES
from esper_fn.checkpoint._json import dumps
from esper_fn.checkpoint._leaf import Leaf, leaf_from_json, leaf_to_json, scalar_value
from esper_fn.checkpoint._structure import build, describe
from esper_fn.errors import CheckpointError


def check(value: Any, *, record: Any = None, metrics: Mapping[str, float] | None = None) -> None:
    """Finds out before the first step whether `Writer.save` and `restore` can cope with a value.

    `fit` does so by itself; call it in a loop of your own. Nothing is written.

    Args:
      value: as for `Writer.save`.
      record: as there.
      metrics: as there.

    Raises:
      CheckpointError: they cannot; names the path of what is in the way, and the remedy.

    >>> check({1: 2.0, "layers": [{"weight": None}]})
    """
    structure, leaves, arrays = describe(value)
    again = [leaf_from_json(leaf_to_json(leaf)) for leaf in leaves]
    build(structure, [_as_read(*pair) for pair in zip(again, arrays, strict=True)], value)
    dumps(structure, is_checked=True)
    numbers_of(metrics or {})
    if record is not None:
        record_bytes(record)


def _as_read(leaf: Leaf, array: Any) -> Any:
    if leaf.is_scalar:
        return scalar_value(leaf)
    return array if leaf.key is None else jax.random.wrap_key_data(array, impl=leaf.key)


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones, as floats; raises `CheckpointError` for what is no number."""
    numbers = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise CheckpointError(f"metrics must have strings for names, got {name!r}")
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"metrics[{name!r}] must be a number, got {type(value).__name__}: {error}"
            ) from None
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def record_bytes(record: Any) -> bytes:
    """The record's file; raises `CheckpointError` for what would not be read back."""
    try:
        data = dumps(record, is_checked=True)
    except ValueError as error:
        raise CheckpointError(f"record: {error}") from None
    if len(data) > MAX_RECORD_BYTES:
        raise CheckpointError(
            f"record takes {len(data)} bytes, at most {MAX_RECORD_BYTES} are read back"
        )
    return data
