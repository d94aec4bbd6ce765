"""Sizes of tiles, a pure function of shapes and device."""

from itertools import product

import pytest

from esper_kernels.graft._blocks import backward_tiles
from esper_kernels.graft._case import Case


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backward_programs_with_tiles_of_64_rows_have_two_or_more(dtype):
    """Where they have one, Triton 3.6 has given wrong gradients."""
    for rows, chunks, width, rank in product(
        (1, 64, 65, 127, 128, 200, 2048, 16384), (1, 4, 64), (32, 64, 128, 250), (4, 32, 64)
    ):
        case = Case(
            rows=rows,
            features=chunks * width,
            chunks=chunks,
            slots=chunks,
            rank=rank,
            dtype=dtype,
            adapter_dtype="float32",
            has_bias=True,
            activation="relu",
            device="NVIDIA H200",
        )
        tiles = backward_tiles(case)
        num_tiles = -(-rows // tiles.rows)
        assert tiles.rows == 32 or -(-num_tiles // tiles.splits) >= 2, (case, tiles)
