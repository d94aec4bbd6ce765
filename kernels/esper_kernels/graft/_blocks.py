"""Sizes of tiles: a pure function of shapes and device, chosen by measurement beforehand.

The tables hold what `python -m benchmarks kernels run` found fastest on one H200; other devices use
them scaled to their number of multiprocessors. Loads neither jax nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper_kernels.graft._case import Case

MULTIPROCESSORS = {"NVIDIA H200": 132, "NVIDIA H100 80GB HBM3": 132, "cpu": 4}
"""By device name; `cpu` stands for the interpreter, where few programs are wanted."""
_USUAL = 132


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
    """Whether the copy engine moves tiles (Hopper and newer; even chunks a power of two wide)."""
    registers: int | None = None
    """At most so many a thread; None leaves it to the compiler."""


def multiprocessors(case: Case) -> int:
    """Of the device, or what most have where it is not in the table."""
    return MULTIPROCESSORS.get(case.device, _USUAL)


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def padded(case: Case) -> tuple[int, int]:
    """Width and rank of the tiles: powers of two, at least 16 as matrix units need.

    >>> from esper_kernels.graft._case import Case
    >>> padded(Case(rows=1, features=40, chunks=1, slots=1, rank=3, dtype="float32",
    ...             body_dtype="float32", has_bias=False, activation="none", device="cpu"))
    (64, 16)
    """
    return _power(case.width), _power(case.rank)


# (largest rank, rows of a tile, warps, stages, programs a multiprocessor), for bfloat16, width 64
_FORWARD = ((16, 64, 4, 2, 16), (64, 64, 4, 2, 16), (256, 64, 4, 2, 8))
_BACKWARD = ((16, 64, 4, 2, 4), (64, 64, 4, 2, 2), (256, 64, 8, 2, 2))


def _choose(case: Case, table: tuple[tuple[int, int, int, int, int], ...]) -> Tiles:
    width, rank = padded(case)
    _, rows, warps, stages, per_sm = next(line for line in table if rank <= line[0])
    if case.dtype == "float32" or width > 64:
        rows, stages = rows // 2, 1
    if width * rank > 4096:
        warps = 8
    if case.rows <= 32:
        rows = 32
    programs = multiprocessors(case) * per_sm
    splits = max(1, min(programs // case.chunks, -(-case.rows // (2 * rows))))
    return Tiles(rows=rows, splits=splits, warps=warps, stages=stages)


def forward_tiles(case: Case) -> Tiles:
    """Of the forward pass."""
    return _choose(case, _FORWARD)


def backward_tiles(case: Case) -> Tiles:
    """Of the backward pass; its splits cost a share of the body's gradients each."""
    return _choose(case, _BACKWARD)
