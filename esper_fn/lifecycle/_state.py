"""The arrays that describe every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._records import record
from esper_fn._typing import Array, Bool, Float32, Int8, Int32
from esper_fn.lifecycle._stages import GAIN_CONSTANT, GAIN_OF_ALPHA, Stage

NONE = -1
"""Marks "no slot", "no blueprint", "nobody"."""
UNSERVED = -2
"""In place of a slot: the blueprint cannot grow at that site."""


FAST_STEPS = 10
SLOW_STEPS = 50
"""Memories of the averages. Up to `FAST_STEPS` steps the two are one: their gap says nothing."""


@record
class Telemetry(NamedTuple):
    """Exponential averages of what the steps measured; zero where `num_steps` is 0."""

    mean: Float32[Array, "S"]
    variance: Float32[Array, "S"]
    dead_fraction: Float32[Array, "S"]
    """Share of the chunk's features that were zero for a whole call."""
    output_share: Float32[Array, "S"]
    """RMS of the adapter's output over RMS of its target chunk."""
    utility: Float32[Array, "S"]
    """`-<dy, r>`: first-order fall of the loss if the adapter acted fully."""
    utility_slow: Float32[Array, "S"]
    gradient_norm: Float32[Array, "S"]
    """`|dy|` of the chunk."""
    gradient_scale: Float32[Array, "S"]
    """`|dy| / |x|` of the chunk."""
    num_steps: Int32[Array, "S"]
    """Steps averaged so far; 0 means not measured."""
    num_live_steps: Int32[Array, "S"]
    """Steps since germination that measured an adapter; 0 means utility is not measured."""


@record
class SeedState(NamedTuple):
    """Everything the lifecycle knows of the seeds, one row a seed (under 200 bytes)."""

    stage: Int8[Array, "S"]
    parent: Int8[Array, "S"]
    """The stage before this one."""
    steps_in_stage: Int32[Array, "S"]
    is_paused: Bool[Array, "S"]
    blueprint: Int8[Array, "S"]
    """Index in the layout's blueprints, or `NONE`."""
    slot: Int32[Array, "S"]
    """Index on the flat slot axis Q, or `NONE`."""
    alpha: Float32[Array, "S"]
    graft: Int8[Array, "S"]
    embargo_steps: Int32[Array, "S"]
    error_count: Int32[Array, "S"]
    stability: Float32[Array, "S"]
    """Averaged share of steps whose loss stayed within its usual band; 1 is calm."""
    telemetry: Telemetry
    potential: Float32[Array, "S"]
    num_potentials: Int32[Array, "S"]
    """Surveys that measured the potential; 0 means not measured."""
    contribution: Float32[Array, "S"]
    num_contributions: Int32[Array, "S"]
    """Ablations since the seed entered its stage; 0 means not measured."""


def seed_state(num_seeds: int) -> SeedState:
    """`num_seeds` dormant seeds.

    >>> seed_state(3).stage.tolist()
    [0, 0, 0]
    """

    def full(value: float, dtype: Any) -> Array:
        return jnp.full((num_seeds,), value, dtype)

    def zeros() -> Array:
        return full(0, jnp.float32)

    def counter() -> Array:
        return full(0, jnp.int32)

    return SeedState(
        stage=full(Stage.DORMANT, jnp.int8),
        parent=full(Stage.DORMANT, jnp.int8),
        steps_in_stage=counter(),
        is_paused=full(False, jnp.bool_),
        blueprint=full(NONE, jnp.int8),
        slot=full(NONE, jnp.int32),
        alpha=zeros(),
        graft=full(0, jnp.int8),
        embargo_steps=counter(),
        error_count=counter(),
        stability=full(1.0, jnp.float32),
        telemetry=Telemetry(
            mean=zeros(),
            variance=zeros(),
            dead_fraction=zeros(),
            output_share=zeros(),
            utility=zeros(),
            utility_slow=zeros(),
            gradient_norm=zeros(),
            gradient_scale=zeros(),
            num_steps=counter(),
            num_live_steps=counter(),
        ),
        potential=zeros(),
        num_potentials=counter(),
        contribution=zeros(),
        num_contributions=counter(),
    )


def gains(stage: Int8[Array, "..."], alpha: Float32[Array, "..."]) -> Float32[Array, "... 3"]:
    """The first three gains of each seed, from its stage and alpha.

    >>> gains(jnp.int8(Stage.GRAFTING), jnp.float32(0.25)).tolist()
    [0.25, 1.0, 0.25]
    """
    row = stage.astype(jnp.int32)
    return jnp.asarray(GAIN_CONSTANT)[row] + jnp.asarray(GAIN_OF_ALPHA)[row] * alpha[..., None]


def is_in(stage: Int8[Array, "..."], stages: Sequence[Stage] | np.ndarray) -> Bool[Array, "..."]:
    """Whether each stage is one of `stages` (stages, or a bool[11] mask).

    >>> is_in(jnp.int8([0, 8]), [Stage.CULLED]).tolist()
    [False, True]
    """
    if isinstance(stages, np.ndarray) and stages.dtype == np.bool_:
        members = np.flatnonzero(stages).tolist()
    else:
        members = [int(member) for member in stages]
    # One shift whatever the number of stages: a comparison for each is much more to compile.
    mask = sum(1 << member for member in set(members))
    is_set = (jnp.uint32(mask) >> stage.astype(jnp.uint32)) & jnp.uint32(1)
    return is_set == 1


def per_stage(table: Array, stage: Int8[Array, "..."]) -> Array:
    """`table[stage]` for a table of one number a stage.

    Compares, selects and sums: a gather would read one element at a time.

    >>> per_stage(jnp.arange(11) * 10, jnp.int8([0, 3])).tolist()
    [0, 30]
    """
    numbers = jnp.arange(table.shape[0], dtype=stage.dtype)
    is_here = stage[..., None] == numbers.reshape((1,) * stage.ndim + (-1,))
    return jnp.sum(jnp.where(is_here, table, jnp.zeros_like(table)), -1, dtype=table.dtype)


def state_bytes_per_seed(num_seeds: int = 1024) -> float:
    """Bytes of `SeedState` per seed.

    >>> state_bytes_per_seed() < 200
    True
    """
    shapes = jax.eval_shape(lambda: seed_state(num_seeds))
    total: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return total / num_seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """One seed for people to read; a view of a row, never stored."""

    index: int
    site: str
    layer: int
    chunk: int
    stage: Stage
    parent: Stage
    steps_in_stage: int
    blueprint: str | None
    slot: int | None
    alpha: float
    graft: str
    embargo_steps: int
    error_count: int
    stability: float
    utility: float | None
    potential: float | None
    contribution: float | None
