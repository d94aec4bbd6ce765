"""A training state as files hold it: each snapshot of the roll-back by itself.

In the compiled step the snapshots are stacked, so that one is written in place. On disk each stands
alone, so that one which was not renewed is not written again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import checkpoint, rollback
from esper_fn.runtime._step import TrainState


class SavedRing(NamedTuple):
    """A `rollback.Anchor` in which `snapshots` is a tuple, place by place."""

    snapshots: tuple[rollback.Snapshot, ...]
    newest: Any
    num_held: Any
    age: Any
    due: Any
    every: Any


checkpoint.register(TrainState, "esper_fn.TrainState")
checkpoint.register(SavedRing, "esper_fn.rollback.SavedRing")


def saved_form(state: TrainState) -> TrainState:
    """What to hand to `Writer.save`: the state with its snapshots one by one.

    Leaves of the snapshots may be views of the state's memory, as `Writer.save` copies them.
    """
    held = state.anchor
    if held is None:
        return state
    snapshots = tuple(
        jax.tree.map(lambda leaf, at=place: _row(leaf, at), held.snapshots)
        for place in range(held.num_snapshots)
    )
    ring: Any = SavedRing(**{**held._asdict(), "snapshots": snapshots})
    return state._replace(anchor=ring)


def saved_parts(state: TrainState, under: str = "state") -> tuple[str, ...]:
    """The `parts` of `Writer.save` for `{under: saved_form(state)}`.

    What is stored apart: a frozen host, or a snapshot that was not renewed, is not written again.
    """
    num = 0 if state.anchor is None else state.anchor.num_snapshots
    of_anchor = [
        f"anchor/snapshots/{place}/{name}"
        for place in range(num)
        for name in ("params", "opt_state")
    ]
    return tuple(f"{under}/{name}" for name in ("params", "opt_state", "growth", *of_anchor))


def live_form(state: TrainState) -> TrainState:
    """The reverse of `saved_form`; leaves a state of any other form as it is."""
    held: Any = state.anchor
    if not isinstance(held, SavedRing):
        return state
    stacked = jax.tree.map(lambda *rows: _stacked(rows), *held.snapshots)
    return state._replace(anchor=rollback.Anchor(**{**held._asdict(), "snapshots": stacked}))


def num_saved(held: SavedRing | rollback.Anchor) -> int:
    """How many snapshots an anchor has, in memory or from a file."""
    return len(held.snapshots) if isinstance(held, SavedRing) else held.num_snapshots


class _Example(NamedTuple):
    """Whatever of an anchor may hold pytree nodes that are rebuilt only beside an example."""

    snapshots: tuple[rollback.Snapshot, ...]


def example(state: TrainState) -> TrainState:
    """The `like` for restoring what `saved_form` made of such a state."""
    if state.anchor is None:
        return state
    one = rollback.snapshot(state.params, state.opt_state, state.growth)
    held: Any = _Example((one,) * state.anchor.num_snapshots)
    return state._replace(anchor=held)


def _row(leaf: Any, place: int) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or jax.default_backend() != "cpu":
        return leaf[place]
    return np.asarray(leaf)[place]


def _stacked(rows: tuple[Any, ...]) -> Any:
    if jnp.issubdtype(rows[0].dtype, jax.dtypes.prng_key):
        return jnp.stack(rows)
    return np.stack(rows)
