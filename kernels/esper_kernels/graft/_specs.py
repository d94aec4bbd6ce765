"""Arguments that tests and benchmarks share. Loads neither jax nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esper_kernels._chunking import Chunking


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Sizes of one call, and where they come from."""

    name: str
    rows: int
    features: int
    chunks: int
    slots: int
    rank: int
    activation: str = "relu"
    has_bias: bool = True
    num_live: int | None = None
    """Chunks that are served; None for as many as there are slots."""

    @property
    def width(self) -> int:
        """F, the width of the widest chunk."""
        return Chunking(self.features, self.chunks).widest

    @property
    def is_small(self) -> bool:
        """Whether Triton's interpreter is done within about a second."""
        return self.rows * self.features <= 1 << 16 and self.chunks <= 64


class Inputs(NamedTuple):
    """float32 arrays of a `Spec`; gate is None but for `gated`."""

    x: np.ndarray
    dy: np.ndarray
    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray | None
    gate: np.ndarray | None
    slot: np.ndarray
    gains: np.ndarray


SPECS = (
    Spec(name="mlp", rows=128, features=256, chunks=16, slots=16, rank=8),
    Spec(
        name="resnet",
        rows=8 * 7 * 7,
        features=128,
        chunks=8,
        slots=4,
        rank=16,
        activation="silu",
    ),
    Spec(name="transformer", rows=96, features=256, chunks=4, slots=4, rank=16, activation="gelu"),
    Spec(
        name="low_rank",
        rows=64,
        features=128,
        chunks=2,
        slots=3,
        rank=4,
        activation="none",
        has_bias=False,
    ),
    Spec(
        name="gated",
        rows=80,
        features=64,
        chunks=2,
        slots=2,
        rank=16,
        activation="gated",
        has_bias=False,
    ),
    Spec(name="odd", rows=37, features=33, chunks=3, slots=5, rank=5, activation="gelu"),
    Spec(name="remainder", rows=50, features=70, chunks=3, slots=2, rank=7),
    Spec(
        name="gated_remainder",
        rows=33,
        features=47,
        chunks=4,
        slots=4,
        rank=3,
        activation="gated",
    ),
    Spec(name="one_chunk", rows=70, features=128, chunks=1, slots=1, rank=32, activation="silu"),
    Spec(name="one_row", rows=1, features=64, chunks=4, slots=4, rank=4, activation="none"),
    Spec(name="empty", rows=0, features=64, chunks=4, slots=4, rank=4),
    Spec(name="dormant", rows=40, features=96, chunks=6, slots=3, rank=4, num_live=0),
    # For a device.
    Spec(name="vision", rows=32 * 14 * 14, features=768, chunks=12, slots=12, rank=64),
    Spec(name="decoder", rows=4096, features=4096, chunks=32, slots=16, rank=64, activation="gelu"),
    Spec(name="wide_chunks", rows=2048, features=1024, chunks=4, slots=4, rank=32),
    Spec(
        name="large_gated",
        rows=2048,
        features=1024,
        chunks=16,
        slots=16,
        rank=64,
        activation="gated",
    ),
    Spec(name="many_chunks", rows=256, features=40_000, chunks=10_000, slots=64, rank=4),
    Spec(name="uneven_many", rows=300, features=5_000, chunks=70, slots=70, rank=16),
)
"""Real sizes of hosts, odd ones and edges; the last ones want a device."""


def draw(spec: Spec, seed: int = 0) -> Inputs:
    """Random inputs of unit scale, every live adapter with gains of its own and undamped.

    >>> draw(SPECS[0]).x.shape
    (128, 256)
    """
    source = np.random.default_rng(seed)

    def normal(*shape: int, over: float = 1.0) -> np.ndarray:
        return (source.standard_normal(shape) / over).astype(np.float32)

    width, rank, slots = spec.width, spec.rank, spec.slots
    most = min(spec.slots, spec.chunks)
    num_live = most if spec.num_live is None else spec.num_live
    slot = np.full(spec.chunks, -1, np.int32)
    slot[source.permutation(spec.chunks)[:num_live]] = source.permutation(slots)[:num_live]
    return Inputs(
        x=normal(spec.rows, spec.features),
        dy=normal(spec.rows, spec.features),
        down=normal(slots, width, rank, over=width**0.5),
        up=normal(slots, rank, width, over=rank**0.5),
        bias=normal(slots, rank) if spec.has_bias else None,
        gate=normal(slots, width, rank, over=width**0.5) if spec.activation == "gated" else None,
        slot=slot,
        gains=np.pad(source.uniform(0.25, 1.0, (spec.chunks, 3)), ((0, 0), (0, 1))).astype(
            np.float32
        ),
    )
