"""How a feature axis is split into chunks. Loads neither jax nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Chunking:
    """A feature axis split as `numpy.array_split` does: the first chunks may be one wider.

    Attributes:
      features: D, the width of the axis.
      chunks: C.

    >>> Chunking(10, 3).sizes.tolist()
    [4, 3, 3]
    """

    features: int
    chunks: int

    @property
    def widest(self) -> int:
        """Features of the widest chunk, F."""
        return -(-self.features // self.chunks)

    @property
    def is_even(self) -> bool:
        """Whether all chunks are equally wide."""
        return self.features % self.chunks == 0

    @property
    def num_wide(self) -> int:
        """How many chunks, the first ones, are one wider than the rest; 0 when even."""
        return self.features % self.chunks

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32[C]: features of each chunk."""
        narrow = self.features // self.chunks
        return (narrow + (np.arange(self.chunks) < self.num_wide)).astype(np.int32)

    @cached_property
    def starts(self) -> np.ndarray:
        """int32[C]: first feature of each chunk."""
        starts: np.ndarray = (np.cumsum(self.sizes) - self.sizes).astype(np.int32)
        return starts

    @cached_property
    def mask(self) -> np.ndarray:
        """bool[C, F]: which features of each chunk are real rather than padding."""
        mask: np.ndarray = np.arange(self.widest)[None, :] < self.sizes[:, None]
        return mask

    @cached_property
    def columns(self) -> np.ndarray:
        """int32[C, F]: the feature at each position of each chunk, D where padded."""
        columns = self.starts[:, None] + np.arange(self.widest, dtype=np.int32)[None, :]
        return np.where(self.mask, columns, np.int32(self.features))
