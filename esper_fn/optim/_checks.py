"""What an optimiser of adapters cannot be called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from esper_fn._arguments import describe
from esper_fn.optim._records import PerAdapterState, Slots

PAIR = "the pair (host parameters, adapters)"
_CALL = (
    "`optimizer.update(gradients, opt_state, (params, state.adapters), slots=growth.slots(state))`"
    ", of the state before `growth.update`"
)
_REMEDY = "use `ef.optim.per_adapter(optax.adam(1e-3))`"


def check_transformation(name: str, value: Any) -> None:
    """Raises `TypeError` unless the argument `name` is an Optax transformation."""
    if not _is_transformation(value):
        raise TypeError(
            f"{name} must be an Optax transformation, got {describe(value)}; "
            f"`{name}=optax.adam(1e-3)` for instance"
        )


def check_pair(call: str, pair: Any, allowed: str) -> None:
    """Raises `TypeError` unless something is a pair of a host's part and the adapters'.

    Args:
      call: `init` or `update`, for the message.
      pair: the argument.
      allowed: what it should be, for the message.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{call} takes {allowed}, got {type(pair).__name__}")
    for name, banks in pair[1].items() if isinstance(pair[1], Mapping) else [("", pair[1])]:
        if not isinstance(banks, Mapping):
            path = f"[{name!r}]" if name else ""
            raise TypeError(
                f"{call} takes {allowed}, in this order; the second one, a dict of sites and "
                f"blueprints, has {describe(banks)} at {path or 'its root'}"
            )


def check_update(gradients: Any, state: Any, params: Any, slots: Any) -> None:
    """Raises `TypeError` for what `update` of `per_adapter` cannot be called with."""
    if slots is None:
        raise TypeError(
            "update needs to know which adapters are new and which learn, in `slots=`: the call is "
            f"{_CALL}; Optax's wrappers around per_adapter hand `slots` on, except a MultiSteps "
            "inside another one: put it outside"
        )
    check_pair(
        "update",
        gradients,
        "the pair of gradients (d params, d adapters) of `growth.value_and_grad(loss_fn)`",
    )
    check_pair("update", params, f"{PAIR} third: {_CALL}")
    if not isinstance(state, PerAdapterState):
        raise TypeError(
            "update takes the state of this optimiser second, from `optimizer.init((params, "
            f"state.adapters))`, got {describe(state)}"
        )
    for site, banks in params[1].items():
        for name, bank in banks.items():
            if jax.tree.leaves(bank) and not _has_slots(slots, site, name):
                raise TypeError(
                    f"slots must be what `growth.slots(state)` returns, got {describe(slots)} "
                    f"without the slots of {name!r} at site {site!r}; the call is {_CALL}"
                )


def _has_slots(slots: Any, site: str, name: str) -> bool:
    try:
        return isinstance(slots[site][name], Slots)
    except (KeyError, TypeError):
        return False


def check_optimizer(optimizer: Any, opt_state: Any = None, adapters: Any = None) -> None:
    """Raises `TypeError` for an optimiser whose state would outlive an adapter.

    Args:
      optimizer: any object.
      opt_state: its state, if there is one yet.
      adapters: the adapters that the state is for.
    """
    if not _is_transformation(optimizer):
        raise TypeError(
            f"optimizer must be from optim.per_adapter, got {describe(optimizer)}; {_REMEDY}"
        )
    if opt_state is None:
        return
    if not find_states(opt_state):
        raise TypeError(
            "optimizer must be from optim.per_adapter, got an Optax transformation, under which a "
            f"newborn adapter inherits the moments of a dead one; {_REMEDY}"
        )
    if jax.tree.leaves(adapters) and _keeps_adapters(opt_state, jax.tree.structure(adapters)):
        raise TypeError(
            "optimizer wraps optim.per_adapter in an Optax transformation that keeps moments of "
            "the adapters itself, which a newborn adapter would inherit from a dead one; put it "
            "inside, as `ef.optim.per_adapter(optax.chain(optax.trace(0.9), optax.scale(-0.1)))`"
        )


def find_states(opt_state: Any) -> list[PerAdapterState]:
    """The states of `per_adapter` inside an optimiser's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, PerAdapterState))
    return [node for node in nodes if isinstance(node, PerAdapterState)]


def _keeps_adapters(opt_state: Any, structure: Any) -> bool:
    """Whether a wrapper's state has a tree like the adapters', other than a sum of gradients."""

    def is_adapters(node: Any) -> bool:
        return isinstance(node, dict) and bool(jax.tree.structure(node) == structure)

    def is_leaf(node: Any) -> bool:
        return isinstance(node, PerAdapterState | optax.MultiStepsState) or is_adapters(node)

    for node in jax.tree.leaves(opt_state, is_leaf=is_leaf):
        if isinstance(node, optax.MultiStepsState):
            if _keeps_adapters(node.inner_opt_state, structure):
                return True
        elif is_adapters(node):
            return True
    return False


def _is_transformation(value: Any) -> bool:
    has_both = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    return has_both and not isinstance(value, type)
