"""Schedules inside an optimiser's state, and what sets them to the run's clock."""

from __future__ import annotations

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
    return isinstance(node, _FOLLOWING) or _counts_only(node)


def _counts_only(node: Any) -> bool:
    """Whether it is the state of a plain schedule among injected hyperparameters."""
    return getattr(node, "_fields", ()) == ("count",)


def schedules(state: optax.OptState) -> list[Any]:
    """The parts of an optimiser's state that schedules read."""
    return [node for node in jax.tree.leaves(state, is_leaf=_is_schedule) if _is_schedule(node)]


def set_clock(state: optax.OptState, clock: Clock) -> optax.OptState:
    """A bank's state with its schedules where the run's are."""
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_schedule)
    host = iter(clock.host or ())

    def wide(leaf: Any, like: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(leaf, like.dtype), like.shape)

    def counted(node: Any) -> Any:
        if not _counts_only(node):
            return node
        return node._replace(count=wide(clock.num_updates, node.count))

    def follow(node: Any) -> Any:
        if isinstance(node, _COUNTING) or _counts_only(node):
            node = node._replace(count=wide(clock.num_updates, node.count))
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            inner = jax.tree.map(counted, node.hyperparams_states, is_leaf=_counts_only)
            node = node._replace(hyperparams_states=inner)
        if not _is_schedule(node):
            return node
        of_host = None if clock.host is None else next(host)
        own = ("inner_state",) if hasattr(node, "inner_state") else ()
        if own:
            within = None if of_host is None else schedules(of_host.inner_state)
            inner = set_clock(node.inner_state, clock._replace(host=within))
            node = node._replace(inner_state=inner)
        if of_host is None:
            return node
        taken = {
            name: jax.tree.map(wide, getattr(of_host, name), getattr(node, name))
            for name in node._fields
            if name not in own
        }
        return node._replace(**taken)

    return jax.tree.unflatten(structure, [follow(node) for node in nodes])
