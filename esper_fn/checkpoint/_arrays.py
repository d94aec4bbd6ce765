"""Leaves to parts and back: what is stored together, and what is stored already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_fn.checkpoint._leaf import Leaf, storage, value_of
from esper_fn.checkpoint._manifest import PACKED, Part
from esper_fn.errors import CorruptCheckpointError

SMALL_BYTES = 64 * 2**10
"""Leaves below this share one array, since each array costs Orbax some time."""

PART_BYTES = 2**20
"""Parts below this are put together, since each folder costs some time."""

_ALIGN = 16


class Planned(NamedTuple):
    """A part to be written, unless its content is on disk already."""

    part: Part
    arrays: dict[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def fetch(
    arrays: Sequence[Any], leaves: Sequence[Leaf], pool: list[np.ndarray], copiers: Executor
) -> list[Any]:
    """Copies arrays to host memory, so that the program that owns them may donate them.

    Args:
      arrays: of a value, None for scalars.
      leaves: their descriptions.
      pool: buffers to copy into where they fit.
      copiers: copy large arrays side by side, as the caller waits.

    Returns:
      The copies as bits (see `storage`), None for scalars.
    """
    spare: dict[Any, list[np.ndarray]] = {}
    for buffer in pool:
        spare.setdefault((buffer.shape, buffer.dtype), []).append(buffer)
    if jax.default_backend() != "cpu":
        arrays = jax.device_get(list(arrays))  # all transfers at once
    copies: list[Any] = []
    copying = []
    for leaf, array in zip(leaves, arrays, strict=True):
        if leaf.is_scalar:
            copies.append(None)
            continue
        bits = _as_bits(np.asarray(array), leaf)
        fitting = spare.get((bits.shape, bits.dtype))
        buffer = fitting.pop() if fitting else np.empty(bits.shape, bits.dtype)
        if bits.nbytes >= SMALL_BYTES:
            copying.append(copiers.submit(np.copyto, buffer, bits))
        else:
            np.copyto(buffer, bits)
        copies.append(buffer)
    for future in copying:
        future.result()
    return copies


def _as_bits(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    kind = storage(leaf.dtype)
    if array.dtype == kind:
        return array
    return np.ascontiguousarray(array).view(kind).reshape(array.shape)


def _sha256(array: np.ndarray) -> str:
    data = array.reshape(-1).view(np.uint8).data if array.size else b""
    return hashlib.sha256(data).hexdigest()


def with_digests(leaves: Sequence[Leaf], arrays: Sequence[Any]) -> tuple[Leaf, ...]:
    """The leaves with the SHA-256 of their bytes."""
    return tuple(
        leaf if leaf.is_scalar else leaf._replace(sha256=_sha256(array))
        for leaf, array in zip(leaves, arrays, strict=True)
    )


def plan(leaves: Sequence[Leaf], arrays: Sequence[Any], prefixes: Sequence[str]) -> list[Planned]:
    """Groups leaves, with digests, into parts by the longest of the prefixes of their path."""
    groups: dict[str, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if not leaf.is_scalar:
            fitting = [p for p in prefixes if f"{leaf.path}/".startswith(f"{p}/")]
            groups.setdefault(max(fitting, key=len, default=""), []).append(index)
    large, rest = [], []
    for indices in groups.values():
        if sum(leaves[index].num_bytes for index in indices) < PART_BYTES:
            rest += indices
        else:
            large.append(indices)
    if rest:
        large.append(sorted(rest))
    return [_planned(indices, leaves, arrays) for indices in large]


def _planned(indices: list[int], leaves: Sequence[Leaf], arrays: Sequence[Any]) -> Planned:
    content = hashlib.sha256()
    whole: dict[str, np.ndarray] = {}
    packed: list[np.ndarray] = []
    end, positions = 0, []
    for position, index in enumerate(indices):
        leaf, array = leaves[index], arrays[index]
        content.update(f"{storage(leaf.dtype)} {leaf.shape} {leaf.sha256}\n".encode())
        if leaf.num_bytes >= SMALL_BYTES:
            whole[f"leaf{position}"] = array
            positions.append((index, -1))
            continue
        positions.append((index, end))
        if array.size:
            packed.append(array.reshape(-1).view(np.uint8))
        packed.append(np.zeros(_padded(leaf) - leaf.num_bytes, np.uint8))
        end += _padded(leaf)
    if end or not whole:
        whole[PACKED] = np.concatenate([*packed, np.zeros(_ALIGN, np.uint8)])
    part = Part(folder=f"data/{content.hexdigest()[:40]}", leaves=tuple(positions))
    return Planned(part=part, arrays=whole)


def _padded(leaf: Leaf) -> int:
    """Bytes of a leaf in `packed`."""
    return leaf.num_bytes + -leaf.num_bytes % _ALIGN


def expected(part: Part, leaves: Sequence[Leaf]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each of a part's arrays in Orbax."""
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {}
    end = -1
    for position, (index, offset) in enumerate(part.leaves):
        leaf = leaves[index]
        if offset < 0:
            arrays[f"leaf{position}"] = (leaf.shape, storage(leaf.dtype))
        else:
            end = max(end, offset + _padded(leaf))
    if end >= 0 or not arrays:
        arrays[PACKED] = ((max(end, 0) + _ALIGN,), np.dtype(np.uint8))
    return arrays


def take(
    part: Part, leaves: Sequence[Leaf], arrays: dict[str, np.ndarray]
) -> dict[int, np.ndarray]:
    """A part's leaves, by index, as bits."""
    bits = {}
    for position, (index, offset) in enumerate(part.leaves):
        leaf = leaves[index]
        if offset < 0:
            bits[index] = arrays[f"leaf{position}"]
            continue
        piece = arrays[PACKED][offset : offset + leaf.num_bytes]
        bits[index] = piece.copy().view(storage(leaf.dtype)).reshape(leaf.shape)
    return bits


def verified(leaf: Leaf, bits: np.ndarray | None) -> Any:
    """Makes the leaf's value, after comparing its bytes with the digest taken when it was saved.

    Raises:
      CorruptCheckpointError: other bytes than were saved.
    """
    if leaf.is_scalar:
        return value_of(leaf, None)
    if bits is None:
        raise CorruptCheckpointError(f"{leaf.path}: no array")
    bits = np.ascontiguousarray(bits).reshape(leaf.shape)
    if _sha256(bits) != leaf.sha256:
        raise CorruptCheckpointError(f"{leaf.path}: the array read is not the one that was saved")
    array = bits.reshape(-1).view(jax.numpy.dtype(leaf.dtype)).reshape(leaf.shape)
    return value_of(leaf, array)
