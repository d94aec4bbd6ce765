"""`graft` in Triton, for CUDA devices and, with TRITON_INTERPRET=1, for tests on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from esper_kernels.graft import reference_torch
from esper_kernels.graft._blocks import (
    Tiles,
    backward_tiles,
    forward_tiles,
    in_place_tiles,
    multiprocessors,
    padded,
)
from esper_kernels.graft._case import NUM_CHANNELS, NUM_WATCHED, Body, Case
from esper_kernels.graft._triton_backward import backward_kernel, reduce_kernel
from esper_kernels.graft._triton_forward import forward_kernel, in_place_kernel, watch_kernel
from esper_kernels.graft._triton_parts import IS_INTERPRETED

MAX_SIDE = 256
MAX_MATRIX = 16384
MAX_SEARCHED = 1024
"""Chunks among which each program in place looks for the live ones itself."""
PROGRAMS_IN_PLACE = 2
"""A multiprocessor."""


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


def _common(case: Case, tiles: Tiles) -> dict[str, Any]:
    width, rank = padded(case)
    num_tiles = triton.cdiv(triton.cdiv(case.rows, tiles.rows), tiles.splits)
    return {
        "NARROW": case.features // case.chunks,
        "NUM_WIDE": case.num_wide,
        "WIDTH": case.width,
        "RANK": case.rank,
        "SPLITS": tiles.splits,
        "TILES": num_tiles,
        "BM": tiles.rows,
        "BF": width,
        "BR": rank,
        "STAGES": tiles.stages,
        "BULK": tiles.is_bulk,
        "ACTIVATION": case.activation,
        "HAS_BIAS": case.has_bias,
        "ALL_ROWS": case.rows == num_tiles * tiles.rows * tiles.splits,
        "PRECISION": "ieee" if case.dtype == "float32" else "tf32",
        "num_warps": tiles.warps,
    }


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
    is_in_place = y is x
    tiles = _aligned(tiles, x, y)
    watched = x.new_empty((case.chunks, NUM_WATCHED), dtype=torch.float32)
    sums = watched
    if tiles.splits > 1:
        sums = x.new_empty((tiles.splits, 2, case.features), dtype=torch.float32)
    common = {
        **_common(case, tiles),
        "GROUP": min(tiles.rows, max(1, tiles.warps * 256 // padded(case)[0])),
    }
    if is_in_place and tiles.splits > 1 and case.chunks <= MAX_SEARCHED:
        num_items = case.chunks * tiles.splits
        programs = min(num_items, multiprocessors(case) * PROGRAMS_IN_PLACE)
        in_place_kernel[(programs,)](
            _view(case, tiles, x),
            *_bank(x, body),
            slot,
            gains,
            sums,
            case.rows,
            case.features,
            case.slots,
            CHUNKS=case.chunks,
            BC=triton.next_power_of_2(case.chunks),
            PROGRAMS=programs,
            **common,
        )
    else:
        forward_kernel[(case.chunks * tiles.splits,)](
            _view(case, tiles, x),
            _view(case, tiles, y),
            *_bank(x, body),
            slot,
            gains,
            sums,
            watched,
            case.rows,
            case.features,
            case.chunks,
            case.slots,
            IN_PLACE=is_in_place,
            **common,
        )
    if tiles.splits > 1:
        watch_kernel[(case.chunks,)](
            sums,
            watched,
            slot,
            gains,
            case.rows,
            case.features,
            case.slots,
            SPLITS=tiles.splits,
            NARROW=case.features // case.chunks,
            NUM_WIDE=case.num_wide,
            BS=triton.next_power_of_2(tiles.splits),
            BF=padded(case)[0],
            IN_PLACE=is_in_place,
            BULK=tiles.is_bulk,
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
    return x, _launch_forward(case, x, x, body, slot, gains, tiles or in_place_tiles(case))


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
