"""One leaf of a value: what is known of it without its numbers."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._text import short
from esper_fn.checkpoint._json import corrupt_if_malformed
from esper_fn.errors import CheckpointError, CorruptCheckpointError

MAX_RANK = 32
MAX_INT_BITS = 13_000
MAX_INT_DIGITS = 4_000
MAX_LEAF_BYTES = 2**50
KEYS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
"""Implementations of random keys, and how many numbers each is."""


class Leaf(NamedTuple):
    """What is known of one leaf without its numbers."""

    path: str
    """Keys and fields from the root, joined by `/`."""
    dtype: str
    """A dtype's name, or that of a Python type for a `scalar`."""
    shape: tuple[int, ...]
    key: str | None = None
    """Implementation of a typed random key; dtype and shape are of its data then."""
    scalar: Any = None
    """The value itself, of a Python number or string (floats as `float.hex`)."""
    sha256: str | None = None
    """Of the array's bytes, once they were read; None for a scalar."""

    @property
    def num_bytes(self) -> int:
        """Of the array; 0 for a scalar."""
        return 0 if self.is_scalar else math.prod(self.shape) * storage(self.dtype).itemsize

    @property
    def is_scalar(self) -> bool:
        """Whether the manifest has its value, so that it needs no array."""
        return self.dtype in _SCALARS


_SCALARS = ("bool()", "int()", "float()", "str()")


def storage(dtype: str) -> np.dtype[Any]:
    """The dtype an array is stored in: its own, or unsigned integers of its width.

    Bits are what is kept: bfloat16 and the 8-bit floats travel as integers, so nothing between
    here and the disk can cast them.

    Raises:
      CorruptCheckpointError: no dtype of JAX's.
    """
    if dtype in _PLAIN:
        return np.dtype(dtype)
    if dtype in _AS_INTEGERS:
        return np.dtype(_AS_INTEGERS[dtype])
    raise CorruptCheckpointError(f"dtype {dtype!r} is none that a checkpoint may hold")


WHOLE_DTYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"bool"}
_PLAIN = WHOLE_DTYPES | {"float16", "float32", "float64", "complex64", "complex128"}
_EIGHT_BITS = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("int4", "uint4"),
)
_AS_INTEGERS = {"bfloat16": "uint16"} | dict.fromkeys(_EIGHT_BITS, "uint8")


def leaf_of(node: Any, path: str) -> tuple[Leaf | None, Any]:
    """Describes a leaf.

    Args:
      node: a node of a value.
      path: of the node.

    Returns:
      The leaf and its array (None for a Python number or string); `(None, None)` where the node is
      neither an array nor a number nor a string.

    Raises:
      CheckpointError: an array or a number that cannot be stored.
    """
    if isinstance(node, bool | int | float | str) and not isinstance(node, np.generic):
        return _scalar(node, path), None
    if not isinstance(node, jax.Array | np.ndarray | np.generic):
        return None, None
    if isinstance(node, np.ma.MaskedArray):
        raise CheckpointError(
            f"{path}: a masked array would lose its mask; save `.data` and `.mask`"
        )
    key = None
    if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        key = str(jax.random.key_impl(node))
        if key not in KEYS:
            raise CheckpointError(
                f"{path}: random keys of {key!r} cannot be made again, only those of "
                f"{list(KEYS)}; save `jax.random.key_data(...)`"
            )
        node = jax.random.key_data(node)
    if isinstance(node, jax.Array) and not node.is_fully_addressable:
        raise CheckpointError(
            f"{path}: the array spans several processes; checkpoints are written by one: gather "
            "it first (`jax.experimental.multihost_utils.process_allgather`)"
        )
    name = _name(node.dtype)
    if name not in _PLAIN and name not in _AS_INTEGERS:
        raise CheckpointError(f"{path}: arrays of dtype {name} cannot be stored")
    if len(node.shape) > MAX_RANK:
        raise CheckpointError(
            f"{path}: an array of rank {len(node.shape)}, at most {MAX_RANK} can be stored; "
            "reshape it"
        )
    return Leaf(path=path, dtype=name, shape=tuple(node.shape), key=key), node


def _scalar(node: Any, path: str) -> Leaf:
    name = f"{type(node).__name__}()"
    if name not in _SCALARS:
        raise CheckpointError(f"{path}: {type(node)!r} is no plain Python number or string")
    if isinstance(node, int) and node.bit_length() > MAX_INT_BITS:
        raise CheckpointError(
            f"{path}: an int of {node.bit_length()} bits, at most {MAX_INT_BITS} are read "
            "back; save it as a string, `hex(...)`"
        )
    value = node
    if name in ("float()", "int()"):
        value = node.hex() if name == "float()" else str(node)
    return Leaf(path=path, dtype=name, shape=(), scalar=value)


@lru_cache(maxsize=256)
def _name(dtype: Any) -> str:
    return str(dtype)  # slow in NumPy, and needed for every leaf of every save


def leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    """The leaf as a row of the manifest."""
    row = leaf._asdict() | {"shape": list(leaf.shape)}
    if leaf.key is None:
        del row["key"]
    if not leaf.is_scalar:
        del row["scalar"]
    return row


def leaf_from_json(row: Any) -> Leaf:
    """The reverse of `leaf_to_json`; raises `CorruptCheckpointError`."""
    with corrupt_if_malformed(f"a leaf is {short(row)}"):
        leaf = Leaf(**row)
        path, dtype, shape, key = leaf[:4]
        if not isinstance(path, str) or not isinstance(dtype, str) or not isinstance(shape, list):
            raise ValueError("it has another form")
        if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
            raise ValueError("no array has this shape")
        if key is not None and (dtype != "uint32" or shape[-1:] != [KEYS[key]]):
            raise ValueError("they are no random keys")
        if leaf.is_scalar:
            scalar_value(leaf)
        elif leaf.num_bytes > MAX_LEAF_BYTES:
            raise ValueError(f"an array of {leaf.num_bytes} bytes is impossible")
        return leaf._replace(shape=tuple(shape))


def scalar_value(leaf: Leaf) -> Any:
    """The Python number or string of a scalar leaf; raises `CorruptCheckpointError`."""
    kind, value = leaf.dtype, leaf.scalar
    with suppress(ValueError, OverflowError):
        if kind == "float()" and isinstance(value, str) and len(value) < 64:
            return float.fromhex(value)
        if kind == "int()" and isinstance(value, str) and len(value) < MAX_INT_DIGITS:
            return int(value)
    if isinstance(value, {"bool()": bool, "str()": str}.get(kind, ())):
        return value
    raise CorruptCheckpointError(f"{leaf.path}: {short(value)} is no {kind[:-2]}")


def value_of(leaf: Leaf, array: Any) -> Any:
    """The leaf as the caller had it: a number or string, a typed random key, or the array itself.

    Raises:
      CorruptCheckpointError: no such random key.
    """
    if leaf.is_scalar:
        return scalar_value(leaf)
    if leaf.key is None:
        return array
    with corrupt_if_malformed(f"{leaf.path}: no random key"):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf.key)
