"""`graft` in Triton, for CUDA devices and, with TRITON_INTERPRET=1, for tests on any machine."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from esper_kernels.graft import reference_torch
from esper_kernels.graft._arrivals import arrivals
from esper_kernels.graft._blocks import (
    Tiles,
    backward_tiles,
    forward_tiles,
    in_place_tiles,
    padded,
)
from esper_kernels.graft._case import NUM_CHANNELS, NUM_WATCHED, Body, Case
from esper_kernels.graft._triton_backward import backward_kernel, reduce_kernel
from esper_kernels.graft._triton_forward import forward_kernel, in_place_kernel
from esper_kernels.graft._triton_launch import Launch, Tile, on_device_of
from esper_kernels.graft._triton_parts import IS_INTERPRETED
from esper_kernels.graft._triton_watch import watch_in_place_kernel, watch_kernel

MAX_SIDE = 256
MAX_MATRIX = 16384
MAX_SEARCHED = 1024
"""Chunks among which each program in place looks for the live ones itself."""
MAX_PARTS = 64
"""Row ranges of a chunk in place: sums that one program adds up at once."""
PAD = 32
"""Floats behind the sums of squares by feature; the first is the sum of values."""


def refuses(case: Case) -> str | None:
    """Why Triton cannot serve a case, None if it can."""
    if case.device == "cpu" and not IS_INTERPRETED:
        return (
            "x is on the CPU; Triton needs a CUDA device (TRITON_INTERPRET=1 interprets, for tests)"
        )
    width, rank = padded(case)
    if max(width, rank) > MAX_SIDE or width * rank > MAX_MATRIX:
        return (
            f"a chunk {case.width} wide with rank {case.rank} does not stay on a multiprocessor; "
            f"width and rank may be {MAX_SIDE} at most, their product {MAX_MATRIX} "
            f"(padded to powers of two)"
        )
    return None


# --- what is known before a call --------------------------------------------------------------


def _cut(case: Case, tiles: Tiles) -> dict[str, Any]:
    return {
        "NARROW": case.features // case.chunks,
        "NUM_WIDE": case.num_wide,
        "BF": padded(case)[0],
        "BULK": tiles.is_bulk,
    }


def _common(case: Case, tiles: Tiles) -> dict[str, Any]:
    return _cut(case, tiles) | {
        "WIDTH": case.width,
        "RANK": case.rank,
        "BM": tiles.rows,
        "BR": padded(case)[1],
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


def _chained(tiles: Tiles) -> dict[str, Any]:
    """A second kernel's programs start while the first one's last ones run, where Hopper can."""
    return {"launch_pdl": True} if tiles.is_bulk else {}


class _Watched(NamedTuple):
    """The launches of a forward pass."""

    main: Launch
    finish: Launch | None
    """Adds the programs' sums up where nothing counts who is the last to arrive."""
    sums: tuple[int, int] | None
    """The shape of the programs' sums; None where one program has a chunk to itself."""


class _Pulled(NamedTuple):
    """The launches of a backward pass."""

    main: Launch
    reduce: Launch
    share: int
    """Entries of one chunk's share of the gradients."""


def _forward_launches(case: Case, tiles: Tiles, is_in_place: bool, is_counted: bool) -> _Watched:
    programs, width = case.chunks * tiles.splits, padded(case)[0]
    rest = {"BS": triton.next_power_of_2(tiles.splits), "PAD": PAD}
    constants = {
        "IN_PLACE": is_in_place,
        "IS_COUNTED": is_counted,
        **_common(case, tiles),
        **_split(case, tiles),
        **_folded(case, tiles),
        **rest,
    }
    added_up = None
    if tiles.splits > 1 and not is_counted:
        added = {"CHUNKS": case.chunks, "SPLITS": tiles.splits, **_cut(case, tiles), **rest}
        added_up = Launch(watch_kernel, case.chunks, added | _chained(tiles))
    sums = (programs, width + PAD) if tiles.splits > 1 else None
    return _Watched(Launch(forward_kernel, programs, constants), added_up, sums)


def _in_place_launches(case: Case, tiles: Tiles, is_counted: bool) -> _Watched:
    num_tiles = triton.cdiv(case.rows, tiles.rows)
    most = min(num_tiles, MAX_PARTS)
    programs = max(case.chunks, min(case.chunks * most, tiles.splits))
    rest = {
        "CHUNKS": case.chunks,
        "BC": triton.next_power_of_2(case.chunks),
        "PROGRAMS": programs,
        "MOST": most,
        "BS": triton.next_power_of_2(most),
        "PAD": PAD,
    }
    constants = {
        "IS_COUNTED": is_counted,
        "TILES": num_tiles,
        "ALL_ROWS": case.rows % tiles.rows == 0,
        **_common(case, tiles),
        **_folded(case, tiles),
        **rest,
    }
    added_up = None
    if not is_counted:
        added = _cut(case, tiles) | rest | _chained(tiles)
        added_up = Launch(watch_in_place_kernel, case.chunks, added)
    sums = (programs, padded(case)[0] + PAD)
    return _Watched(Launch(in_place_kernel, programs, constants), added_up, sums)


def _backward_launches(case: Case, tiles: Tiles) -> _Pulled:
    size = case.width * case.rank
    is_gated = case.activation == "gated"
    share = 2 * size + (case.rank if case.has_bias else 0) + (size if is_gated else 0)
    piece = 1024
    constants = {"K": share, **_common(case, tiles), **_split(case, tiles)}
    added = {
        "CHUNKS": case.chunks,
        "SPLITS": tiles.splits,
        "K": share,
        "SIZE": size,
        "RANK": case.rank,
        "BK": piece,
        "BS": triton.next_power_of_2(tiles.splits),
        "BC": min(1024, triton.next_power_of_2(case.chunks)),
        "HAS_BIAS": case.has_bias,
        "IS_GATED": is_gated,
        "BULK": tiles.is_bulk,
        **_chained(tiles),
    }
    return _Pulled(
        Launch(backward_kernel, case.chunks * tiles.splits, constants),
        Launch(reduce_kernel, case.chunks + case.slots * triton.cdiv(share, piece), added),
        share,
    )


# --- calls -----------------------------------------------------------------------------------


class Calls:
    """All passes of one case on one device, with everything that is known before a call.

    Args:
      case: what every call has in common.
      tiles: for all passes; for measurements.
    """

    def __init__(self, case: Case, tiles: Tiles | None = None) -> None:
        self.case = case
        self._forward_tiles = tiles or forward_tiles(case)
        self._in_place_tiles = tiles or in_place_tiles(case)
        self._backward_tiles = tiles or backward_tiles(case)
        if case.chunks > MAX_SEARCHED:
            self._in_place_tiles = replace(forward_tiles(case), splits=1)
        self._sides = [case.rows, case.features], [case.features, 1]
        self._watched: dict[tuple[bool, bool, bool], _Watched] = {}
        self._pulled: dict[bool, _Pulled] = {}

    def forward(self, x: Tensor, body: Body, slot: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """`y` and `watched`; `x` is contiguous and may have any leading shape."""
        y = torch.empty_like(x)
        with on_device_of(x):
            return y, self._watch(x, y, body, slot, gains, self._forward_tiles)

    def forward_in_place(self, x: Tensor, body: Body, slot: Tensor, gains: Tensor) -> Tensor:
        """`watched`, with the live chunks of `x` rewritten."""
        tiles = self._in_place_tiles
        with on_device_of(x):
            if self.case.chunks > MAX_SEARCHED:
                return self._watch(x, x, body, slot, gains, tiles)
            return self._watch_in_place(x, body, slot, gains, tiles)

    def backward(
        self, x: Tensor, dy: Tensor, body: Body, slot: Tensor, gains: Tensor, watched: Tensor
    ) -> tuple[Tensor, Body, Tensor]:
        """`dx`, the body's gradients and `channels`."""
        case, tiles = self.case, _aligned(self._backward_tiles, x, dy)
        main, reduce, share = self._pulled.get(tiles.is_bulk) or self._pull(tiles)
        dx = torch.empty_like(x)
        d_body = Body(*(None if leaf is None else torch.empty_like(leaf) for leaf in body))
        channels = x.new_empty((case.chunks, NUM_CHANNELS), dtype=torch.float32)
        shares = x.new_empty((tiles.splits, case.chunks, share), dtype=torch.float32)
        sums = x.new_empty((tiles.splits, case.chunks, 4), dtype=torch.float32)
        with on_device_of(x):
            main(
                self._view(tiles, x),
                self._view(tiles, dy),
                self._view(tiles, dx),
                *_bank(x, body),
                slot,
                gains,
                shares,
                sums,
                case.rows,
                case.features,
                case.chunks,
                case.slots,
            )
            reduce(shares, sums, watched, slot, gains, *_bank(x, d_body), channels, case.slots)
        return dx, d_body, channels

    def _view(self, tiles: Tiles, of: Tensor) -> Any:
        """What a kernel takes for an activation."""
        if not tiles.is_bulk:
            return of
        return Tile(of, *self._sides, [tiles.rows, self.case.width])

    def _watch(
        self, x: Tensor, y: Tensor, body: Body, slot: Tensor, gains: Tensor, tiles: Tiles
    ) -> Tensor:
        case, tiles = self.case, _aligned(tiles, x, y)
        counters = arrivals(x, case.chunks) if tiles.splits > 1 else None
        key = tiles.is_bulk, y is x, counters is not None
        launches = self._watched.get(key)
        if launches is None:
            launches = self._watched[key] = _forward_launches(case, tiles, *key[1:])
        main, finish, shape = launches
        watched = x.new_empty((case.chunks, NUM_WATCHED), dtype=torch.float32)
        sums = watched if shape is None else x.new_empty(shape, dtype=torch.float32)
        main(
            self._view(tiles, x),
            self._view(tiles, y),
            *_bank(x, body),
            slot,
            gains,
            sums,
            watched,
            slot if counters is None else counters,
            case.rows,
            case.features,
            case.chunks,
            case.slots,
        )
        if finish is not None:
            finish(sums, watched, case.rows)
        return watched

    def _watch_in_place(
        self, x: Tensor, body: Body, slot: Tensor, gains: Tensor, tiles: Tiles
    ) -> Tensor:
        case, tiles = self.case, _aligned(tiles, x)
        counters = arrivals(x, case.chunks)
        key = tiles.is_bulk, True, counters is not None
        launches = self._watched.get(key)
        if launches is None:
            launches = self._watched[key] = _in_place_launches(case, tiles, key[2])
        main, finish, shape = launches
        sums = x.new_empty(shape, dtype=torch.float32)
        watched = x.new_empty((case.chunks, NUM_WATCHED), dtype=torch.float32)
        main(
            self._view(tiles, x),
            *_bank(x, body),
            slot,
            gains,
            sums,
            watched,
            slot if counters is None else counters,
            case.rows,
            case.features,
            case.slots,
        )
        if finish is not None:
            finish(sums, watched, slot, gains, case.rows, case.slots)
        return watched

    def _pull(self, tiles: Tiles) -> _Pulled:
        self._pulled[tiles.is_bulk] = _backward_launches(self.case, tiles)
        return self._pulled[tiles.is_bulk]


def _aligned(tiles: Tiles, *activations: Tensor) -> Tiles:
    """Without the copy engine where an activation does not begin at a multiple of 16 bytes."""
    if tiles.is_bulk and any(of.data_ptr() % 16 for of in activations):
        return replace(tiles, is_bulk=False)
    return tiles


def _bank(x: Tensor, body: Body) -> list[Tensor]:
    """The body's matrices; anything for those it lacks, which no kernel reads."""
    return [x if leaf is None else leaf for leaf in body]


@lru_cache(maxsize=1024)
def calls(case: Case, device: torch.device, tiles: Tiles | None = None) -> Calls:
    """The passes of a case; kept, as is what Triton compiles for them."""
    del device  # for which alone they are compiled
    return Calls(case, tiles)


def bind(case: Case, x: Tensor) -> Calls | reference_torch.Calls:
    """What serves calls like this one."""
    return calls(case, x.device) if case.rows else reference_torch.bind(case, x)


def forward(
    case: Case,
    x: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`y` and `watched`; see the README beside this file. `tiles` is for measurements."""
    if case.rows == 0:
        return reference_torch.forward(case, x, body, slot, gains)
    return calls(case, x.device, tiles).forward(x, body, slot, gains)


def forward_in_place(
    case: Case,
    x: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """The same into the memory of `x`; dormant chunks are neither read nor written."""
    if case.rows == 0:
        return reference_torch.forward_in_place(case, x, body, slot, gains)
    return x, calls(case, x.device, tiles).forward_in_place(x, body, slot, gains)


def backward(
    case: Case,
    x: Tensor,
    dy: Tensor,
    body: Body,
    slot: Tensor,
    gains: Tensor,
    watched: Tensor,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Body, Tensor]:
    """`dx`, the body's gradients and `channels`; see the README beside this file."""
    if case.rows == 0:
        return reference_torch.backward(case, x, dy, body, slot, gains, watched)
    return calls(case, x.device, tiles).backward(x, dy, body, slot, gains, watched)
