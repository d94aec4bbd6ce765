"""The words that all packages share."""

import numpy as np
import pytest

from esper_kernels import (
    NUM_GAINS,
    NUM_STATISTICS,
    BackwardStatistics,
    Chunking,
    ForwardStatistics,
    Gains,
    Statistics,
)


def test_statistics_are_those_of_the_forward_and_of_the_backward_pass():
    assert Statistics._fields == ForwardStatistics._fields + BackwardStatistics._fields
    assert len(Statistics._fields) == NUM_STATISTICS


@pytest.mark.parametrize("record", [Gains, Statistics])
def test_columns_are_the_fields_in_order(record):
    columns = np.arange(2 * len(record._fields)).reshape(2, -1)
    named = record.from_columns(columns)
    assert [value.tolist() for value in named] == columns.T.tolist()
    assert len(Gains._fields) == NUM_GAINS


@pytest.mark.parametrize(("features", "chunks"), [(12, 3), (10, 3), (7, 7), (5, 1)])
def test_chunks_are_those_of_array_split(features, chunks):
    chunking, split = Chunking(features, chunks), np.array_split(np.arange(features), chunks)
    assert chunking.sizes.tolist() == [len(part) for part in split]
    assert chunking.starts.tolist() == [part[0] for part in split]
    assert chunking.widest == max(map(len, split))
    assert chunking.is_even == (len({len(part) for part in split}) == 1)
    for columns, is_real, part in zip(chunking.columns, chunking.mask, split, strict=True):
        assert columns[is_real].tolist() == part.tolist()
        assert (columns[~is_real] == features).all()
