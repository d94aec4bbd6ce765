"""What is known of kernels before a call: constants, programs, sizes of what they leave behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from esper_kernels.graft._blocks import Tiles, padded
from esper_kernels.graft._case import Case
from esper_kernels.graft._triton_backward import backward_kernel
from esper_kernels.graft._triton_forward import forward_kernel
from esper_kernels.graft._triton_launch import Launch
from esper_kernels.graft._triton_reduce import reduce_kernel
from esper_kernels.graft._triton_watch import watch_kernel

PAD = 32
"""Floats behind the sums of squares by feature; the first is the sum of values."""

PIECE = 1024
"""Entries of a share that are added up at once."""


def _cut(case: Case, tiles: Tiles) -> dict[str, Any]:
    return {
        "NARROW": case.features // case.chunks,
        "NUM_WIDE": case.num_wide,
        "BF": padded(case)[0],
    }


def _common(case: Case, tiles: Tiles) -> dict[str, Any]:
    return _cut(case, tiles) | {
        "WIDTH": case.width,
        "RANK": case.rank,
        "BM": tiles.rows,
        "BR": padded(case)[1],
        "BULK": tiles.is_bulk,
        "STAGES": tiles.stages,
        "ACTIVATION": case.activation,
        "HAS_BIAS": case.has_bias,
        "PRECISION": "ieee" if case.dtype == "float32" else "tf32",
        "num_warps": tiles.warps,
    }


def _split(case: Case, tiles: Tiles) -> dict[str, Any]:
    """How rows are cut where every chunk has the same number of programs."""
    num_tiles = triton.cdiv(triton.cdiv(case.rows, tiles.rows), tiles.splits)
    return {
        "SPLITS": tiles.splits,
        "TILES": num_tiles,
        "ALL_ROWS": case.rows == num_tiles * tiles.rows * tiles.splits,
    }


def _folded(case: Case, tiles: Tiles) -> dict[str, Any]:
    """How many rows of a tile the sums of the watch keep apart."""
    return {"GROUP": min(tiles.rows, max(1, tiles.warps * 256 // padded(case)[0]))}


def _chain(is_chained: bool) -> dict[str, Any]:
    """A second kernel's programs start while the first one's last ones run, where Hopper can."""
    return {"CHAINED": True, "launch_pdl": True} if is_chained else {"CHAINED": False}


class Watching(NamedTuple):
    """The launches of a forward pass."""

    main: Launch
    finish: Launch | None
    """Adds the programs' sums up where nothing counts who is the last to arrive."""
    room: int
    """Floats that the programs leave behind; 0 where one program has a chunk to itself."""


class Pulling(NamedTuple):
    """The launches of a backward pass."""

    main: Launch
    reduce: Launch | None
    """Adds the splits' shares up where nothing counts who is the last to arrive."""
    room: int
    """Floats that the programs leave behind."""


def forward_launches(
    case: Case,
    tiles: Tiles,
    is_in_place: bool,
    is_counted: bool,
) -> Watching:
    """Of the forward pass.

    Args:
      case: what is computed.
      tiles: how it is cut.
      is_in_place: whether `y` is `x`.
      is_counted: whether counters tell who adds up.
    """
    is_chained = tiles.is_bulk and not is_counted
    programs, width = case.chunks * tiles.splits, padded(case)[0]
    rest = {"BS": triton.next_power_of_2(tiles.splits), "PAD": PAD}
    constants = {
        "IN_PLACE": is_in_place,
        "IS_COUNTED": is_counted,
        "CHAINED": is_chained,
        **_common(case, tiles),
        **_split(case, tiles),
        **_folded(case, tiles),
        **rest,
    }
    added_up = None
    if tiles.splits > 1 and not is_counted:
        added = {"CHUNKS": case.chunks, "SPLITS": tiles.splits, **_cut(case, tiles), **rest}
        added_up = Launch(watch_kernel, case.chunks, added | _chain(is_chained))
    room = programs * (width + PAD) if tiles.splits > 1 else 0
    return Watching(Launch(forward_kernel, programs, constants), added_up, room)


def share_of(case: Case) -> int:
    """Entries of one chunk's share of the gradients: down, up, bias, gate."""
    size = case.width * case.rank
    return 2 * size + case.has_bias * case.rank + (case.activation == "gated") * size


def backward_launches(
    case: Case, tiles: Tiles, is_counted: bool, is_beside: bool, *, is_open: bool = False
) -> Pulling:
    """Of the backward pass.

    Args:
      case: what is computed.
      tiles: how it is cut.
      is_counted: whether counters tell who adds up.
      is_beside: whether `channels` have `watched` before them.
      is_open: whether they are given arrays, whose tiles they describe themselves, and run one
        after the other: for compilers, and for bound calls of narrow chunks.
    """
    is_chained = not is_open and tiles.is_bulk and not is_counted
    share = share_of(case)
    rest = {
        "BK": PIECE,
        "BS": triton.next_power_of_2(tiles.splits),
        "BC": min(1024, triton.next_power_of_2(case.chunks)),
        "BESIDE": is_beside,
    }
    constants = {
        "K": share,
        "IS_COUNTED": is_counted,
        "CHAINED": is_chained,
        "OPENS": is_open and tiles.is_bulk,
        **_common(case, tiles),
        **_split(case, tiles),
        **rest,
    }
    main = Launch(backward_kernel, case.chunks * tiles.splits, constants)
    room = tiles.splits * case.chunks * (4 + share)
    if is_counted:
        return Pulling(main, None, room)
    added = {
        "CHUNKS": case.chunks,
        "SPLITS": tiles.splits,
        "K": share,
        "SIZE": case.width * case.rank,
        "RANK": case.rank,
        "HAS_BIAS": case.has_bias,
        "IS_GATED": case.activation == "gated",
        **rest,
        **_chain(is_chained),
    }
    programs = case.chunks + case.slots * triton.cdiv(share, PIECE)
    return Pulling(main, Launch(reduce_kernel, programs, added), room)
