"""The static part of a call of `potential`, and what is checked while tracing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper_kernels._errors import ArgumentError

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class PotentialCase:
    """What is known of a call before it runs; hashable."""

    rows: int
    features: int
    chunks: int
    dtype: str
    device: str

    @property
    def width(self) -> int:
        """F, the width of the widest chunk."""
        return -(-self.features // self.chunks)

    @property
    def num_wide(self) -> int:
        """How many chunks, the first ones, are one wider than the rest; 0 when even."""
        return self.features % self.chunks


def _name(dtype: object) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def check(x: Any, dy: Any, is_asked: Any, *, device: str) -> PotentialCase:
    """Return the case of a call.

    Raises:
      ArgumentError: ranks, sizes or dtypes do not fit together; names which.
    """
    if x.ndim != 2 or tuple(dy.shape) != tuple(x.shape):
        raise ArgumentError(
            f"x is {tuple(x.shape)} and dy {tuple(dy.shape)}; both must be [rows, features]"
        )
    if _name(x.dtype) not in DTYPES or x.dtype != dy.dtype:
        raise ArgumentError(
            f"x is {_name(x.dtype)} and dy {_name(dy.dtype)}; both must be one of "
            f"{', '.join(DTYPES)}"
        )
    rows, features = x.shape
    if is_asked.ndim != 1 or not 1 <= is_asked.shape[0] <= features:
        raise ArgumentError(
            f"is_asked is {tuple(is_asked.shape)}; it must be [chunks], between 1 and the "
            f"{features} features of x"
        )
    if _name(is_asked.dtype) != "bool":
        raise ArgumentError(f"is_asked is {_name(is_asked.dtype)}; it must be bool")
    return PotentialCase(
        rows=rows,
        features=features,
        chunks=is_asked.shape[0],
        dtype=_name(x.dtype),
        device=device,
    )
