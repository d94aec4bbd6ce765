"""A pytree as plain JSON and a list of arrays, and back, without a template.

In JSON a leaf is its number, and any other node a row: `{"kind": ..., "children": [...]}`, with
`keys` for a dictionary and a NamedTuple, and the `name` of a type that is no plain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.tree_util import default_registry

from esper_fn._records import is_named_tuple, name_of, named_tuple, qualified
from esper_fn._text import short
from esper_fn.checkpoint._json import corrupt_if_malformed
from esper_fn.checkpoint._keys import key_to_json, keys_from_json, label
from esper_fn.checkpoint._leaf import Leaf, leaf_of
from esper_fn.errors import CheckpointError, CorruptCheckpointError

MAX_LEAVES = 1_000_000
MAX_DEPTH = 100
_KINDS = ("none", "dict", "list", "tuple", "named", "opaque")


def describe(value: Any) -> tuple[Any, list[Leaf], list[Any]]:
    """Takes a value apart.

    Args:
      value: a pytree of arrays, random keys, Python numbers and strings.

    Returns:
      The structure as JSON, the leaves, and their arrays (None for a number or a string).

    Raises:
      CheckpointError: a leaf or a key that cannot be stored; names its path.
    """
    description = _Description()
    structure = description.add(value, "", 0)
    if len(description.leaves) > MAX_LEAVES:
        raise CheckpointError(
            f"at most {MAX_LEAVES} leaves, got {len(description.leaves)}; stack them"
        )
    return structure, description.leaves, description.arrays


class _Description:
    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.arrays: list[Any] = []

    def add(self, node: Any, path: str, depth: int) -> Any:
        """Adds a node's leaves; returns its structure."""
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path[:200]}: nested deeper than {MAX_DEPTH}")
        if node is None:
            return {"kind": "none"}
        row, names, children = self._row(node, path)
        if row is None:
            return len(self.leaves) - 1
        prefix = f"{path}/" if path else ""
        row["children"] = [
            self.add(child, f"{prefix}{name}", depth + 1)
            for name, child in zip(names, children, strict=True)
        ]
        return row

    def _row(self, node: Any, path: str) -> tuple[dict[str, Any] | None, Any, Any]:
        """A node without its children, and their names and values; a leaf is added instead."""
        kind = type(node)
        if kind is dict:
            keys = [key_to_json(key, path) for key in node]
            return {"kind": "dict", "keys": keys}, map(label, keys), node.values()
        if kind in (list, tuple):
            return {"kind": kind.__name__}, range(len(node)), node
        name = name_of(kind)
        if name is not None and is_named_tuple(kind):
            fields = list(kind._fields)
            return {"kind": "named", "name": name, "keys": fields}, fields, node
        leaf, array = leaf_of(node, path)
        if leaf is not None:
            self.leaves.append(leaf)
            self.arrays.append(array)
            return None, (), ()
        children = list(_children(node, path))
        return {"kind": "opaque", "name": qualified(kind)}, range(len(children)), children


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


def build(structure: Any, values: list[Any], like: Any = None) -> Any:
    """Puts a value together again.

    Args:
      structure: from `describe`, possibly by way of a file.
      values: of the leaves, in order.
      like: a value of the same structure, needed where it has pytree nodes of types that are not
        registered.

    Returns:
      The value.

    Raises:
      CorruptCheckpointError: not a structure, or not of these leaves.
      CheckpointError: a type that is not registered here, or `like` has another structure.
    """
    check_structure(structure, len(values))
    return assemble(structure, values, like)


def assemble(node: Any, values: Sequence[Any] | Mapping[int, Any], like: Any) -> Any:
    """`build` for a part of a structure that is checked, with its leaves by their numbers."""
    if type(node) is int:
        return values[node]
    kind, keys, children = _parts(node)
    if kind == "none":
        return None
    if kind == "opaque":
        return _opaque(node["name"], children, values, like)
    if kind == "dict":
        keys = keys_from_json(keys, like)
    guides = _guides(kind, keys, len(children), like)
    inner = [assemble(child, values, guide) for child, guide in zip(children, guides, strict=True)]
    if kind == "dict":
        return dict(zip(keys, inner, strict=True))
    if kind == "named":
        return _named(node["name"], keys, inner)
    return inner if kind == "list" else tuple(inner)


def check_structure(structure: Any, num_leaves: int) -> None:
    """Raises `CorruptCheckpointError` unless it is a structure that has each leaf once."""
    used: set[int] = set()
    pending = [(structure, 0)]
    while pending:
        node, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise CorruptCheckpointError(f"the structure is nested deeper than {MAX_DEPTH}")
        if type(node) is int:
            if not 0 <= node < num_leaves or node in used:
                raise CorruptCheckpointError(f"the structure names leaf {node} wrongly")
            used.add(node)
        else:
            pending.extend((child, depth + 1) for child in _parts(node)[2])
    if len(used) != num_leaves:
        raise CorruptCheckpointError("the structure leaves out some of its leaves")


def _parts(node: Any) -> tuple[str, list[Any], list[Any]]:
    """Kind, keys and children of a row that may come from anywhere."""
    if not isinstance(node, dict):
        raise CorruptCheckpointError(f"a node of the structure is {short(node)}")
    kind, keys, children = node.get("kind"), node.get("keys", []), node.get("children", [])
    if kind not in _KINDS:
        raise CorruptCheckpointError(f"a node of the structure is of kind {short(kind)}")
    if not isinstance(children, list) or not isinstance(keys, list):
        raise CorruptCheckpointError(f"a node of the structure is {short(node)}")
    is_named = kind == "named"
    if (kind == "dict" or is_named) and (
        len(keys) != len(children)
        or (is_named and not all(isinstance(key, str) for key in keys))
        or (is_named and len(set(keys)) != len(keys))
    ):
        raise CorruptCheckpointError(f"keys and children of a node differ: {short(keys)}")
    if kind == "none" and children:
        raise CorruptCheckpointError("a node of the structure is None and has children")
    if kind in ("named", "opaque") and not isinstance(node.get("name"), str):
        raise CorruptCheckpointError("a node of the structure has no name")
    return kind, keys, children


def child_names(node: Any) -> list[str]:
    """How a path names the children of a node; none for a leaf."""
    if type(node) is int:
        return []
    kind, keys, children = _parts(node)
    if kind not in ("dict", "named"):
        return [str(index) for index in range(len(children))]
    with corrupt_if_malformed("the keys of a node have another form"):
        return list(map(label, keys))


def leaf_numbers(node: Any) -> Iterator[int]:
    """The leaves below a node."""
    if type(node) is int:
        yield node
    else:
        for child in node.get("children", ()):
            yield from leaf_numbers(child)


def _guides(kind: str, keys: list[Any], num_children: int, like: Any) -> list[Any]:
    """The children of `like`, or None for each."""
    if kind == "dict" and isinstance(like, dict):
        return [like.get(key) for key in keys]
    if kind == "named" and is_named_tuple(type(like)):
        return [getattr(like, key, None) for key in keys]
    if kind in ("list", "tuple") and isinstance(like, list | tuple) and len(like) == num_children:
        return list(like)
    return [None] * num_children


def _named(name: str, keys: list[str], children: list[Any]) -> Any:
    kind = named_tuple(name)
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


def _opaque(name: str, children: list[Any], values: Any, like: Any) -> Any:
    if qualified(type(like)) != name:
        raise CheckpointError(
            f"the checkpoint holds a {name!r}, a pytree node that can be rebuilt only "
            "beside an example; pass `like=` a value of the same structure"
        )
    guides, treedef = jax.tree_util.tree_flatten(like, is_leaf=lambda inner: inner is not like)
    if len(guides) != len(children):
        raise CheckpointError(
            f"`like` has {len(guides)} children in a {name!r}, the checkpoint {len(children)}"
        )
    inner = [assemble(child, values, guide) for child, guide in zip(children, guides, strict=True)]
    try:
        return jax.tree_util.tree_unflatten(treedef, inner)
    except Exception as error:  # whatever the type's own code raises
        raise CheckpointError(
            f"a {name!r} cannot be made of what the checkpoint holds: {error}"
        ) from error
