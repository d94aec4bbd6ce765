"""Batches and splits: every example exactly once, and the same ones everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from esper_fn.demo.data import batch_indices
from esper_fn.demo.data._split import stratified_split


class TestBatchIndices:
    @pytest.mark.parametrize(
        ("num_examples", "batch_size"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 2)]
    )
    def test_every_epoch_covers_every_example_exactly_once(
        self, num_examples: int, batch_size: int
    ) -> None:
        data = np.zeros((num_examples, 2))
        steps = batch_indices(data, data, batch_size=batch_size, num_steps=30, seed=3)
        assert steps.shape == (30, batch_size)
        assert steps.dtype == np.int32
        taken = steps.ravel()
        whole = len(taken) // num_examples * num_examples
        epochs = taken[:whole].reshape(-1, num_examples)
        everything = np.broadcast_to(np.arange(num_examples), epochs.shape)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), everything)
        assert len(set(taken[whole:].tolist())) == len(taken) - whole

    def test_order_changes_from_epoch_to_epoch_and_seed_to_seed(self) -> None:
        data = np.zeros(50)
        first = batch_indices(data, data, batch_size=50, num_steps=2, seed=0)
        assert (first[0] != first[1]).any()
        assert (first != batch_indices(data, data, batch_size=50, num_steps=2, seed=1)).any()

    def test_same_seed_same_batches_and_more_steps_only_append(self) -> None:
        data = np.zeros(11)
        short = batch_indices(data, data, batch_size=4, num_steps=5, seed=7)
        long = batch_indices(data, data, batch_size=4, num_steps=50, seed=7)
        np.testing.assert_array_equal(short, long[:5])

    def test_stream_is_the_one_of_every_release(self) -> None:
        steps = batch_indices(range(6), range(6), batch_size=4, num_steps=3, seed=0)
        assert steps.tolist() == [[3, 2, 1, 0], [4, 5, 5, 2], [0, 1, 4, 3]]

    def test_positions_are_uniform(self) -> None:
        steps = batch_indices(range(4), range(4), batch_size=4, num_steps=4_000, seed=1)
        counts = np.array([np.bincount(column, minlength=4) for column in steps.T])
        # A count of 4,000 draws at 1/4 has a standard deviation of 27.
        assert np.abs(counts - 1_000).max() < 5 * 27

    def test_no_steps_is_an_empty_array(self) -> None:
        assert batch_indices([1], [1], batch_size=3, num_steps=0, seed=0).shape == (0, 3)

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"inputs": [], "targets": []}, "inputs hold 0 examples"),
            ({"targets": [1]}, "targets 1"),
            ({"batch_size": 0}, "batch_size=0 must be at least 1"),
            ({"num_steps": -1}, "num_steps=-1 must be at least 0"),
            ({"seed": -1}, "seed=-1 must be at least 0"),
        ],
    )
    def test_refuses_sizes_out_of_bounds(self, changed: dict[str, object], reason: str) -> None:
        sound = {"inputs": [1, 2], "targets": [1, 2], "batch_size": 1, "num_steps": 1, "seed": 0}
        with pytest.raises(ValueError, match=reason):
            batch_indices(**{**sound, **changed})


class TestStratifiedSplit:
    @pytest.mark.parametrize("num_held_out", [1, 7, 30, 99])
    def test_parts_are_disjoint_and_keep_the_shares(self, num_held_out: int) -> None:
        labels = np.repeat([3, 5, 8], [60, 30, 10])
        rest, held_out = stratified_split(labels, num_held_out=num_held_out, seed=0)
        assert len(held_out) == num_held_out
        assert sorted([*rest, *held_out]) == list(range(100))
        assert rest.dtype == held_out.dtype == np.int32
        for label, share in ((3, 0.6), (5, 0.3), (8, 0.1)):
            assert abs((labels[held_out] == label).sum() - share * num_held_out) < 1

    def test_same_seed_same_split(self) -> None:
        labels = np.arange(50) % 5
        first = stratified_split(labels, num_held_out=20, seed=0)[1]
        np.testing.assert_array_equal(first, stratified_split(labels, num_held_out=20, seed=0)[1])
        assert (first != stratified_split(labels, num_held_out=20, seed=1)[1]).any()

    @pytest.mark.parametrize("num_held_out", [-1, 0, 4, 5])
    def test_refuses_an_empty_part(self, num_held_out: int) -> None:
        with pytest.raises(ValueError, match=r"must be in \[1, 3\]"):
            stratified_split(np.array([0, 0, 1, 1]), num_held_out=num_held_out, seed=0)
