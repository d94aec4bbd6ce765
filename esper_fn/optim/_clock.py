"""Schedules inside an optimiser's state, and how they are set to the clock of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from esper_fn._typing import Array, Int32


class Clock(NamedTuple):
    """What the schedules of an adapter's transformation read."""

    num_updates: Int32[Array, ""]
    host: list[Any] | None
    """The host's schedules, where adapters have the same transformation."""


_COUNTING = (
    optax.ScaleByScheduleState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)
_FOLLOWING = (*_COUNTING, optax.contrib.ReduceLROnPlateauState)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, _FOLLOWING) or _only_counts(node)


def _only_counts(node: Any) -> bool:
    """Whether it is the state of a plain schedule among injected hyperparameters."""
    return getattr(node, "_fields", ()) == ("count",)


def find_schedules(state: optax.OptState) -> list[Any]:
    """The parts of an optimiser's state that schedules read."""
    return [node for node in jax.tree.leaves(state, is_leaf=_is_schedule) if _is_schedule(node)]


def set_clock(state: optax.OptState, clock: Clock) -> optax.OptState:
    """A bank's state, with its schedules where the run's are."""
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_schedule)
    host = iter(clock.host or ())
    return jax.tree.unflatten(structure, [_follow(node, clock, host) for node in nodes])


def _broadcast(leaf: Any, like: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(leaf, like.dtype), like.shape)


def _set_count(node: Any, clock: Clock) -> Any:
    return node._replace(count=_broadcast(clock.num_updates, node.count))


def _follow(node: Any, clock: Clock, host: Iterator[Any]) -> Any:
    """One node of a state: its counts set, and what it reads taken over from the host's node."""
    if isinstance(node, _COUNTING) or _only_counts(node):
        node = _set_count(node, clock)
    if isinstance(node, optax.InjectStatefulHyperparamsState):
        inner = jax.tree.map(
            lambda part: _set_count(part, clock) if _only_counts(part) else part,
            node.hyperparams_states,
            is_leaf=_only_counts,
        )
        node = node._replace(hyperparams_states=inner)
    if not _is_schedule(node):
        return node
    host_node = None if clock.host is None else next(host)
    has_inner = hasattr(node, "inner_state")
    if has_inner:
        schedules = None if host_node is None else find_schedules(host_node.inner_state)
        inner = set_clock(node.inner_state, clock._replace(host=schedules))
        node = node._replace(inner_state=inner)
    if host_node is None:
        return node
    names = [name for name in node._fields if not (has_inner and name == "inner_state")]
    fields = {
        name: jax.tree.map(_broadcast, getattr(host_node, name), getattr(node, name))
        for name in names
    }
    return node._replace(**fields)
