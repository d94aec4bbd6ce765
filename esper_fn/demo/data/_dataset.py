"""Defines the record that every loader returns.

Axis letters: `N` examples of one split, `T` characters of one window; `...` is the shape of
one example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float32, Int32

Task: TypeAlias = Literal["classification", "language_model"]
"""What is to be predicted: one class an example, or the next character at every position."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """Three disjoint splits of one data set, as numpy arrays.

    Two datasets are equal only when they are the same object: arrays have no truth value.

    Args:
      name: name that `load` knows.
      task: `classification` or `language_model`.
      train_inputs: float32 of about unit range, or int32 characters for a language model.
      train_targets: one class an example, or the next character at every position.
      validation_inputs: as `train_inputs`.
      validation_targets: as `train_targets`.
      test_inputs: as `train_inputs`.
      test_targets: as `train_targets`.
      num_classes: every target is in `[0, num_classes)`.
      input_shape: shape of one example.
      vocabulary: the character of each class of a language model, else None.

    Raises:
      ValueError: a split disagrees with `task`, `num_classes` or `input_shape`.
    """

    name: str
    task: Task
    train_inputs: Float32[np.ndarray, "N ..."] | Int32[np.ndarray, "N T"]
    train_targets: Int32[np.ndarray, "N"] | Int32[np.ndarray, "N T"]
    validation_inputs: Float32[np.ndarray, "N ..."] | Int32[np.ndarray, "N T"]
    validation_targets: Int32[np.ndarray, "N"] | Int32[np.ndarray, "N T"]
    test_inputs: Float32[np.ndarray, "N ..."] | Int32[np.ndarray, "N T"]
    test_targets: Int32[np.ndarray, "N"] | Int32[np.ndarray, "N T"]
    num_classes: int
    input_shape: tuple[int, ...]
    vocabulary: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(
                f"task={self.task!r} is not a task; choose one of {', '.join(get_args(Task))}."
            )
        is_text = self.task == "language_model"
        if is_text and (self.vocabulary is None or len(self.vocabulary) != self.num_classes):
            raise ValueError(
                f"vocabulary of {self.name!r} must hold num_classes={self.num_classes} characters."
            )
        for split in ("train", "validation", "test"):
            self._check(split, is_text)

    def _check(self, split: str, is_text: bool) -> None:
        inputs: np.ndarray = getattr(self, f"{split}_inputs")
        targets: np.ndarray = getattr(self, f"{split}_targets")
        dtype = np.int32 if is_text else np.float32
        if inputs.dtype != dtype or inputs.shape[1:] != self.input_shape:
            raise ValueError(
                f"{split}_inputs of {self.name!r} are {inputs.dtype}{list(inputs.shape)}; "
                f"{self.task} with input_shape={self.input_shape} needs "
                f"{np.dtype(dtype)}[N, {', '.join(map(str, self.input_shape))}]."
            )
        shape = inputs.shape if is_text else inputs.shape[:1]
        if targets.dtype != np.int32 or targets.shape != shape:
            raise ValueError(
                f"{split}_targets of {self.name!r} are {targets.dtype}{list(targets.shape)}; "
                f"they must be int32{list(shape)} to go with {split}_inputs."
            )
        if not targets.size or targets.min() < 0 or targets.max() >= self.num_classes:
            raise ValueError(
                f"{split}_targets of {self.name!r} must hold at least one target, each in "
                f"[0, {self.num_classes})."
            )
