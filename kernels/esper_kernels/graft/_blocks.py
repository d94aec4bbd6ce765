"""Sizes of tiles: a pure function of shapes and device, chosen by measurement beforehand.

The tables hold what was fastest of some 150 choices on one H200, at 16,384 rows of 64 chunks in
bfloat16; other shapes scale from there. Loads neither jax nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from esper_kernels.graft._case import Case

NARROW = 32
"""Features up to which a chunk's rows are better moved by the copy engine than by threads going
back, whoever describes the tiles; going forward threads are as good, where a host would have to."""
_USUAL = 132
MULTIPROCESSORS = {"cpu": 4}
"""By device name, where not `_USUAL`; `cpu` stands for the interpreter, to want few programs."""
BULK_DEVICES = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H20", "NVIDIA GH200", "NVIDIA B", "NVIDIA GB")
"""How the names of devices with a copy engine for tiles begin: Hopper and newer."""
_MAX_SUMS = 16384
"""Entries that the kernel which adds up the splits' sums holds at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How one kernel cuts its work."""

    rows: int
    """Rows of a tile."""
    splits: int
    """Row ranges, each one program a chunk."""
    warps: int
    stages: int
    """Tiles in flight in a program."""
    is_bulk: bool = False
    """Whether the copy engine moves tiles."""


def without_engine(tiles: Tiles) -> Tiles:
    """The same where threads move the tiles, of which they keep fewer in flight."""
    return replace(tiles, is_bulk=False, stages=min(tiles.stages, 4))


class _Line(NamedTuple):
    """One line of a table: the first that fits is taken."""

    rank: int
    """Largest padded rank that it serves."""
    rows: int
    warps: int
    stages: int
    programs: int
    """A multiprocessor."""


_FORWARD = (_Line(16, 64, 4, 4, 2), _Line(64, 64, 4, 5, 2), _Line(256, 64, 8, 2, 2))
_BACKWARD = (_Line(32, 64, 4, 4, 2), _Line(64, 128, 8, 3, 1), _Line(256, 64, 8, 1, 1))
_NARROW_FORWARD = (_Line(16, 256, 4, 6, 2), *_FORWARD)
_NARROW_BACKWARD = (_Line(16, 128, 4, 3, 2), *_BACKWARD)
"""Where chunks are at most 16 wide; measured at 16,384 rows of 64 chunks."""


def padded(case: Case) -> tuple[int, int]:
    """Width and rank of the tiles: powers of two, at least 16 as matrix units need.

    >>> padded(Case(rows=1, features=40, chunks=1, slots=1, rank=3, dtype="float32",
    ...             adapter_dtype="float32", has_bias=False, activation="none", device="cpu"))
    (64, 16)
    """
    width, rank = (max(16, 1 << (size - 1).bit_length()) for size in (case.width, case.rank))
    return width, rank


def multiprocessors(case: Case) -> int:
    """Of the device."""
    return MULTIPROCESSORS.get(case.device, _USUAL)


def has_engine(case: Case) -> bool:
    """Tell whether the device is of Hopper's generation or newer, with a copy engine for tiles."""
    return case.device.startswith(BULK_DEVICES)


def _is_bulk(case: Case) -> bool:
    """Tell whether the engine can move this case's tiles: whole, aligned, a power of two wide."""
    return (
        has_engine(case)
        and case.dtype == "bfloat16"
        and case.is_even
        and padded(case)[0] == case.width
        and case.width <= 128
        and case.features % 8 == 0
    )


def _choose(case: Case, table: tuple[_Line, ...]) -> Tiles:
    width, rank = padded(case)
    line = next(line for line in table if rank <= line.rank and (width <= 64 or line is table[-1]))
    rows, stages = line.rows, line.stages
    if case.activation == "gated":
        rows, stages = min(rows, 64), min(stages, 2)
    if case.dtype == "float32":
        rows, stages = 32, 1
    if case.rows <= 64:
        rows = 32
    programs = multiprocessors(case) * line.programs
    most = min(-(-case.rows // rows), _MAX_SUMS // width)
    return Tiles(
        rows=rows,
        splits=max(1, min(programs // case.chunks, most)),
        warps=line.warps if rows > 32 else 4,
        stages=stages,
        is_bulk=_is_bulk(case),
    )


def forward_tiles(case: Case) -> Tiles:
    """Choose tiles of the forward pass.

    >>> case = Case(rows=16384, features=4096, chunks=64, slots=64, rank=16, dtype="bfloat16",
    ...             adapter_dtype="float32", has_bias=True, activation="relu", device="NVIDIA H200")
    >>> forward_tiles(case)
    Tiles(rows=64, splits=4, warps=4, stages=4, is_bulk=True)
    """
    return _choose(case, _FORWARD if padded(case)[0] > 16 else _NARROW_FORWARD)


def backward_tiles(case: Case) -> Tiles:
    """Choose tiles of the backward pass; each split costs a share of the adapter's gradients."""
    if padded(case)[0] <= 16:
        return _choose(case, _NARROW_BACKWARD)
    tiles = _choose(case, _BACKWARD)
    if tiles.rows == 32:
        return tiles
    # With a single tile of 64 rows or more a program reads illegal memory or gives wrong gradients
    # on an H200 with Triton 3.6; the cause is not known.
    pairs = case.rows // (2 * tiles.rows)
    if pairs:
        return replace(tiles, splits=min(tiles.splits, pairs))
    return replace(tiles, rows=32, warps=4)
