"""One optimiser for the host, and one of its own for every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn._control import once_if
from esper_fn._layout import map_banks, select_slots
from esper_fn._leaves import check_leaves, combine, filter_like, is_learned, partition
from esper_fn._typing import Adapters, Array, Bool, Int32, Params
from esper_fn.optim._checks import PAIR, check_pair, check_transformation, check_update
from esper_fn.optim._clock import Clock, find_schedules, set_clock
from esper_fn.optim._records import PerAdapterState, Slots


class _Parts(NamedTuple):
    """Of what an optimiser is made."""

    host: optax.GradientTransformationExtraArgs
    adapter: optax.GradientTransformationExtraArgs
    is_shared: bool
    """The adapters have the host's transformation."""
    follows_run: bool
    """Schedules count the updates of the run."""


def per_adapter(
    host: optax.GradientTransformation,
    adapters: optax.GradientTransformation | None = None,
    *,
    schedule: Literal["run", "age"] = "run",
) -> optax.GradientTransformationExtraArgs:
    """One optimiser for the host, and one of its own for every adapter.

    The adapters' transformation is mapped over the slots, so each adapter has its own moments, its
    own step count and its own norm where gradients are clipped. A slot that got a new adapter
    starts from `init`. A slot that does not learn receives an update of zero, weight decay
    included, and keeps its state. docs/design.md, "Optimiser", has what follows from that.

    `init((params, adapters))` makes the state, and `update((d_params, d_adapters), state, (params,
    adapters), slots=...)`, with `slots` from `Growth.slots`, returns `((host updates, adapter
    updates), state)` for `optim.apply_updates` or Optax's. Further keywords (`value=loss`, say) go
    to both transformations; of the pair `grad=(d_params, d_adapters)` and of `value_fn=`, a
    function of the pair of parameters, each gets its own part, and an adapter no `value_fn`.

    Args:
      host: for the host's parameters.
      adapters: for each adapter; `host` when left out, which then may hold no tree of labels or
        masks, for an adapter is another tree. One that draws random numbers from a key in its state
        draws the same ones for every adapter.
      schedule: `run`: schedules count the updates of the run, and where `adapters` is left out,
        adapters take over the host's injected hyperparameters and its `reduce_on_plateau`. `age`:
        schedules count the updates of the adapter.

    Returns:
      The transformation. Its `init` and `update` raise `TypeError` for other arguments than these,
      and `init` raises `ValueError` where the host's transformation does not fit an adapter.

    Raises:
      TypeError: `host` or `adapters` is no transformation, a factory that was not called, say.
      ValueError: an unknown `schedule`.

    >>> optimizer = per_adapter(optax.adamw(1e-3))
    """
    if schedule not in ("run", "age"):
        raise ValueError(f'schedule must be "run" or "age", got {schedule!r}')
    check_transformation("host", host)
    if adapters is not None:
        check_transformation("adapters", adapters)
    parts = _Parts(
        host=optax.with_extra_args_support(host),
        adapter=optax.with_extra_args_support(host if adapters is None else adapters),
        is_shared=adapters is None,
        follows_run=schedule == "run",
    )

    def init(params: Any) -> PerAdapterState:
        return _init(parts, params)

    def update(
        updates: Any, state: Any, params: Any = None, *, slots: Any = None, **extra: Any
    ) -> tuple[Any, PerAdapterState]:
        return _update(parts, updates, state, params, slots, extra)

    return optax.GradientTransformationExtraArgs(init=init, update=update)


def _init(parts: _Parts, params: tuple[Params, Adapters]) -> PerAdapterState:
    check_pair("init", params, f"{PAIR}: `optimizer.init((params, state.adapters))`")
    check_leaves("params", params[0])
    banks = _with_parameters(params[1])
    state = PerAdapterState(
        host=parts.host.init(_learning(params[0])),
        adapters={
            site: {name: _init_bank(parts, site, name, bank) for name, bank in at_site.items()}
            for site, at_site in banks.items()
        },
        num_updates=jnp.int32(0),
        generation=map_banks(
            lambda bank: jnp.zeros(jax.tree.leaves(bank)[0].shape[:1], jnp.int32), banks
        ),
    )
    # Some transformations keep the parameters themselves; a step may donate both.
    copied: PerAdapterState = jax.tree.map(jnp.copy, state)
    return copied


def _init_bank(parts: _Parts, site: str, name: str, bank: Params) -> optax.OptState:
    try:
        return jax.vmap(parts.adapter.init)(bank)
    except Exception as error:
        if not parts.is_shared:
            raise
        raise ValueError(
            f"the host's transformation does not fit the adapters {name!r} of site {site!r}, "
            f"which are {jax.tree.structure(bank)}; trees of labels and masks fit one tree "
            "only: give them as functions of the parameters, or give the adapters their own "
            "transformation, `per_adapter(host, adapters=optax.adam(1e-3))`"
        ) from error


class _Bank(NamedTuple):
    """One bank in an update."""

    gradients: Params
    state: optax.OptState
    params: Params
    is_new: Bool[Array, "P"]
    """Slots that got another adapter since the last update."""
    learns: Bool[Array, "P"]


def _update(
    parts: _Parts,
    gradients: tuple[Params, Adapters],
    state: PerAdapterState,
    params: tuple[Params, Adapters],
    slots: Mapping[str, Mapping[str, Slots]],
    extra: Mapping[str, Any],
) -> tuple[tuple[Params, Adapters], PerAdapterState]:
    check_update(gradients, state, params, slots)
    host_updates, host_state = _update_host(parts.host, gradients, state.host, params, extra)
    clock = None
    if parts.follows_run:
        host_schedules = find_schedules(state.host) if parts.is_shared else None
        clock = Clock(state.num_updates, host_schedules)
    banks = map_banks(_bank, state.generation, state.adapters, slots, gradients[1], params[1])
    stepped = _update_banks(parts.adapter, banks, extra, clock)
    updates = map_banks(itemgetter(0), stepped)
    after = PerAdapterState(
        host=host_state,
        adapters=map_banks(itemgetter(1), stepped),
        num_updates=state.num_updates + jnp.int32(1),
        generation=map_banks(lambda _, slots: slots.generation, state.generation, slots),
    )
    # Banks without parameters have empty gradients, which are their updates.
    complete = {site: {**at_site, **updates[site]} for site, at_site in gradients[1].items()}
    return (host_updates, complete), after


def _bank(
    generation: Int32[Array, "P"],
    state: optax.OptState,
    slots: Slots,
    gradients: Params,
    params: Params,
) -> _Bank:
    return _Bank(gradients, state, params, slots.generation != generation, slots.learns)


def _update_banks(
    adapter: optax.GradientTransformationExtraArgs,
    banks: Mapping[str, Mapping[str, _Bank]],
    extra: Mapping[str, Any],
    clock: Clock | None,
) -> dict[str, dict[str, tuple[Params, optax.OptState]]]:
    """Updates and new states of all banks, computed only where an adapter is new or learns."""

    def step(carry: Any) -> Any:
        def step_bank(bank: _Bank, before: tuple[Params, optax.OptState]) -> Any:
            return _update_bank(adapter, bank._replace(state=before[1]), extra, clock)

        return map_banks(step_bank, banks, carry)

    def stand_still(bank: _Bank, after: Any) -> tuple[Params, optax.OptState]:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), after[0])
        return zeros, bank.state

    before = map_banks(lambda bank: (bank.gradients, bank.state), banks)
    still = map_banks(stand_still, banks, jax.eval_shape(step, before))
    is_any = [
        jnp.any(bank.is_new | bank.learns)
        for at_site in banks.values()
        for bank in at_site.values()
    ]
    return once_if(jnp.any(jnp.stack(is_any)), step, still) if is_any else still


def _update_bank(
    adapter: optax.GradientTransformationExtraArgs,
    bank: _Bank,
    extra: Mapping[str, Any],
    clock: Clock | None,
) -> tuple[Params, optax.OptState]:
    def choose(mask: Bool[Array, "P"], first: Any, second: Any) -> Any:
        return jax.tree.map(lambda a, b: select_slots(mask, a, b), first, second)

    def update_one(gradient: Params, state: optax.OptState, params: Params) -> Any:
        return adapter.update(gradient, state, params, **_extra_of_adapter(extra, gradient))

    state = choose(bank.is_new, jax.vmap(adapter.init)(bank.params), bank.state)
    timed = state if clock is None else set_clock(state, clock)
    updates, moved = jax.vmap(update_one)(bank.gradients, timed, bank.params)
    # In the dtypes that `init` chose, whatever the gradients' are: a step must not change them.
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
    still = jax.tree.map(jnp.zeros_like, updates)
    return choose(bank.learns, updates, still), choose(bank.learns, moved, state)


def _update_host(
    transformation: optax.GradientTransformationExtraArgs,
    gradients: tuple[Params, Adapters],
    state: optax.OptState,
    params: tuple[Params, Adapters],
    extra: Mapping[str, Any],
) -> tuple[Params, optax.OptState]:
    host, banks = params
    learning, still = partition(host)
    host_extra = dict(extra)
    if isinstance(extra.get("grad"), tuple):
        host_extra["grad"] = filter_like(extra["grad"][0], host)
    if "value_fn" in extra:

        def value_fn(moved: Params) -> Any:
            return extra["value_fn"]((combine(moved, still), banks))

        host_extra["value_fn"] = value_fn
    if not jax.tree.leaves(still):
        return transformation.update(gradients[0], state, host, **host_extra)
    updates, state = transformation.update(
        filter_like(gradients[0], host), state, learning, **host_extra
    )
    return combine(updates, jax.tree.map(_no_update, still)), state


def _no_update(leaf: Any) -> Any:
    """Zeros that change nothing; for a random key, to which nothing can be added, of no type."""
    is_key = jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0) if is_key else jnp.zeros_like(leaf)


def _extra_of_adapter(extra: Mapping[str, Any], gradient: Params) -> dict[str, Any]:
    adapter_extra = dict(extra)
    if "grad" in extra:
        adapter_extra["grad"] = gradient
    if "value_fn" in extra:
        adapter_extra["value_fn"] = _no_value_fn
    return adapter_extra


def _no_value_fn(params: Params) -> Array:
    raise TypeError(
        "an adapter's transformation asks for the loss at other parameters (`value_fn`), as a line "
        "search does, and an adapter has no loss of its own; give the adapters another one, "
        "`per_adapter(host, adapters=optax.adam(1e-3))`"
    )


def _learning(params: Params) -> Params:
    """The parameters without the leaves that do not learn, where there are any."""
    return params if all(map(is_learned, jax.tree.leaves(params))) else partition(params)[0]


def _with_parameters(banks: Adapters) -> dict[str, dict[str, Params]]:
    """The banks whose blueprint has parameters at all."""
    return {
        site: {name: bank for name, bank in at_site.items() if jax.tree.leaves(bank)}
        for site, at_site in banks.items()
    }
