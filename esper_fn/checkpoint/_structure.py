"""A pytree as plain JSON and a list of arrays, and back, without a template."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import default_registry

from esper_fn.checkpoint._keys import key_to_json, keys_from_json, label
from esper_fn.checkpoint._types import is_named_tuple, name_of, qualified, type_of
from esper_fn.errors import CheckpointError, CorruptCheckpointError

MAX_LEAVES = 1_000_000
MAX_RANK = 32
MAX_DEPTH = 100
MAX_INT_BITS = 13_000
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

    @property
    def num_bytes(self) -> int:
        """Of the array; 0 for a scalar."""
        if self.is_scalar:
            return 0
        return math.prod(self.shape) * storage(self.dtype).itemsize

    @property
    def is_scalar(self) -> bool:
        """Whether it is kept in the structure, without an array."""
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


_PLAIN = frozenset(
    f"{kind}{bits}"
    for kind, widths in (
        ("int", (8, 16, 32, 64)),
        ("uint", (8, 16, 32, 64)),
        ("float", (16, 32, 64)),
        ("complex", (64, 128)),
    )
    for bits in widths
) | {"bool"}
_AS_INTEGERS = {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "float8_e4m3b11fnuz": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2fnuz": "uint8",
    "int4": "uint8",
    "uint4": "uint8",
}


def describe(value: Any) -> tuple[Any, list[Leaf], list[Any]]:
    """The structure as JSON, its leaves, and their values where they are arrays (None else).

    Raises:
      CheckpointError: a leaf or a key that cannot be stored; names its path.
    """
    leaves: list[Leaf] = []
    arrays: list[Any] = []

    def many(children: Any, path: str, depth: int) -> list[Any]:
        return [
            one(child, f"{path}/{name}" if path else str(name), depth + 1)
            for name, child in children
        ]

    def one(node: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path[:200]}: nested deeper than {MAX_DEPTH}")
        if node is None:
            return {"kind": "none"}
        kind = type(node)
        if kind is dict:
            keys = [key_to_json(key, path) for key in node]
            pairs = zip(map(label, keys), node.values(), strict=True)
            return {"kind": "dict", "keys": keys, "of": many(pairs, path, depth)}
        if kind in (list, tuple):
            return {"kind": kind.__name__, "of": many(enumerate(node), path, depth)}
        name = name_of(kind)
        if name is not None:
            fields = list(kind._fields)
            pairs = zip(fields, node, strict=True)
            return {"kind": "named", "name": name, "keys": fields, "of": many(pairs, path, depth)}
        leaf, array = _leaf(node, path)
        if leaf is not None:
            leaves.append(leaf)
            arrays.append(array)
            return len(leaves) - 1
        children = _children(node, path)
        of = many(enumerate(children), path, depth)
        return {"kind": "opaque", "name": qualified(kind), "of": of}

    structure = one(value, "", 0)
    if len(leaves) > MAX_LEAVES:
        raise CheckpointError(f"at most {MAX_LEAVES} leaves, got {len(leaves)}; stack them")
    return structure, leaves, arrays


def _children(node: Any, path: str) -> Any:
    kind = qualified(type(node))
    try:
        flat = default_registry.flatten_one_level(node)
    except Exception as error:  # whatever the type's own code raises
        raise CheckpointError(
            f"{path or 'the value'}: JAX cannot take this {kind} apart ({error}); make it a dict, "
            "whose keys may be of several types here"
        ) from error
    if flat is None:
        raise CheckpointError(
            f"{path or 'the value'}: a {kind} is neither an array, a number, a string nor a "
            "registered pytree; leave it out or convert it"
        )
    return flat[0]


def _leaf(node: Any, path: str) -> tuple[Leaf | None, Any]:
    if isinstance(node, bool | int | float | str) and not isinstance(node, np.generic):
        name = f"{type(node).__name__}()"
        if name not in _SCALARS:
            raise CheckpointError(f"{path}: {type(node)!r} is no plain Python number or string")
        if isinstance(node, int) and node.bit_length() > MAX_INT_BITS:
            raise CheckpointError(
                f"{path}: an int of {node.bit_length()} bits, at most {MAX_INT_BITS} are read "
                "back; save it as a string, `hex(...)`"
            )
        kept = node.hex() if isinstance(node, float) else str(node) if name == "int()" else node
        return Leaf(path=path, dtype=name, shape=(), scalar=kept), None
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


@lru_cache(maxsize=256)
def _name(dtype: Any) -> str:
    return str(dtype)  # slow in NumPy, and asked for every leaf of every save


def leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    """As the manifest holds it."""
    row: dict[str, Any] = {"path": leaf.path, "dtype": leaf.dtype, "shape": list(leaf.shape)}
    if leaf.key is not None:
        row["key"] = leaf.key
    if leaf.is_scalar:
        row["scalar"] = leaf.scalar
    return row


def leaf_from_json(row: Any) -> Leaf:
    """The reverse of `leaf_to_json`; raises `CorruptCheckpointError`."""
    if not isinstance(row, dict) or row.keys() - {"path", "dtype", "shape", "key", "scalar"}:
        raise CorruptCheckpointError(f"a leaf is {_short(row)}")
    path, dtype, shape = row.get("path"), row.get("dtype"), row.get("shape")
    key, scalar = row.get("key"), row.get("scalar")
    if not isinstance(path, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise CorruptCheckpointError(f"a leaf is {_short(row)}")
    if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise CorruptCheckpointError(f"{path}: shape {_short(shape)}")
    if key is not None and (not isinstance(key, str) or key not in KEYS):
        raise CorruptCheckpointError(f"{path}: random keys of kind {_short(key)} are unknown")
    if key is not None and (dtype != "uint32" or shape[-1:] != [KEYS[key]]):
        raise CorruptCheckpointError(f"{path}: {dtype}{_short(shape)} are no random keys")
    leaf = Leaf(path=path, dtype=dtype, shape=tuple(shape), key=key, scalar=scalar)
    if leaf.is_scalar:
        scalar_value(leaf)
    elif leaf.num_bytes > MAX_LEAF_BYTES:
        raise CorruptCheckpointError(f"{path}: an array of {leaf.num_bytes} bytes is impossible")
    return leaf


def scalar_value(leaf: Leaf) -> Any:
    """The Python number or string of a scalar leaf; raises `CorruptCheckpointError`."""
    value = leaf.scalar
    try:
        if leaf.dtype == "float()" and isinstance(value, str) and len(value) < 64:
            return float.fromhex(value)
        if leaf.dtype == "int()" and isinstance(value, str) and len(value) < 4000:
            return int(value)
    except (ValueError, OverflowError):
        pass
    if (leaf.dtype == "bool()" and isinstance(value, bool)) or (
        leaf.dtype == "str()" and isinstance(value, str)
    ):
        return value
    raise CorruptCheckpointError(f"{leaf.path}: {_short(value)} is no {leaf.dtype[:-2]}")


def build(structure: Any, values: list[Any], like: Any = None) -> Any:
    """The value again.

    Args:
      structure: from `describe`, possibly by way of a file.
      values: of the leaves, in order.
      like: a value of the same structure, needed where it has pytree nodes of types that are not
        registered.

    Raises:
      CorruptCheckpointError: not a structure, or not of these leaves.
      CheckpointError: a type that is not registered here, or `like` has another structure.
    """
    used = [False] * len(values)

    def one(node: Any, like: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CorruptCheckpointError(f"the structure is nested deeper than {MAX_DEPTH}")
        if type(node) is int:
            if not 0 <= node < len(values) or used[node]:
                raise CorruptCheckpointError(f"the structure names leaf {node} wrongly")
            used[node] = True
            return values[node]
        kind, keys, of = _node(node)
        if kind == "none":
            return None
        if kind == "opaque":
            return _opaque(node, like, list(of), one, depth)
        if kind == "dict":
            keys = keys_from_json(keys, like)
        guides = _guides(kind, keys, of, like)
        children = [one(child, guide, depth + 1) for child, guide in zip(of, guides, strict=True)]
        if kind == "dict":
            return dict(zip(keys, children, strict=True))
        if kind == "named":
            return _named(node["name"], keys, children)
        return children if kind == "list" else tuple(children)

    value = one(structure, like, 0)
    if not all(used):
        raise CorruptCheckpointError("the structure leaves out some of its leaves")
    return value


def check_form(structure: Any, num_leaves: int) -> None:
    """Raises `CorruptCheckpointError` unless it is a structure that has each leaf once."""
    used: set[int] = set()
    waiting = [(structure, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise CorruptCheckpointError(f"the structure is nested deeper than {MAX_DEPTH}")
        if type(node) is int:
            if not 0 <= node < num_leaves or node in used:
                raise CorruptCheckpointError("the structure names a leaf wrongly")
            used.add(node)
        else:
            waiting.extend((child, depth + 1) for child in _node(node)[2])
    if len(used) != num_leaves:
        raise CorruptCheckpointError("the structure leaves out some of its leaves")


def to_structure(value: Any) -> tuple[Any, list[str], list[Any]]:
    """The structure of a tree of arrays as JSON, the leaves' paths, and the leaves.

    Raises:
      CheckpointError: a leaf that is no array, or a random key.

    >>> import numpy as np
    >>> structure, names, arrays = to_structure({"w": [np.ones(2)]})
    >>> names, from_structure(structure, arrays)["w"][0].tolist()
    (['w/0'], [1.0, 1.0])
    """
    structure, leaves, arrays = describe(value)
    for leaf in leaves:
        if leaf.is_scalar or leaf.key is not None:
            raise CheckpointError(f"{leaf.path}: only plain arrays here, got {leaf.dtype}")
    return structure, [leaf.path for leaf in leaves], arrays


def from_structure(structure: Any, arrays: list[Any]) -> Any:
    """The tree again; see `build`."""
    return build(structure, arrays)


def _node(node: Any) -> tuple[str, list[Any], list[Any]]:
    if not isinstance(node, dict):
        raise CorruptCheckpointError(f"a node of the structure is {_short(node)}")
    kind, keys, of = node.get("kind"), node.get("keys", []), node.get("of", [])
    if kind not in ("none", "dict", "list", "tuple", "named", "opaque"):
        raise CorruptCheckpointError(f"a node of the structure is of kind {_short(kind)}")
    if not isinstance(of, list) or not isinstance(keys, list):
        raise CorruptCheckpointError(f"a node of the structure is {_short(node)}")
    is_named = kind == "named"
    if (kind == "dict" or is_named) and (
        len(keys) != len(of)
        or (is_named and not all(isinstance(key, str) for key in keys))
        or (is_named and len(set(keys)) != len(keys))
    ):
        raise CorruptCheckpointError(f"keys and children of a node differ: {_short(keys)}")
    if kind in ("named", "opaque") and not isinstance(node.get("name"), str):
        raise CorruptCheckpointError("a node of the structure has no name")
    return kind, keys, of


def _guides(kind: str, keys: list[Any], of: list[Any], like: Any) -> list[Any]:
    if kind == "dict" and isinstance(like, dict):
        return [like.get(key) for key in keys]
    if kind == "named" and is_named_tuple(type(like)):
        return [getattr(like, key, None) for key in keys]
    if kind in ("list", "tuple") and isinstance(like, list | tuple) and len(like) == len(of):
        return list(like)
    return [None] * len(of)


def _named(name: str, keys: list[str], children: list[Any]) -> Any:
    kind = type_of(name)
    if kind is None:
        raise CheckpointError(
            f"the checkpoint holds a {name!r}, which is not registered in this process; import "
            "the module that registers it, or call `checkpoint.register(TYPE, NAME)`"
        )
    unknown = [key for key in keys if key not in kind._fields]
    missing = [
        field for field in kind._fields if field not in keys and field not in kind._field_defaults
    ]
    if unknown or missing:
        raise CheckpointError(
            f"{name!r} has fields {list(kind._fields)} here, but the checkpoint holds {keys}; "
            "restore with the version that wrote it"
        )
    return kind(**dict(zip(keys, children, strict=True)))


def _opaque(node: Any, like: Any, of: list[Any], one: Any, depth: int) -> Any:
    kind = type(like)
    if qualified(kind) != node["name"]:
        raise CheckpointError(
            f"the checkpoint holds a {node['name']!r}, a pytree node that can be rebuilt only "
            "beside an example; pass `like=` a value of the same structure"
        )
    guides, treedef = jax.tree_util.tree_flatten(like, is_leaf=lambda inner: inner is not like)
    if len(guides) != len(of):
        raise CheckpointError(
            f"`like` has {len(guides)} children in a {node['name']!r}, the checkpoint {len(of)}"
        )
    children = [one(child, guide, depth + 1) for child, guide in zip(of, guides, strict=True)]
    try:
        return jax.tree_util.tree_unflatten(treedef, children)
    except Exception as error:  # whatever the type's own code raises
        raise CheckpointError(
            f"a {node['name']!r} cannot be made of what the checkpoint holds: {error}"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
