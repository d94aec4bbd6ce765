"""An optimiser's state for a larger layout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from esper_fn._growth import GrowthState
from esper_fn._layout import Layout
from esper_fn.errors import CheckpointError
from esper_fn.optim import PerAdapterState
from esper_fn.optim._checks import find_states
from esper_fn.runtime import _rows


def enlarge_optimizer_state(
    saved: Any,
    params: Any,
    fresh: GrowthState,
    before: Layout,
    after: Layout,
    optimizer: optax.GradientTransformationExtraArgs | None,
    changes: list[str],
) -> Any:
    """Enlarges the state of `optim.per_adapter`, and of what may be wrapped around it.

    Args:
      saved: the state of the smaller growth.
      params: of the host.
      fresh: a first state of the larger growth.
      before: the smaller layout.
      after: the larger layout.
      optimizer: the one of the run.
      changes: gets a line where something begins anew.

    Raises:
      CheckpointError: the optimizer is not the run's.
    """
    opt_state = None if optimizer is None else optimizer.init((params, fresh.adapters))
    if not find_states(opt_state):
        raise CheckpointError(
            f"optimizer must be the run's, from `optim.per_adapter`, got {type(optimizer).__name__}"
            "; in a loop with another, enlarge the `GrowthState` alone"
        )

    if len(find_states(opt_state)) != len(find_states(saved)):
        raise CheckpointError("opt_state has another form: the optimizer is not the run's")
    states = [
        _per_adapter_state(old, own, before, after)
        for old, own in zip(find_states(saved), find_states(opt_state), strict=True)
    ]
    wrapper, saved_wrapper = _without_states(opt_state), _without_states(saved)
    if _rows.form(wrapper) == _rows.form(saved_wrapper):
        wrapper = jax.tree.map(jnp.asarray, saved_wrapper)
    else:
        changes.append("opt_state: what is around `per_adapter` begins anew")
    return _with_states(wrapper, opt_state, states)


def _is_state(node: Any) -> bool:
    return isinstance(node, PerAdapterState)


def _without_states(opt_state: Any) -> Any:
    """An optimiser's state with None for the states of `per_adapter` inside."""
    return jax.tree.map(
        lambda node: None if _is_state(node) else node, opt_state, is_leaf=_is_state
    )


def _with_states(wrapper: Any, like: Any, states: list[PerAdapterState]) -> Any:
    """The inverse of `_without_states`, for a state of the same form as `like`."""
    leaves, rest = iter(jax.tree.leaves(wrapper)), iter(states)
    return jax.tree.map(
        lambda node: next(rest) if _is_state(node) else next(leaves), like, is_leaf=_is_state
    )


def _per_adapter_state(
    old: PerAdapterState, own: PerAdapterState, before: Layout, after: Layout
) -> PerAdapterState:
    if _rows.form(own.host) != _rows.form(old.host):
        raise CheckpointError("opt_state.host has another form: the optimizer is not the run's")
    return own._replace(
        host=jax.tree.map(jnp.asarray, old.host),
        adapters=_rows.merge_banks(before, after, old.adapters, own.adapters),
        num_updates=jnp.asarray(old.num_updates),
        generation=_rows.merge_banks(before, after, old.generation, own.generation),
    )
