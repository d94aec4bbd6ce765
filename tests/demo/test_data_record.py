"""The record refuses splits that disagree with what it says of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from esper_fn.demo.data import Dataset

CLASSIFICATION = Dataset(
    name="planted",
    task="classification",
    num_classes=3,
    input_shape=(2,),
    **{
        f"{split}_{part}": array
        for split in ("train", "validation", "test")
        for part, array in (
            ("inputs", np.zeros((4, 2), np.float32)),
            ("targets", np.arange(4, dtype=np.int32) % 3),
        )
    },
)
LANGUAGE = Dataset(
    name="planted",
    task="language_model",
    num_classes=3,
    input_shape=(2,),
    vocabulary=("a", "b", "c"),
    **{
        f"{split}_{part}": np.ones((4, 2), np.int32)
        for split in ("train", "validation", "test")
        for part in ("inputs", "targets")
    },
)


def test_is_frozen_and_equal_to_itself_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLASSIFICATION.name = "other"
    assert dataclasses.replace(CLASSIFICATION) != CLASSIFICATION
    assert len({CLASSIFICATION, LANGUAGE}) == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"task": "regression"}, "task='regression' is not a task; choose one of classification, "),
        ({"train_inputs": np.zeros((4, 2))}, r"train_inputs .* float64\[4, 2\]"),
        ({"test_inputs": np.zeros((4, 3), np.float32)}, r"needs float32\[N, 2\]"),
        ({"validation_targets": np.zeros(3, np.int32)}, r"must be int32\[4\]"),
        ({"train_targets": np.zeros(4, np.int64)}, "train_targets .* int64"),
        ({"train_targets": np.full(4, 3, np.int32)}, r"\[0, 3\)"),
        ({"train_targets": np.full(4, -1, np.int32)}, r"\[0, 3\)"),
        (
            {"test_inputs": np.zeros((0, 2), np.float32), "test_targets": np.zeros(0, np.int32)},
            "at least one",
        ),
    ],
)
def test_classification_refuses(changed: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(CLASSIFICATION, **changed)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"vocabulary": None}, "num_classes=3 characters"),
        ({"vocabulary": ("a", "b")}, "num_classes=3 characters"),
        ({"train_inputs": np.zeros((4, 2), np.float32)}, r"needs int32\[N, 2\]"),
        ({"train_targets": np.zeros(4, np.int32)}, r"must be int32\[4, 2\]"),
    ],
)
def test_language_model_refuses(changed: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(LANGUAGE, **changed)
