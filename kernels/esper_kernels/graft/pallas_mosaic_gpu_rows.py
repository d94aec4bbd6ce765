"""What a program of the backward Pallas kernel has at hand: operands, shared memory, its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from esper_kernels.graft._case import Case
from esper_kernels.graft.pallas_mosaic_gpu_parts import (
    COLUMNS,
    ROWS,
    Tuning,
    matrix,
    padded_rank,
)

NUM_SUMS = 4
"""Sums by row of a tile: dy^2, r^2, dy * r, and NaN where an entry of p is not finite (else 0)."""


class Operands(NamedTuple):
    """References to what a kernel reads, and `dx`, which it writes."""

    x: Any
    dy: Any
    dx: Any
    down: Any
    up: Any
    bias: Any


class Results(NamedTuple):
    """References to what one program leaves."""

    grads: Any
    sums: Any
    d_bias: Any


class Seed(NamedTuple):
    """The seed of a program's chunk."""

    chunk: Any
    slot: Any
    input_grad_scale: Any
    live: Any
    """Whether an adapter is at work; None where only live chunks have programs."""


class Memory(NamedTuple):
    """Shared memory of one program."""

    x: Any
    slope: Any
    a: Any
    da: Any
    down: Any
    up: Any
    down_narrow: Any
    """`down` as the products over R want it tiled, the same where there are many columns."""
    up_narrow: Any
    bias: Any
    sums: Any
    x_arrived: Any
    slope_arrived: Any
    matrices_arrived: Any


def is_narrow(case: Case) -> bool:
    """Whether the hidden layer has fewer columns than the widest swizzle."""
    return padded_rank(case) < COLUMNS


def x_stages(tuning: Tuning) -> int:
    """Count the buffers for tiles of `x`."""
    return max(2, tuning.stages - 1)


def scratch_types(case: Case, tuning: Tuning) -> tuple[Any, ...]:
    """Shared memory in the order of `Memory`, without matrices that would be there twice."""
    width, rank, narrow = case.width, padded_rank(case), is_narrow(case)
    hidden = matrix(rank, ROWS) if narrow else matrix(ROWS, rank)
    weight = matrix(rank, width)
    return (
        matrix(x_stages(tuning), ROWS, width),
        matrix(tuning.stages, ROWS, width),
        hidden,
        hidden,
        weight,
        weight,
        *((matrix(rank, width, minor=rank),) * 2 if narrow else ()),
        plgpu.SMEM((rank,), jnp.float32),
        plgpu.SMEM((NUM_SUMS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=x_stages(tuning)),
        plgpu.Barrier(num_barriers=tuning.stages),
        plgpu.Barrier(num_arrivals=2 + 2 * narrow + case.has_bias),
    )


def name_memory(case: Case, scratch: tuple[Any, ...]) -> Memory:
    """Name what `scratch_types` describes."""
    again = () if is_narrow(case) else scratch[4:6]
    return Memory(*scratch[:6], *again, *scratch[6:])


@dataclass(frozen=True, kw_only=True)
class Range:
    """One program's range of rows of one chunk, and the tiles in flight for it."""

    case: Case
    tuning: Tuning
    operands: Operands
    seed: Seed
    memory: Memory
    first: Any
    """Number of its first tile."""
    count: Any
    """Tiles."""
    columns: Any

    def rows(self, ref: Any, step: Any) -> Any:
        """The tile of an activation at a step."""
        return ref.at[pl.ds((self.first + step) * ROWS, ROWS), self.columns]

    def fetch_x(self, step: Any, buffer: Any) -> None:
        """Start the copy of a tile of `x`."""
        memory = self.memory
        tile = self.rows(self.operands.x, step)
        plgpu.copy_gmem_to_smem(tile, memory.x.at[buffer], memory.x_arrived.at[buffer])

    def fetch_slope(self, step: Any, buffer: Any) -> None:
        """Start the copy of a tile of `dy`."""
        memory = self.memory
        tile = self.rows(self.operands.dy, step)
        plgpu.copy_gmem_to_smem(tile, memory.slope.at[buffer], memory.slope_arrived.at[buffer])

    def send(self, step: Any, tile: Any) -> None:
        """Start the copy of a tile into `dx`; the one before has left, so refill its buffer."""
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, self.rows(self.operands.dx, step))
        refill = step - 1 + self.tuning.stages

        @pl.when((step > 0) & (refill < self.count))
        def _refill() -> None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.fetch_slope(refill, lax.rem(refill, self.tuning.stages))

    def when_live(self, do: Callable[[], None]) -> None:
        """Do it where an adapter is at work."""
        if self.seed.live is None:
            do()
        else:
            pl.when(self.seed.live)(do)

    def fetch_matrices(self) -> None:
        """Start the copies of the adapter's matrices."""
        memory, operands, slot = self.memory, self.operands, self.seed.slot
        arrived = memory.matrices_arrived
        plgpu.copy_gmem_to_smem(operands.down.at[slot], memory.down, arrived)
        plgpu.copy_gmem_to_smem(operands.up.at[slot], memory.up, arrived)
        if is_narrow(self.case):
            plgpu.copy_gmem_to_smem(operands.down.at[slot], memory.down_narrow, arrived)
            plgpu.copy_gmem_to_smem(operands.up.at[slot], memory.up_narrow, arrived)
        if self.case.has_bias:
            plgpu.copy_gmem_to_smem(operands.bias.at[slot], memory.bias, arrived)

    def fetch_first_tiles(self) -> None:
        """Fill all buffers of tiles, those of `x` where an adapter is at work."""
        live = self.seed.live
        for ahead in range(self.tuning.stages):
            pl.when(ahead < self.count)(partial(self.fetch_slope, ahead, ahead))
        for ahead in range(x_stages(self.tuning)):
            is_needed = ahead < self.count if live is None else live & (ahead < self.count)
            pl.when(is_needed)(partial(self.fetch_x, ahead, ahead))
