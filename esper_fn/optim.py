"""Optax transformations for a host and its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_fn._arguments import described
from esper_fn._control import once_if
from esper_fn._layout import select_slots
from esper_fn._leaves import check_leaves, join, learns, like, part
from esper_fn._schedules import Clock, schedules, set_clock
from esper_fn._typing import Adapters, Array, Bool, Int32, Params


class Slots(NamedTuple):
    """What an optimiser must know of a bank's slots."""

    generation: Int32[Array, "P"]
    """Adapters born there so far: where it rose, the optimiser state starts afresh."""
    learns: Bool[Array, "P"]
    """Receives updates; the others stand still, optimiser state included."""


class _Remedy(type):
    """Of a type whose name JAX prints where trees do not match."""

    def __repr__(cls) -> str:
        return (
            "gradients of adapters, which only an optimiser from ef.optim.per_adapter takes: a "
            "plain Optax transformation hands the moments of a dead adapter to a newborn one (sum "
            "them up from `jax.tree.map(jnp.zeros_like, gradients)`; `dict(gradients[1])` is "
            "a plain tree)"
        )


class AdapterGradients(dict[str, Any], metaclass=_Remedy):
    """What `Growth.value_and_grad` returns for the adapters: site -> blueprint -> `[P, ...]`.

    A dictionary, but to JAX another kind of tree than the adapters themselves: so a plain Optax
    transformation refuses them, whose state would outlive the adapters.
    """


jax.tree_util.register_pytree_with_keys(
    AdapterGradients,
    lambda tree: (
        [(jax.tree_util.DictKey(name), tree[name]) for name in sorted(tree)],
        tuple(sorted(tree)),
    ),
    lambda names, leaves: AdapterGradients(zip(names, leaves, strict=True)),
)


class PerAdapterState(NamedTuple):
    """Optimiser state of the host, and of every adapter on its own."""

    host: optax.OptState
    adapters: Mapping[str, Mapping[str, optax.OptState]]
    num_updates: Int32[Array, ""]
    """Of the run so far: the clock of the adapters' schedules."""
    generation: Mapping[str, Mapping[str, Int32[Array, "P"]]]
    """`Slots.generation` at the last update: which adapter each state belongs to."""


class PerAdapter(NamedTuple):
    """`(init, update)` over `(host parameters, adapters)`."""

    init: Any
    update: Any


def per_adapter(
    host: optax.GradientTransformation,
    adapters: optax.GradientTransformation | None = None,
    *,
    schedule: Literal["run", "age"] = "run",
) -> PerAdapter:
    """One optimiser for the host, and one of its own for every adapter.

    The adapters' transformation is mapped over the slots, so each adapter has its own moments, its
    own step count (Adam's bias correction is right for an adapter born at step 10,000), and its own
    norm where gradients are clipped. Its learning rate and other schedules follow the run: whenever
    it is born, an adapter learns at the rate that the host's schedule has reached. A slot that got
    a new adapter starts from `init`; a slot that does not learn receives an update of zero, weight
    decay included, and keeps its state.

    Leaves of the host that are no floating numbers (counts, flags, random keys) stay as they are;
    where there are random keys, add updates by `optim.apply_updates` instead of Optax's.

    Args:
      host: for the host's parameters.
      adapters: for each adapter; `host` when left out, which then may hold no tree of labels or
        masks: an adapter is another tree. One that draws random numbers from a key in its state
        draws the same ones for every adapter.
      schedule: `run`: schedules count the updates of the run. Where `adapters` is left out,
        adapters also take over the host's hyperparameters (`optax.inject_hyperparams`) and its
        `reduce_on_plateau`; a transformation of their own counts every call, also inside an
        `optax.MultiSteps`. `age`: they count the updates of the adapter.

    Returns:
      `init((params, adapters))` and
      `update((d_params, d_adapters), state, (params, adapters), slots=...)`, with `slots` from
      `Growth.slots`, which returns `((host updates, adapter updates), state)` for
      `optim.apply_updates` or Optax's. Further keywords (`value=loss`, say) go to both
      transformations; of the pair `grad=(d_params, d_adapters)` and of `value_fn=`, a function of
      the pair of parameters, each gets its own part, and an adapter no `value_fn`. Both raise
      `TypeError` for anything but these, and `init` `ValueError` for a host's transformation that
      does not fit an adapter.

    Raises:
      TypeError: one of them is no transformation, a factory that was not called for instance.

    >>> optimizer = per_adapter(optax.adamw(1e-3))
    """
    if schedule not in ("run", "age"):
        raise ValueError(f'schedule must be "run" or "age", got {schedule!r}')
    for name, value in (("host", host), ("adapters", adapters)):
        is_none = value is None and name == "adapters"
        if not is_none and (isinstance(value, PerAdapter) or not _is_transformation(value)):
            raise TypeError(
                f"{name} must be an Optax transformation, got {described(value)}; "
                f"`{name}=optax.adam(1e-3)` for instance"
            )
    of_host = optax.with_extra_args_support(host)
    of_adapter = optax.with_extra_args_support(host if adapters is None else adapters)

    def begin(site: str, name: str, bank: Params) -> optax.OptState:
        try:
            return jax.vmap(of_adapter.init)(bank)
        except Exception as error:
            if adapters is not None:
                raise
            raise ValueError(
                f"the host's transformation does not fit the adapters {name!r} of site {site!r}, "
                f"which are {jax.tree.structure(bank)}; trees of labels and masks fit one tree "
                "only: give them as functions of the parameters, or give the adapters their own "
                "transformation, `per_adapter(host, adapters=optax.adam(1e-3))`"
            ) from error

    def init(params: tuple[Params, Adapters]) -> PerAdapterState:
        _check_pair("init", params, f"{_PARAMS}: `optimizer.init((params, state.adapters))`")
        host_params, banks = params
        check_leaves("params", host_params)
        state = PerAdapterState(
            host=of_host.init(_learning(host_params)),
            adapters={
                site: {name: begin(site, name, bank) for name, bank in at_site.items()}
                for site, at_site in _with_parameters(banks).items()
            },
            num_updates=jnp.int32(0),
            generation={
                site: {name: _no_births(bank) for name, bank in at_site.items()}
                for site, at_site in _with_parameters(banks).items()
            },
        )
        # Some transformations keep the parameters themselves; a step may donate both.
        own: PerAdapterState = jax.tree.map(jnp.copy, state)
        return own

    def update(
        gradients: tuple[Params, Adapters],
        state: PerAdapterState,
        params: tuple[Params, Adapters] | None = None,
        *,
        slots: Mapping[str, Mapping[str, Slots]] | None = None,
        **extra: Any,
    ) -> tuple[tuple[Params, Adapters], PerAdapterState]:
        both, known = _checked_update(gradients, state, params, slots)
        d_host, d_banks = gradients[0], dict(gradients[1])
        banks = both[1]
        if schedule == "age":
            clock = None
        else:
            clock = Clock(state.num_updates, schedules(state.host) if adapters is None else None)
        host_updates, host_state = _update_host(of_host, (d_host, d_banks), state.host, both, extra)
        of_banks = _with_parameters(banks)
        is_new = {
            site: {
                name: known[site][name].generation != state.generation[site][name]
                for name in at_site
            }
            for site, at_site in of_banks.items()
        }
        is_any = [
            jnp.any(is_new[site][name] | known[site][name].learns)
            for site, at_site in of_banks.items()
            for name in at_site
        ]

        def step(carry: tuple[Adapters, Any]) -> tuple[Adapters, Any]:
            updates = {site: dict(at_site) for site, at_site in carry[0].items()}
            states: dict[str, dict[str, Any]] = {site: {} for site in of_banks}
            for site, at_site in of_banks.items():
                for name, bank in at_site.items():
                    updates[site][name], states[site][name] = _update_bank(
                        of_adapter,
                        d_banks[site][name],
                        carry[1][site][name],
                        bank,
                        is_new[site][name],
                        known[site][name].learns,
                        extra,
                        clock,
                    )
            return updates, states

        updates, states = d_banks, state.adapters
        if is_any:
            shapes = jax.eval_shape(step, (d_banks, state.adapters))[0]
            still = jax.tree.map(lambda g, s: jnp.zeros_like(g, dtype=s.dtype), d_banks, shapes)
            updates, states = once_if(jnp.any(jnp.stack(is_any)), step, (still, state.adapters))
        after = PerAdapterState(
            host=host_state,
            adapters=states,
            num_updates=state.num_updates + jnp.int32(1),
            generation={
                site: {name: known[site][name].generation for name in at_site}
                for site, at_site in of_banks.items()
            },
        )
        return (host_updates, updates), after

    return PerAdapter(init=init, update=update)


_PARAMS = "the pair (host parameters, adapters)"
_UPDATE = (
    "`optimizer.update(gradients, opt_state, (params, state.adapters), slots=growth.slots(state))`"
    ", of the state before `growth.update`"
)


def _check_pair(call: str, pair: Any, wanted: str) -> None:
    """Raises `TypeError` unless something is a pair of a host's part and the adapters'."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{call} takes {wanted}, got {type(pair).__name__}")
    for name, at_site in pair[1].items() if isinstance(pair[1], Mapping) else [("", pair[1])]:
        if not isinstance(at_site, Mapping):
            there = f"[{name!r}]" if name else ""
            raise TypeError(
                f"{call} takes {wanted}, in this order; the second one, a dict of sites and "
                f"blueprints, has {described(at_site)} at {there or 'its root'}"
            )


def _checked_update(gradients: Any, state: Any, params: Any, slots: Any) -> tuple[Any, Any]:
    """Parameters and slots; raises `TypeError` for what `update` cannot be called with."""
    if slots is None:
        raise TypeError(
            f"update needs to know which adapters are new and which learn: {_UPDATE}; a wrapper "
            "around per_adapter (`optax.chain`, `optax.apply_if_finite`, ...) hands no slots on: "
            "put it inside, as `per_adapter(optax.chain(optax.clip(1.0), optax.adam(1e-3)))`"
        )
    _check_pair(
        "update",
        gradients,
        "the pair of gradients (d params, d adapters) of `growth.value_and_grad(loss_fn)`",
    )
    _check_pair("update", params, f"{_PARAMS} third: {_UPDATE}")
    if not isinstance(state, PerAdapterState):
        raise TypeError(
            "update takes the state of this optimiser second, from `optimizer.init((params, "
            f"state.adapters))`, got {described(state)}"
        )
    for site, at_site in _with_parameters(params[1]).items():
        for name in at_site:
            try:
                found = slots[site][name]
            except (KeyError, TypeError):
                found = None
            if not isinstance(found, Slots):
                raise TypeError(
                    f"slots must be what `growth.slots(state)` returns, got {described(slots)} "
                    f"without the slots of {name!r} at site {site!r}; the call is {_UPDATE}"
                )
    return params, slots


def apply_updates(params: Params, updates: Params) -> Params:
    """`params + updates`, as `optax.apply_updates`, and what is not learned stays as it is.

    Whole numbers, flags and random keys among the parameters have no gradient, and nothing can be
    added to a key.

    Args:
      params: any tree of arrays and numbers, `(params, state.adapters)` for instance.
      updates: of an optimiser, the same tree; what it holds for leaves that are not learned is not
        read.

    Returns:
      The new parameters, in the dtypes of the old ones.

    >>> after = apply_updates({"w": jnp.ones(2), "n": 3}, {"w": jnp.ones(2), "n": 0})
    >>> after["w"].tolist(), after["n"]
    ([2.0, 2.0], 3)
    """
    check_leaves("params", params)
    learning, still = part(params)
    return join(optax.apply_updates(learning, like(updates, params)), still)


def check_optimizer(optimizer: Any, opt_state: Any = None) -> None:
    """Raises `TypeError` for an optimiser that knows nothing of births; with its state, if any."""
    remedy = "use `ef.optim.per_adapter(optax.adam(1e-3))`"
    if not _is_transformation(optimizer):
        raise TypeError(
            f"optimizer must be from optim.per_adapter, got {described(optimizer)}; {remedy}"
        )
    if opt_state is None or not isinstance(optimizer, optax.GradientTransformation):
        return
    parts = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, PerAdapterState))
    if not any(isinstance(leaf, PerAdapterState) for leaf in parts):
        raise TypeError(
            "optimizer must be from optim.per_adapter, got an Optax transformation, under which a "
            f"newborn adapter inherits the moments of a dead one; {remedy}"
        )


def _is_transformation(value: Any) -> bool:
    has_both = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    return has_both and not isinstance(value, type)


def _learning(params: Params) -> Params:
    """The parameters without the leaves that do not learn, where there are any."""
    return params if all(map(learns, jax.tree.leaves(params))) else part(params)[0]


def _update_host(
    of_host: optax.GradientTransformationExtraArgs,
    gradients: tuple[Params, Adapters],
    state: optax.OptState,
    params: tuple[Params, Adapters],
    extra: Mapping[str, Any],
) -> tuple[Params, optax.OptState]:
    host, banks = params
    learning, still = part(host)
    own = dict(extra)
    if isinstance(own.get("grad"), tuple):
        own["grad"] = like(own["grad"][0], host)
    if "value_fn" in own:
        own["value_fn"] = lambda moved: extra["value_fn"]((join(moved, still), banks))
    if not jax.tree.leaves(still):
        return of_host.update(gradients[0], state, host, **own)
    updates, state = of_host.update(like(gradients[0], host), state, learning, **own)
    return join(updates, jax.tree.map(_no_update, still)), state


def _no_update(leaf: Any) -> Any:
    """Zeros that change nothing; for a random key, to which nothing can be added, of no type."""
    is_key = jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0) if is_key else jnp.zeros_like(leaf)


def _of_one_adapter(extra: Mapping[str, Any], gradient: Params) -> dict[str, Any]:
    own = dict(extra)
    if "grad" in own:
        own["grad"] = gradient
    if "value_fn" in own:
        own["value_fn"] = _no_search
    return own


def _no_search(params: Params) -> Array:
    raise TypeError(
        "an adapter's transformation asks for the loss at other parameters (`value_fn`), as a line "
        "search does, and an adapter has no loss of its own; give the adapters another one, "
        "`per_adapter(host, adapters=optax.adam(1e-3))`"
    )


def _no_births(bank: Params) -> Int32[Array, "P"]:
    return jnp.zeros(jax.tree.leaves(bank)[0].shape[:1], jnp.int32)


def _with_parameters(banks: Adapters) -> dict[str, dict[str, Params]]:
    """The banks whose blueprint has parameters at all."""
    return {
        site: {name: bank for name, bank in at_site.items() if jax.tree.leaves(bank)}
        for site, at_site in banks.items()
    }


def _update_bank(
    of_adapter: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: optax.OptState,
    bank: Params,
    is_new: Bool[Array, "P"],
    learns: Bool[Array, "P"],
    extra: Mapping[str, Any],
    clock: Clock | None,
) -> tuple[Params, optax.OptState]:
    def choose(mask: Array, first: Any, second: Any) -> Any:
        return jax.tree.map(lambda a, b: select_slots(mask, a, b), first, second)

    state = choose(is_new, jax.vmap(of_adapter.init)(bank), state)
    timed = state if clock is None else set_clock(state, clock)
    updates, moved = jax.vmap(
        lambda g, s, p: of_adapter.update(g, s, p, **_of_one_adapter(extra, g))
    )(gradients, timed, bank)
    # In the dtypes that `init` chose, whatever the gradients' are: a step must not change them.
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
    still = jax.tree.map(jnp.zeros_like, updates)
    return choose(learns, updates, still), choose(learns, moved, state)
