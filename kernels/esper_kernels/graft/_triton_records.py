"""What the Triton kernels pass around by name. Loads no Triton."""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What a kernel knows of its case when it is compiled; a constant of the kernel."""

    NARROW: Any
    """Features of a narrow chunk."""
    NUM_WIDE: Any
    """How many chunks, the first ones, are one wider; 0 when all are narrow."""
    WIDTH: Any
    """F."""
    RANK: Any
    BM: Any
    """Rows of a tile."""
    BF: Any
    """Width of a tile."""
    BR: Any
    """Rank of a tile."""
    STEP: Any
    """Rows from one tile of a program to its next."""
    TILES: Any
    """Tiles of one program."""
    STAGES: Any
    ACTIVATION: Any
    HAS_BIAS: Any
    BULK: Any
    """Whether the copy engine moves tiles."""
    ALL_ROWS: Any
    """Whether every row of every tile is real."""
    PRECISION: Any


class Bank(NamedTuple):
    """Where the matrices of all slots begin, or those of their gradients."""

    down: Any
    up: Any
    bias: Any
    gate: Any


class Seed(NamedTuple):
    """The seed of a chunk."""

    slot: Any
    output_scale: Any
    param_grad_scale: Any
    input_grad_scale: Any
    output_damping: Any
    is_live: Any
    """Whether an adapter is at work."""


class Walk(NamedTuple):
    """The tiles of one program, all of one chunk."""

    row: Any
    """The first tile's first row."""
    start: Any
    """The chunk's first feature."""
    width: Any
    """The chunk's features."""
    num_rows: Any
    """N."""
    offsets: Any
    """[BM, BF]: of a tile's entries from its corner."""
    corner: Any
    """Offset of the first tile's corner."""
    stride: Any
    """From one corner to the next."""


class Tile(NamedTuple):
    """One tile of a walk."""

    row: Any
    start: Any
    entries: Any
    """[BM, BF]: offsets."""
    is_row: Any
    """[BM]"""
    is_column: Any
    """[BF]"""


class Matrices(NamedTuple):
    """One adapter; bias and gate stand for nothing where it has none."""

    down: Any
    up: Any
    bias: Any
    gate: Any


class Hidden(NamedTuple):
    """What going back through the activation of one tile needs and gives."""

    a: Any
    r: Any
    slope: Any
    """What the adapter descends: `dy`, or `dy + output_damping * r`."""
    slope_h: Any
    slope_z: Any
    """The gate's, for `gated`."""
    worth: Any
    """[BM]: -<dy, r>."""


class Sums(NamedTuple):
    """Sums by row of a tile, over all tiles of a walk."""

    slope_square: Any
    output_square: Any
    worth: Any
    flaw: Any
    """0, or NaN once something was not finite."""


class Gradients(NamedTuple):
    """An adapter's gradients over all tiles of a walk."""

    down: Any
    up: Any
    """Transposed: 64 rows fill a warp group's product."""
    bias: Any
    gate: Any


class Share(NamedTuple):
    """How the splits' shares of an adapter's gradients lie in memory; a constant of a kernel.

    A share is down [F, R], up [R, F], bias [R], gate [F, R].
    """

    ENTRIES: Any
    SIZE: Any
    """F R"""
    RANK: Any
    HAS_BIAS: Any
    IS_GATED: Any
    SPLITS: Any
    BK: Any
    """Entries that are added up at once."""
    BS: Any
    """Splits, as a power of two."""
    BC: Any
    """Chunks that are searched at once."""
