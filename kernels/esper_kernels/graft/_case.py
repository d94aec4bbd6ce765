"""The static part of a call, and what is checked while tracing. Loads neither jax nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper_kernels._chunking import Chunking
from esper_kernels._errors import ArgumentError
from esper_kernels._records import ACTIVATIONS, NUM_GAINS, Adapter

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is known of a call before it runs; hashable.

    `device` is `cpu`, or an accelerator's name such as `NVIDIA H200`.
    """

    rows: int
    features: int
    chunks: int
    slots: int
    rank: int
    dtype: str
    adapter_dtype: str
    has_bias: bool
    activation: str
    device: str

    @property
    def chunking(self) -> Chunking:
        """How the features are split."""
        return Chunking(self.features, self.chunks)

    @property
    def width(self) -> int:
        """F, the width of the widest chunk."""
        return self.chunking.widest

    @property
    def is_even(self) -> bool:
        """Whether all chunks are F wide."""
        return self.chunking.is_even

    @property
    def num_wide(self) -> int:
        """How many chunks, the first ones, are one wider than the rest; 0 when even."""
        return self.chunking.num_wide


def _name(dtype: object) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def _fail(name: str, got: object, allowed: str, remedy: str = "") -> None:
    raise ArgumentError(f"{name} is {got}; it must be {allowed}{remedy and '; ' + remedy}")


def _expect(name: str, array: Any, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tuple(array.shape) != shape:
        _fail(f"{name}.shape", tuple(array.shape), str(shape))
    if _name(array.dtype) not in dtypes:
        _fail(f"{name}.dtype", _name(array.dtype), " or ".join(dtypes))


def check(x: Any, adapter: Adapter, slot: Any, gains: Any, *, activation: str, device: str) -> Case:
    """Return the case of a call.

    Args:
      x: [N, D].
      adapter: the bank's matrices.
      slot: [C].
      gains: [C, 4].
      activation: one of `ACTIVATIONS`.
      device: see `Case`.

    Raises:
      ArgumentError: shapes, dtypes or the activation do not fit together; names which.
    """
    if activation not in ACTIVATIONS:
        _fail("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if x.ndim != 2:
        _fail("x.ndim", x.ndim, "2: rows and features", "reshape(-1, features)")
    if slot.ndim != 1:
        _fail("slot.ndim", slot.ndim, "1: one slot a chunk")
    rows, features = x.shape
    chunks = slot.shape[0]
    if not 1 <= chunks <= features:
        _fail("slot.shape[0]", chunks, f"between 1 and the {features} features of x")
    if adapter.down.ndim != 3:
        _fail("adapter.down.ndim", adapter.down.ndim, "3: slots, width, rank")
    slots, _, rank = adapter.down.shape
    if slots < 1 or rank < 1:
        _fail("adapter.down.shape", tuple(adapter.down.shape), "at least one slot of rank 1")
    if (adapter.gate is not None) != (activation == "gated"):
        state = "None" if adapter.gate is None else "given"
        _fail("adapter.gate", state, "given exactly when activation is 'gated'")
    case = Case(
        rows=rows,
        features=features,
        chunks=chunks,
        slots=slots,
        rank=rank,
        dtype=_name(x.dtype),
        adapter_dtype=_name(adapter.down.dtype),
        has_bias=adapter.bias is not None,
        activation=activation,
        device=device,
    )
    same = (case.adapter_dtype,)
    _expect("x", x, (rows, features), DTYPES)
    _expect("adapter.down", adapter.down, (slots, case.width, rank), DTYPES)
    _expect("adapter.up", adapter.up, (slots, rank, case.width), same)
    if adapter.bias is not None:
        _expect("adapter.bias", adapter.bias, (slots, rank), same)
    if adapter.gate is not None:
        _expect("adapter.gate", adapter.gate, (slots, case.width, rank), same)
    _expect("slot", slot, (chunks,), ("int32",))
    _expect("gains", gains, (chunks, NUM_GAINS), ("float32",))
    return case


def check_watched(x: Any, chunks: int, *, device: str) -> Case:
    """Return the case of a call without adapters.

    Args:
      x: [N, D].
      chunks: C.
      device: see `Case`.

    Raises:
      ArgumentError: a dtype, rank or size is wrong; names which.
    """
    if x.ndim != 2:
        _fail("x.ndim", x.ndim, "2: rows and features", "reshape(-1, features)")
    rows, features = x.shape
    if not 1 <= chunks <= features:
        _fail("chunks", chunks, f"between 1 and the {features} features of x")
    _expect("x", x, (rows, features), DTYPES)
    return Case(
        rows=rows,
        features=features,
        chunks=chunks,
        slots=1,
        rank=1,
        dtype=_name(x.dtype),
        adapter_dtype=_name(x.dtype),
        has_bias=False,
        activation="none",
        device=device,
    )
