"""A training state as files have it: each snapshot of the roll-back by itself.

In the compiled step the snapshots are stacked, so that one is written in place. On disk each stands
alone, so that one which was not renewed is not written again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import checkpoint, rollback
from esper_fn._records import record
from esper_fn.checkpoint import Restored, Writer
from esper_fn.runtime._step import TrainState


@record
class PackedRing(NamedTuple):
    """A `rollback.Ring` in which `snapshots` is a tuple, place by place."""

    snapshots: tuple[rollback.Snapshot, ...]
    steps: Any
    next_step: Any
    every: Any
    is_elevated: Any

    @property
    def num_snapshots(self) -> int:
        """As a ring in memory has it."""
        return len(self.snapshots)


def save_state(
    writer: Writer,
    step: int,
    state: TrainState,
    *,
    record: Any = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Saves a training state asynchronously, from a loop of your own.

    Parts that have not changed since an earlier step, a frozen host or a snapshot of the roll-back,
    are not written again. `fit` saves by itself.

    Args:
      writer: of the folder.
      step: training steps done.
      state: copied before this returns; a step may donate it then.
      record: JSON to have back.
      metrics: numbers for `checkpoint.best`.

    Raises:
      CheckpointError: as `Writer.save`.
    """
    value = {"state": pack(state)}
    writer.save(step, value, record=record, metrics=metrics, parts=parts_of(state))


def restore_state(
    source: str | os.PathLike[str] | Writer,
    step: int | None = None,
    *,
    like: TrainState | None = None,
    key: bytes | None = None,
) -> Restored:
    """Reads back the training state that `save_state` or `fit` saved.

    Args:
      source: a checkpoint folder, or the writer that has it open.
      step: the newest sound one when left out.
      like: a fresh state of the run; needed only where the host's parameters or the optimiser's
        state have pytree nodes other than dicts, lists, tuples and registered NamedTuples.
      key: for the HMAC, of a folder; a writer has its own.

    Returns:
      As `checkpoint.restore`; `value` is the `TrainState`, for `fit(start=)` or a loop of your own.

    Raises:
      NoCheckpointError: no step, or no sound one.
      CheckpointError: as `checkpoint.restore`; `only='state'` names nothing in a step of another
        form.
    """
    options: dict[str, Any] = {"only": "state", "like": None if like is None else example(like)}
    if isinstance(source, Writer):
        restored = source.restore(step, **options)
    else:
        restored = checkpoint.restore(source, step, key=key, **options)
    return restored._replace(value=unpack(restored.value))


def pack(state: Any) -> Any:
    """A `TrainState` with its snapshots one by one; any other state as it is.

    Leaves of the snapshots may be views of the state's memory, as `Writer.save` copies them.
    """
    if not isinstance(state, TrainState) or state.ring is None:
        return state
    ring = state.ring
    snapshots = tuple(
        jax.tree.map(partial(_row, index), ring.snapshots) for index in range(ring.num_snapshots)
    )
    packed: Any = PackedRing(**ring._asdict() | {"snapshots": snapshots})
    return state._replace(ring=packed)


def unpack(state: Any) -> Any:
    """The reverse of `pack`; a state that is not packed stays as it is."""
    ring = state.ring if isinstance(state, TrainState) else None
    if not isinstance(ring, PackedRing):
        return state
    snapshots = jax.tree.map(lambda *rows: _stacked(rows), *ring.snapshots)
    return state._replace(ring=rollback.Ring(**ring._asdict() | {"snapshots": snapshots}))


def parts_of(state: Any) -> tuple[str, ...]:
    """The `parts` of `Writer.save` for `{"state": pack(state)}`: what is stored on its own."""
    if not isinstance(state, TrainState):
        return ()
    names = ["params", "opt_state", "growth_state"]
    for index in range(0 if state.ring is None else state.ring.num_snapshots):
        names += [f"ring/snapshots/{index}/{name}" for name in ("params", "opt_state")]
    return tuple(f"state/{name}" for name in names)


def example(state: Any) -> Any:
    """The `like` for restoring what `pack` made of such a state."""
    if not isinstance(state, TrainState) or state.ring is None:
        return state
    now = rollback.take_snapshot(state.params, state.opt_state, state.growth_state)
    # Nothing else of a ring may have pytree nodes that are rebuilt only beside an example.
    fields = dict.fromkeys(PackedRing._fields) | {"snapshots": (now,) * state.ring.num_snapshots}
    ring: Any = PackedRing(**fields)
    return state._replace(ring=ring)


def _row(index: int, leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    on_host = not is_key and jax.default_backend() == "cpu"
    return (np.asarray(leaf) if on_host else leaf)[index]


def _stacked(rows: tuple[Any, ...]) -> Any:
    is_key = jnp.issubdtype(rows[0].dtype, jax.dtypes.prng_key)
    return jnp.stack(rows) if is_key else np.stack(rows)
