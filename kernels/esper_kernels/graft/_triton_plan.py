"""What is known of kernels before a call: constants, programs, sizes of what they leave behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from esper_kernels.graft._blocks import Tiles, has_engine, padded
from esper_kernels.graft._case import Case
from esper_kernels.graft._triton_backward import backward_kernel
from esper_kernels.graft._triton_forward import forward_kernel
from esper_kernels.graft._triton_launch import Launch
from esper_kernels.graft._triton_reduce import reduce_kernel
from esper_kernels.graft._triton_statistics import PAD, statistics_kernel

PIECE = 1024
"""Entries of a share that are added up at once."""


class Pass(NamedTuple):
    """The launches of a forward or backward pass."""

    main: Launch
    finish: Launch | None
    """Adds up what the programs leave, where nothing counts which is the last to arrive."""
    room: int
    """Floats that the programs leave behind; 0 where one program has a chunk to itself."""


def forward_launches(
    case: Case, tiles: Tiles, *, only_reads: bool, is_counted: bool, is_compiled: bool = False
) -> Pass:
    """Plan the forward pass.

    Args:
      case: what is computed.
      tiles: how it is cut.
      only_reads: whether no adapter acts and nothing is written.
      is_counted: whether counters tell who adds up.
      is_compiled: whether a compiler launches the kernels, which it does one after the other.
    """
    chain = _chain(case, is_compiled)
    splits = {"BS": triton.next_power_of_2(tiles.splits)}
    constants = {
        "ONLY_READS": only_reads,
        "IS_COUNTED": is_counted,
        # Rows of a tile that the sums keep apart.
        "GROUP": min(tiles.rows, max(1, tiles.warps * 256 // padded(case)[0])),
        **_shape(case, tiles),
        **splits,
        **chain,
    }
    programs, finish = case.chunks * tiles.splits, None
    if tiles.splits > 1 and not is_counted:
        added = {"CHUNKS": case.chunks, "SPLITS": tiles.splits, **_cut(case), **splits, **chain}
        finish = Launch(statistics_kernel, case.chunks, added)
    room = programs * (padded(case)[0] + PAD) if tiles.splits > 1 else 0
    return Pass(Launch(forward_kernel, programs, constants), finish, room)


def backward_launches(
    case: Case,
    tiles: Tiles,
    *,
    is_counted: bool,
    is_beside: bool,
    is_open: bool = False,
    is_compiled: bool = False,
) -> Pass:
    """Plan the backward pass.

    Args:
      case: what is computed.
      tiles: how it is cut.
      is_counted: whether counters tell who adds up.
      is_beside: whether the forward statistics stand before the backward ones.
      is_open: whether the kernel is given arrays, whose tiles it describes itself: for compilers,
        and for bound calls of narrow chunks.
      is_compiled: whether a compiler launches the kernels, which it does one after the other.
    """
    chain = _chain(case, is_compiled)
    entries = share_entries(case)
    share = {
        "ENTRIES": entries,
        "BK": PIECE,
        "BS": triton.next_power_of_2(tiles.splits),
        "BC": min(1024, triton.next_power_of_2(case.chunks)),
        "BESIDE": is_beside,
    }
    constants = {
        "IS_COUNTED": is_counted,
        "OPENS": is_open and tiles.is_bulk,
        **_shape(case, tiles),
        **share,
        **chain,
    }
    main = Launch(backward_kernel, case.chunks * tiles.splits, constants)
    room = tiles.splits * case.chunks * (4 + entries)
    if is_counted:
        return Pass(main, None, room)
    added = {
        "CHUNKS": case.chunks,
        "SPLITS": tiles.splits,
        "SIZE": case.width * case.rank,
        "RANK": case.rank,
        "HAS_BIAS": case.has_bias,
        "IS_GATED": case.activation == "gated",
        **share,
        **chain,
    }
    programs = case.chunks + case.slots * triton.cdiv(entries, PIECE)
    return Pass(main, Launch(reduce_kernel, programs, added), room)


def share_entries(case: Case) -> int:
    """Count the entries of one chunk's share of the gradients: down, up, bias, gate."""
    size = case.width * case.rank
    return 2 * size + case.has_bias * case.rank + (case.activation == "gated") * size


def _cut(case: Case) -> dict[str, Any]:
    return {
        "NARROW": case.features // case.chunks,
        "NUM_WIDE": case.num_wide,
        "BF": padded(case)[0],
    }


def _shape(case: Case, tiles: Tiles) -> dict[str, Any]:
    """The constants that make up a kernel's `Shape`, and its warps."""
    num_tiles = triton.cdiv(triton.cdiv(case.rows, tiles.rows), tiles.splits)
    return _cut(case) | {
        "WIDTH": case.width,
        "RANK": case.rank,
        "BM": tiles.rows,
        "BR": padded(case)[1],
        "SPLITS": tiles.splits,
        "TILES": num_tiles,
        "STAGES": tiles.stages,
        "ACTIVATION": case.activation,
        "HAS_BIAS": case.has_bias,
        "BULK": tiles.is_bulk,
        "ALL_ROWS": case.rows == num_tiles * tiles.rows * tiles.splits,
        "PRECISION": "ieee" if case.dtype == "float32" else "tf32",
        "num_warps": tiles.warps,
    }


def _chain(case: Case, is_compiled: bool) -> dict[str, Any]:
    """Let programs start while those of the kernel before end, where the device can.

    Each kernel waits for the one before it before it reads or writes anything that kernel may
    write, whoever launched that.
    """
    if is_compiled or not has_engine(case):
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}
