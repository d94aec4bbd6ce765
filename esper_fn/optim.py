"""Optax transformations for a host and its bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from esper_fn._control import once_if
from esper_fn._lattice import select_slots
from esper_fn._typing import Array, Bodies, Bool, Params


class Slots(NamedTuple):
    """What an optimiser must know of a bank's slots."""

    is_born: Bool[Array, "P"]
    """Got a new body since the last update: its optimiser state starts afresh."""
    learns: Bool[Array, "P"]
    """Receives updates; the others stand still, optimiser state included."""


class PerBodyState(NamedTuple):
    """Optimiser state of the host, and of every body on its own."""

    host: optax.OptState
    bodies: Mapping[str, Mapping[str, optax.OptState]]


class PerBody(NamedTuple):
    """`(init, update)` over `(host parameters, bodies)`."""

    init: Any
    update: Any


def per_body(
    host: optax.GradientTransformation, bodies: optax.GradientTransformation | None = None
) -> PerBody:
    """One optimiser for the host, and one of its own for every body.

    The bodies' transformation is mapped over the slots, so each body has its own moments, its own
    step count (Adam's bias correction is right for a body born at step 10,000), its own schedule
    (a learning rate that depends on the body's age), and its own norm where gradients are clipped.
    A slot that got a new body starts from `init`; a slot that does not learn receives an update of
    zero, weight decay included, and keeps its state.

    Args:
      host: for the host's parameters.
      bodies: for each body; `host` when left out. One that draws random numbers from a key in its
        state draws the same ones for every body.

    Returns:
      `init((params, bodies))` and
      `update((d_params, d_bodies), state, (params, bodies), slots=...)`, with `slots` from
      `Growth.slots`, which returns `((host updates, body updates), state)` for
      `optax.apply_updates`. Further keywords (a loss, say) go to both transformations. `init`
      raises `TypeError` for anything but the pair.

    >>> optimizer = per_body(optax.adamw(1e-3))
    """
    of_host = optax.with_extra_args_support(host)
    of_body = optax.with_extra_args_support(host if bodies is None else bodies)

    def init(params: tuple[Params, Bodies]) -> PerBodyState:
        if not isinstance(params, tuple) or len(params) != 2:
            raise TypeError(
                "init takes the pair (host parameters, bodies): "
                f"`optimizer.init((params, state.bodies))`, got {type(params).__name__}"
            )
        host_params, banks = params
        state = PerBodyState(
            host=of_host.init(host_params),
            bodies={
                site: {name: jax.vmap(of_body.init)(bank) for name, bank in at_site.items()}
                for site, at_site in _with_parameters(banks).items()
            },
        )
        # Some transformations keep the parameters themselves; a step may donate both.
        own: PerBodyState = jax.tree.map(jnp.copy, state)
        return own

    def update(
        gradients: tuple[Params, Bodies],
        state: PerBodyState,
        params: tuple[Params, Bodies],
        *,
        slots: Mapping[str, Mapping[str, Slots]],
        **extra: Any,
    ) -> tuple[tuple[Params, Bodies], PerBodyState]:
        d_host, d_banks = gradients
        host_params, banks = params
        host_updates, host_state = of_host.update(d_host, state.host, host_params, **extra)
        of_banks = _with_parameters(banks)
        is_any = [
            jnp.any(slots[site][name].is_born | slots[site][name].learns)
            for site, at_site in of_banks.items()
            for name in at_site
        ]

        def step(carry: tuple[Bodies, Any]) -> tuple[Bodies, Any]:
            updates = {site: dict(at_site) for site, at_site in carry[0].items()}
            states: dict[str, dict[str, Any]] = {site: {} for site in of_banks}
            for site, at_site in of_banks.items():
                for name, bank in at_site.items():
                    updates[site][name], states[site][name] = _update_bank(
                        of_body,
                        d_banks[site][name],
                        carry[1][site][name],
                        bank,
                        slots[site][name],
                        extra,
                    )
            return updates, states

        updates, states = d_banks, state.bodies
        if is_any:
            shapes = jax.eval_shape(step, (d_banks, state.bodies))[0]
            still = jax.tree.map(lambda g, s: jnp.zeros_like(g, dtype=s.dtype), d_banks, shapes)
            updates, states = once_if(jnp.any(jnp.stack(is_any)), step, (still, state.bodies))
        return (host_updates, updates), PerBodyState(host=host_state, bodies=states)

    return PerBody(init=init, update=update)


def _with_parameters(banks: Bodies) -> dict[str, dict[str, Params]]:
    """The banks whose blueprint has parameters at all."""
    return {
        site: {name: bank for name, bank in at_site.items() if jax.tree.leaves(bank)}
        for site, at_site in banks.items()
    }


def _update_bank(
    of_body: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: optax.OptState,
    bank: Params,
    slots: Slots,
    extra: Mapping[str, Any],
) -> tuple[Params, optax.OptState]:
    def choose(mask: Array, first: Any, second: Any) -> Any:
        return jax.tree.map(lambda a, b: select_slots(mask, a, b), first, second)

    state = choose(slots.is_born, jax.vmap(of_body.init)(bank), state)
    updates, moved = jax.vmap(lambda g, s, p: of_body.update(g, s, p, **extra))(
        gradients, state, bank
    )
    # In the dtypes that `init` chose, whatever the gradients' are: a step must not change them.
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
    still = jax.tree.map(jnp.zeros_like, updates)
    return choose(slots.learns, updates, still), choose(slots.learns, moved, state)
