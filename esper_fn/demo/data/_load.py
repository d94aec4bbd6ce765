"""Loads data sets by name: one loader a data set, in one table."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from esper_fn.demo.data._dataset import Dataset
from esper_fn.demo.data._files import corrupt, locate, read_verified
from esper_fn.demo.data._idx import parse_idx
from esper_fn.demo.data._npz import Member, parse_npz
from esper_fn.demo.data._split import stratified_split
from esper_fn.demo.data._text import encode_text, next_character_windows
from esper_fn.errors import MissingDataError, UnknownDatasetError

_SPLIT_SEED = 0
_NUM_CLASSES = 10
_Parsed = TypeVar("_Parsed")


_Folder = str | os.PathLike[str] | None


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows.

    >>> names()
    ('digits', 'fashion-mnist', 'mnist1d', 'shakespeare')
    """
    return tuple(_LOADERS)


def load(name: str, *, folder: _Folder = None, context_length: int = 64) -> Dataset:
    """Returns a dataset, split the same way every time.

    Nothing is downloaded and nothing is unpickled: a file is looked for in `folder`, or else in
    `$ESPER_DATA` and then in `$XDG_CACHE_HOME/esper-fn/data` (`~/.cache/esper-fn/data`), and
    its SHA-256 digest is checked before it is parsed. `digits` comes with scikit-learn and needs
    no file.

    Args:
      name: one of `names()`.
      folder: the only folder to look in.
      context_length: `T`, characters in a window; read by language models only.

    Returns:
      The dataset.

    Raises:
      UnknownDatasetError: no dataset has this name.
      MissingDataError: a file, or scikit-learn for `digits`, is missing.
      CorruptDataError: a file is not the published one.
      ValueError: `context_length` is below 1 or longer than a split.

    >>> digits = load("digits")
    >>> digits.train_inputs.shape, digits.validation_inputs.shape, digits.test_inputs.shape
    ((1200, 64), (237, 64), (360, 64))
    """
    if name not in _LOADERS:
        raise UnknownDatasetError(
            f"name={name!r} is no dataset; choose one of {', '.join(names())}."
        )
    return _LOADERS[name](folder, context_length)


def _digits(folder: _Folder, context_length: int) -> Dataset:
    del folder, context_length
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingDataError(
            "digits comes with scikit-learn, which is not installed; run "
            "`pip install 'esper-fn[cli]'`."
        ) from error
    images, labels = load_digits(return_X_y=True)
    # scikit-learn's own stratified split with seed 0 is the one that published figures use.
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=_SPLIT_SEED
    )
    train, test = (images[rest], labels[rest]), (images[test], labels[test])
    return _classification("digits", train, test, num_validation=237, unit=16)


def _fashion_mnist(folder: _Folder, context_length: int) -> Dataset:
    del context_length
    files = {
        part: (
            f"fashion-mnist/{part}-images-idx3-ubyte.gz",
            f"fashion-mnist/{part}-labels-idx1-ubyte.gz",
        )
        for part in ("train", "t10k")
    }
    paths = locate(itertools.chain.from_iterable(files.values()), folder)

    def read(part: str, max_examples: int) -> tuple[np.ndarray, np.ndarray]:
        images_file, labels_file = files[part]
        parse_images = partial(parse_idx, max_examples=max_examples, example_shape=(28, 28))
        images = _parse(images_file, paths[images_file], parse_images)
        parse_labels = partial(_parse_idx_labels, num_examples=len(images))
        return images[..., None], _parse(labels_file, paths[labels_file], parse_labels)

    train, test = read("train", 60_000), read("t10k", 10_000)
    return _classification("fashion-mnist", train, test, num_validation=5_000, unit=255)


def _mnist1d(folder: _Folder, context_length: int) -> Dataset:
    del context_length
    file = "mnist1d/mnist1d.npz"

    def parse(content: bytes) -> dict[str, np.ndarray]:
        members = {
            "x": Member(dtype="float32", max_examples=4_000, example_shape=(40,)),
            "y": Member(dtype="uint8", max_examples=4_000),
            "x_test": Member(dtype="float32", max_examples=1_000, example_shape=(40,)),
            "y_test": Member(dtype="uint8", max_examples=1_000),
        }
        arrays = parse_npz(content, members)
        for inputs, labels in (("x", "y"), ("x_test", "y_test")):
            _check_labels(arrays[labels], len(arrays[inputs]))
            if not np.isfinite(arrays[inputs]).all():
                raise ValueError(f"array {inputs!r} holds values that are not finite")
        return arrays

    arrays = _parse(file, locate((file,), folder)[file], parse)
    train, test = (arrays["x"], arrays["y"]), (arrays["x_test"], arrays["y_test"])
    # It is published with zero mean and unit deviation.
    return _classification("mnist1d", train, test, num_validation=500, unit=1)


def _shakespeare(folder: _Folder, context_length: int) -> Dataset:
    file = "tinyshakespeare/input.txt"
    characters, vocabulary = _parse(file, locate((file,), folder)[file], encode_text)
    starts = [len(characters) * twentieths // 20 for twentieths in (0, 18, 19, 20)]
    (train, validation, test) = (
        next_character_windows(characters[start:end], context_length=context_length)
        for start, end in itertools.pairwise(starts)
    )
    return Dataset(
        name="shakespeare",
        task="language_model",
        train_inputs=train[0],
        train_targets=train[1],
        validation_inputs=validation[0],
        validation_targets=validation[1],
        test_inputs=test[0],
        test_targets=test[1],
        num_classes=len(vocabulary),
        input_shape=(context_length,),
        vocabulary=vocabulary,
    )


_LOADERS: Mapping[str, Callable[[_Folder, int], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist1d": _mnist1d,
    "shakespeare": _shakespeare,
}


def _parse(name: str, path: Path, parser: Callable[[bytes], _Parsed]) -> _Parsed:
    content = read_verified(name, path)
    try:
        return parser(content)
    except ValueError as error:
        raise corrupt(path, name, str(error)) from error


def _check_labels(labels: np.ndarray, num_examples: int) -> None:
    if len(labels) != num_examples:
        raise ValueError(f"there are {len(labels)} labels for {num_examples} examples")
    if labels.max() >= _NUM_CLASSES:
        raise ValueError(f"label {labels.max()} is not below {_NUM_CLASSES}")


def _parse_idx_labels(content: bytes, *, num_examples: int) -> np.ndarray:
    labels = parse_idx(content, max_examples=num_examples, example_shape=())
    _check_labels(labels, num_examples)
    return labels


def _classification(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_validation: int,
    unit: float,
) -> Dataset:
    inputs, targets = train[0].astype(np.float32) / np.float32(unit), train[1].astype(np.int32)
    rest, held_out = stratified_split(targets, num_held_out=num_validation, seed=_SPLIT_SEED)
    return Dataset(
        name=name,
        task="classification",
        train_inputs=inputs[rest],
        train_targets=targets[rest],
        validation_inputs=inputs[held_out],
        validation_targets=targets[held_out],
        test_inputs=test[0].astype(np.float32) / np.float32(unit),
        test_targets=test[1].astype(np.int32),
        num_classes=_NUM_CLASSES,
        input_shape=inputs.shape[1:],
    )
