"""Encodes a text as characters and cuts them into windows that predict the next one."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32


def encode_text(content: bytes) -> tuple[Int32[np.ndarray, "L"], tuple[str, ...]]:
    """Returns a UTF-8 text as indices into its own vocabulary, and that vocabulary.

    Args:
      content: the text; `L` is its number of characters.

    Returns:
      The class of each character, and the characters in the order of their code points.

    Raises:
      ValueError: the content is not UTF-8.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error})") from error
    points = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
    used, classes = np.unique(points, return_inverse=True)
    return classes.astype(np.int32), tuple(chr(point) for point in used)


def next_character_windows(
    characters: Int32[np.ndarray, "L"], *, context_length: int
) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, "N T"]]:
    """Cuts characters into windows that do not overlap, each with its next characters.

    `targets[n, t]` is the character after `inputs[n, t]`; characters past the last whole
    window are left out.

    Args:
      characters: classes of `L` consecutive characters.
      context_length: `T`, characters in a window, at least 1.

    Raises:
      ValueError: there are too few characters for one window.

    >>> inputs, targets = next_character_windows(np.arange(6, dtype=np.int32), context_length=2)
    >>> inputs.tolist(), targets.tolist()
    ([[0, 1], [2, 3]], [[1, 2], [3, 4]])
    """
    if context_length < 1:
        raise ValueError(f"context_length={context_length} must be at least 1.")
    num_windows = (len(characters) - 1) // context_length
    if num_windows < 1:
        raise ValueError(
            f"context_length={context_length} is too long: a split of {len(characters)} characters "
            f"allows at most {max(len(characters) - 1, 0)}."
        )
    end = num_windows * context_length
    shape = (num_windows, context_length)
    return characters[:end].reshape(shape), characters[1 : end + 1].reshape(shape)
