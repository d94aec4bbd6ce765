"""The lifecycle in a state dict: a tensor of bytes that says itself what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import esper_fn as ef
from esper_fn.lifecycle import NONE, NUM_STAGES
from esper_fn.types import Layout
from torch_bridge._errors import BridgeError

_MAGIC = b"esper\x00\x02\n"
_STATE = ("policy", "governor", "grafts", "settings", "loss", "key", "step", "memory")


class Saved(NamedTuple):
    """What a state dict says of a growth."""

    sites: list[list[Any]]
    """Name, features, chunks and topology of each."""
    blueprints: list[str]
    capacity: int
    grafts: list[str]
    changes: list[str]
    """What is not as it was saved, where it has been fitted to another growth."""
    leaves: dict[str, np.ndarray]
    """The state's arrays by their paths, keys as `jax.random.key_data` has them."""


class Fitted(NamedTuple):
    """A saved lifecycle for a growth that may differ in policy and capacity."""

    leaves: list[np.ndarray]
    """The state's arrays, in the order of the growth's own state."""
    slots: np.ndarray
    """int[Q]: for each slot of the growth the saved slot that it takes over, or -1."""
    capacity: int
    """What the adapters need, if the growth has less; else 0, and all else holds."""
    changes: list[str]
    is_other: bool
    """Whether anything differs between the two growths."""
    is_moved: bool
    """Whether adapters have other slots of their banks than before."""


def leaves_of(raw: Any) -> dict[str, np.ndarray]:
    """A state's arrays by their paths."""
    paths = jax.tree_util.tree_flatten_with_path(raw)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def describe(
    growth: ef.Growth, leaves: Mapping[str, np.ndarray], changes: Sequence[str] = ()
) -> Saved:
    """A growth and its state, to be written."""
    layout = growth.layout
    return Saved(
        sites=[[s.name, s.features, s.chunks, s.topology] for s in layout.sites],
        blueprints=list(layout.names),
        capacity=layout.capacity,
        grafts=[graft.name for graft in growth.grafts],
        changes=list(changes),
        leaves=dict(leaves),
    )


def write(saved: Saved) -> bytes:
    """A magic number, the header's length, the header as JSON, and the arrays."""
    header = saved._asdict()
    header["leaves"] = [[p, str(leaf.dtype), list(leaf.shape)] for p, leaf in saved.leaves.items()]
    text = json.dumps(header, separators=(",", ":")).encode()
    arrays = [np.ascontiguousarray(leaf).tobytes() for leaf in saved.leaves.values()]
    return b"".join([_MAGIC, len(text).to_bytes(8, "little"), text, *arrays])


def parse(data: bytes) -> Saved:
    """The inverse of `write`.

    Raises:
      BridgeError: for anything else.
    """
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    try:
        if data[: len(_MAGIC)] != _MAGIC or end > len(data):
            raise ValueError("not of this format")
        header = json.loads(data[start:end])
        leaves = {}
        for path, dtype, shape in header["leaves"]:
            kind = np.dtype(str(dtype))
            if kind.kind not in "biuf" or any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"an array of {dtype}{shape}")
            stop = end + kind.itemsize * int(np.prod(shape, dtype=object))
            leaves[str(path)] = np.frombuffer(data[end:stop], kind).reshape(shape)
            end = stop
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes too many")
        return Saved(
            sites=[list(site) for site in header["sites"]],
            blueprints=[str(name) for name in header["blueprints"]],
            capacity=int(header["capacity"]),
            grafts=[str(name) for name in header["grafts"]],
            changes=[str(line) for line in header["changes"]],
            leaves=leaves,
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise BridgeError(
            f"the state dict's lifecycle cannot be read ({error}): it is damaged, or written by "
            "another version of torch_bridge; nothing was loaded"
        ) from None


def fit(saved: Saved, growth: ef.Growth, own: Mapping[str, np.ndarray]) -> Fitted:
    """A saved lifecycle for this growth; its own leaves where the saved ones have no place.

    Raises:
      BridgeError: saved with other sites or blueprints.
    """
    layout = growth.layout
    before = layout_of(saved, growth)
    _check(saved, own, before)
    slots, capacity, is_moved = _slots(saved, before, layout)
    mine = describe(growth, own)
    alike = mine[:4] == saved[:4] and _forms(own) == _forms(saved.leaves)
    if capacity or alike:
        unchanged = list(saved.leaves.values()) if alike else []
        return Fitted(unchanged, slots, capacity, list(saved.changes), not alike, is_moved)
    target = np.full(before.num_slots + 1, NONE)
    target[slots[slots != NONE]] = np.flatnonzero(slots != NONE)
    renumbered: dict[str, Any] = {
        ".seeds.slot": target[:-1],
        ".seeds.blueprint": [layout.names.index(name) for name in saved.blueprints],
        ".seeds.graft": [
            mine.grafts.index(name) if name in mine.grafts else 0 for name in saved.grafts
        ],
    }
    leaves: dict[str, np.ndarray] = {}
    for path, leaf in saved.leaves.items():
        if path.startswith(".seeds."):
            leaves[path] = _renumber(leaf, renumbered[path]) if path in renumbered else leaf
    for path in (".owner", ".generation"):
        rows = own[path].copy()
        rows[:] = NONE if path == ".owner" else 0
        rows[slots != NONE] = saved.leaves[path][slots[slots != NONE]]
        leaves[path] = rows
    changes = list(saved.changes)
    for group in _STATE:
        theirs, ours = _group(saved.leaves, group), _group(own, group)
        if _forms(theirs) == _forms(ours):
            leaves |= theirs
        else:
            changes.append(group)
    fitted = [leaves.get(path, leaf) for path, leaf in own.items()]
    return Fitted(fitted, slots, 0, changes, True, is_moved)


def _group(leaves: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {path: leaf for path, leaf in leaves.items() if path.startswith(f".{name}")}


def _renumber(leaf: np.ndarray, to: Any) -> np.ndarray:
    return np.where(leaf == NONE, NONE, np.asarray(to)[np.maximum(leaf, 0)]).astype(leaf.dtype)


def _forms(leaves: Mapping[str, np.ndarray]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(path, str(leaf.dtype), leaf.shape) for path, leaf in leaves.items()]


def layout_of(saved: Saved, growth: ef.Growth) -> Layout:
    """The layout that was saved, made of this growth's sites and blueprints."""
    layout = growth.layout
    own = describe(growth, {})
    missing = [name for name in saved.blueprints if name not in layout.names]
    if saved.sites != own.sites or missing:
        differing = [site for site in saved.sites if site not in own.sites] or saved.sites
        what = f"blueprints {missing}" if missing else f"sites {differing[:3]}"
        raise BridgeError(
            f"the checkpoint's lifecycle belongs to another growth: it has {what}, and this model "
            f"has sites {[s for s in own.sites if s not in saved.sites][:3]} and blueprints "
            f"{own.blueprints}. Grow the model with the same targets, chunks, topology and "
            "blueprints as when it was saved, then load; policy and capacity may differ. Nothing "
            "was loaded"
        )
    if own[:3] == saved[:3]:
        return layout  # averages come here in every step
    return layout.replace(
        blueprints={n: layout.blueprints[layout.names.index(n)] for n in saved.blueprints},
        capacity=saved.capacity,
    )


def _check(saved: Saved, own: Mapping[str, np.ndarray], before: Layout) -> None:
    """Refuses numbers that no growth can have."""
    limits = {
        ".owner": (before.num_slots, before.num_seeds),
        ".generation": (before.num_slots, np.iinfo(np.int32).max),
        ".seeds.slot": (before.num_seeds, before.num_slots),
        ".seeds.blueprint": (before.num_seeds, len(saved.blueprints)),
        ".seeds.graft": (before.num_seeds, len(saved.grafts)),
        ".seeds.stage": (before.num_seeds, NUM_STAGES),
        ".seeds.parent": (before.num_seeds, NUM_STAGES),
    }
    for path, leaf in own.items():
        if not (path.startswith(".seeds.") or path in limits):
            continue
        saved_leaf = saved.leaves.get(path)
        shape = (limits[path][0],) if path in limits else leaf.shape
        is_right = (
            saved_leaf is not None and saved_leaf.dtype == leaf.dtype and saved_leaf.shape == shape
        )
        if is_right and saved_leaf is not None and path in limits:
            is_right = bool(np.all((saved_leaf >= NONE) & (saved_leaf < limits[path][1])))
        if not is_right:
            raise BridgeError(
                f"the state dict's lifecycle cannot be read (at {path}): it is damaged, or written "
                "by another version of torch_bridge; nothing was loaded"
            )


def _slots(saved: Saved, before: Layout, after: Layout) -> tuple[np.ndarray, int, bool]:
    """`slots`, `capacity` and `is_moved` of `Fitted`: adapters keep their slots if there are
    such.
    """
    owner = saved.leaves[".owner"]
    sources, capacity, is_moved = np.full(after.num_slots, NONE), 0, False
    twins = {twin_name(after, bank): bank for bank in after.tables.banks}
    for bank in before.tables.banks:
        twin = twins[twin_name(before, bank)]
        used = np.flatnonzero(owner[bank.start : bank.start + bank.num_slots] != NONE).tolist()
        if len(used) > twin.num_slots:
            capacity = saved.capacity
            continue
        staying = [slot for slot in used if slot < twin.num_slots]
        free = [slot for slot in range(twin.num_slots) if slot not in staying]
        for slot in used:
            to = slot if slot < twin.num_slots else free.pop(0)
            sources[twin.start + to] = bank.start + slot
            is_moved |= to != slot
    return sources, capacity, is_moved


def twin_name(layout: Layout, bank: Any) -> tuple[str, str]:
    """Site and blueprint of a bank of `layout.tables`."""
    return layout.sites[bank.site].name, layout.names[bank.blueprint]
