"""`graft` in Triton, for CUDA devices and, with TRITON_INTERPRET=1, for tests on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


def _aligned(tiles: Tiles, *activations: Tensor) -> Tiles:
    """Without the copy engine where an activation does not begin at a multiple of 16 bytes."""
    is_aligned = all(of.data_ptr() % 16 == 0 for of in activations)
    return replace(tiles, is_bulk=tiles.is_bulk and is_aligned)


def _chained(tiles: Tiles) -> dict[str, Any]:
    """A second kernel's programs start while the first one's last ones run, where Hopper can."""
    return {"launch_pdl": True} if tiles.is_bulk else {}


def _view(case: Case, tiles: Tiles, of: Tensor) -> Any:
    """What a kernel takes for an activation."""
    if not tiles.is_bulk:
        return of
    return TensorDescriptor(
        of, [case.rows, case.features], [case.features, 1], [tiles.rows, case.width]
    )


def _bank(x: Tensor, body: Body) -> tuple[Tensor, ...]:
    """The body's matrices; anything for those it lacks, which no kernel reads."""
    return tuple(x if leaf is None else leaf for leaf in body)


def _launch_forward(
    case: Case, x: Tensor, y: Tensor, body: Body, slot: Tensor, gains: Tensor, tiles: Tiles
) -> Tensor:
    """`watched`, with `y` written."""
    tiles = _aligned(tiles, x, y)
    programs, width = case.chunks * tiles.splits, padded(case)[0]
    watched = x.new_empty((case.chunks, NUM_WATCHED), dtype=torch.float32)
    sums, counters = watched, None
    if tiles.splits > 1:
        sums = x.new_empty((programs, width + PAD), dtype=torch.float32)
        counters = arrivals(x, case.chunks)
    rest = {"BS": triton.next_power_of_2(tiles.splits), "PAD": PAD}
    forward_kernel[(programs,)](
        _view(case, tiles, x),
        _view(case, tiles, y),
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
        IN_PLACE=y is x,
        IS_COUNTED=counters is not None,
        **_common(case, tiles),
        **_split(case, tiles),
        **_folded(case, tiles),
        **rest,
    )
    if tiles.splits > 1 and counters is None:
        watch_kernel[(case.chunks,)](
            sums,
            watched,
            case.rows,
            CHUNKS=case.chunks,
            SPLITS=tiles.splits,
            **_cut(case, tiles),
            **rest,
            **_chained(tiles),
        )
    return watched


def _launch_in_place(
    case: Case, x: Tensor, body: Body, slot: Tensor, gains: Tensor, tiles: Tiles
) -> Tensor:
    """`watched`, with the live chunks of `x` rewritten."""
    tiles = _aligned(tiles, x)
    num_tiles = triton.cdiv(case.rows, tiles.rows)
    most = min(num_tiles, MAX_PARTS)
    programs = max(case.chunks, min(case.chunks * most, tiles.splits))
    sums = x.new_empty((programs, padded(case)[0] + PAD), dtype=torch.float32)
    watched = x.new_empty((case.chunks, NUM_WATCHED), dtype=torch.float32)
    counters = arrivals(x, case.chunks)
    rest = {
        "CHUNKS": case.chunks,
        "BC": triton.next_power_of_2(case.chunks),
        "PROGRAMS": programs,
        "MOST": most,
        "BS": triton.next_power_of_2(most),
        "PAD": PAD,
    }
    in_place_kernel[(programs,)](
        _view(case, tiles, x),
        *_bank(x, body),
        slot,
        gains,
        sums,
        watched,
        slot if counters is None else counters,
        case.rows,
        case.features,
        case.slots,
        IS_COUNTED=counters is not None,
        TILES=num_tiles,
        ALL_ROWS=case.rows % tiles.rows == 0,
        **_common(case, tiles),
        **_folded(case, tiles),
        **rest,
    )
    if counters is None:
        watch_in_place_kernel[(case.chunks,)](
            sums,
            watched,
            slot,
            gains,
            case.rows,
            case.slots,
            **_cut(case, tiles),
            **rest,
            **_chained(tiles),
        )
    return watched


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
    y = torch.empty_like(x)
    return y, _launch_forward(case, x, y, body, slot, gains, tiles or forward_tiles(case))


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
    if case.chunks > MAX_SEARCHED:
        tiles = replace(forward_tiles(case), splits=1)
        return x, _launch_forward(case, x, x, body, slot, gains, tiles)
    return x, _launch_in_place(case, x, body, slot, gains, tiles or in_place_tiles(case))


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
    tiles = _aligned(tiles or backward_tiles(case), x, dy)
    size = case.width * case.rank
    is_gated = body.gate is not None
    share = 2 * size + (case.rank if case.has_bias else 0) + (size if is_gated else 0)
    dx = torch.empty_like(x)
    d_body = Body(*(None if leaf is None else torch.empty_like(leaf) for leaf in body))
    channels = x.new_empty((case.chunks, NUM_CHANNELS), dtype=torch.float32)
    shares = x.new_empty((tiles.splits, case.chunks, share), dtype=torch.float32)
    sums = x.new_empty((tiles.splits, case.chunks, 4), dtype=torch.float32)
    backward_kernel[(case.chunks * tiles.splits,)](
        _view(case, tiles, x),
        _view(case, tiles, dy),
        _view(case, tiles, dx),
        *_bank(x, body),
        slot,
        gains,
        shares,
        sums,
        case.rows,
        case.features,
        case.chunks,
        case.slots,
        K=share,
        **_common(case, tiles),
        **_split(case, tiles),
    )
    piece = 1024
    reduce_kernel[(case.chunks + case.slots * triton.cdiv(share, piece),)](
        shares,
        sums,
        watched,
        slot,
        gains,
        *_bank(x, d_body),
        channels,
        case.slots,
        CHUNKS=case.chunks,
        SPLITS=tiles.splits,
        K=share,
        SIZE=size,
        RANK=case.rank,
        BK=piece,
        BS=triton.next_power_of_2(tiles.splits),
        BC=min(1024, triton.next_power_of_2(case.chunks)),
        HAS_BIAS=case.has_bias,
        IS_GATED=is_gated,
        BULK=tiles.is_bulk,
        **_chained(tiles),
    )
    return dx, d_body, channels
