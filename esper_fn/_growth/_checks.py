"""What comes to a growth from outside, looked at before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import governors, grafting, lifecycle, policies
from esper_fn._arguments import check_kind, describe, is_count
from esper_fn._growth._state import GrowthState, Parts
from esper_fn._layout import Layout, init_adapters
from esper_fn._sites import Visits
from esper_fn._survey import has_directed
from esper_fn._typing import Adapters, Array, Implementation, Scalar
from esper_fn.commands import Command
from esper_fn.errors import LayoutError
from esper_fn.grafting._select import ROUNDING
from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._commands import Commands
from esper_fn.policies._base import check_order
from esper_kernels import Statistics

_OTHER = "use the state of this growth's own `init`, or the growth that the state belongs to"


def check_state(parts: Parts, state: Any, call: str, *, with_adapters: bool = True) -> None:
    """Raises unless `state` is one of this growth.

    Args:
      parts: of the growth that it should belong to.
      state: as it came.
      call: the call and the order of its arguments, for the message.
      with_adapters: whether its adapters are looked at too; a host outside of JAX keeps them
        itself.

    Raises:
      TypeError: it is no state.
      LayoutError: it is one of another growth.
    """
    check_kind("state", state, GrowthState, f"the call is {call}, with `growth.init(key)` as state")
    layout = parts.layout
    for name, leaf, size in (
        ("seeds", state.seeds.stage, layout.num_seeds),
        ("slots", state.owner, layout.num_slots),
    ):
        if jnp.shape(leaf)[-1:] != (size,):
            raise LayoutError(
                f"state has {jnp.shape(leaf)[-1:]} {name}, this growth has {size}; {_OTHER}"
            )
    policy, governor = _state_shapes(layout, parts.policy, parts.governor)
    for name, own in (("policy", policy), ("governor", governor)):
        pair: list[Any] = [jax.tree.structure(tree) for tree in (getattr(state, name), own)]
        if pair[0] != pair[1]:
            raise LayoutError(
                f"state.{name} belongs to another {name} than this growth's; {_OTHER}"
            )
    if len(state.grafts) != len(parts.grafts):
        raise LayoutError(
            f"state.grafts has {len(state.grafts)} alpha schedules, this growth has "
            f"{[graft.name for graft in parts.grafts]}; {_OTHER}"
        )
    if with_adapters:
        check_adapters(layout, state.adapters, "state.adapters")


def check_adapters(layout: Layout, adapters: Any, argument: str) -> None:
    """Raises `TypeError` or `LayoutError` unless `adapters` are those of a layout."""
    check_kind(
        argument,
        adapters,
        Mapping,
        "they are the second half of what `optax.apply_updates((params, state.adapters), updates)` "
        "returns",
    )
    for site, banks in _adapter_shapes(layout).items():
        for name, expected in banks.items():
            entry = f"{argument}[{site!r}][{name!r}]"
            try:
                bank = adapters[site][name]
            except (KeyError, TypeError):
                raise LayoutError(f"{entry} is missing; {_OTHER}") from None
            leaves, own = jax.tree.leaves(bank), jax.tree.leaves(expected)
            shapes = [tuple(jnp.shape(leaf)) for leaf in leaves]
            # An axis in front is that of many states under `vmap`.
            inner = [s[max(len(s) - len(o.shape), 0) :] for s, o in zip(shapes, own, strict=False)]
            if inner != [leaf.shape for leaf in own] or len(leaves) != len(own):
                raise LayoutError(
                    f"{entry} has leaves of shapes {shapes}, this growth's are "
                    f"{[leaf.shape for leaf in own]}; {_OTHER}"
                )


@lru_cache(maxsize=64)
def _adapter_shapes(layout: Layout) -> Adapters:
    shapes: Adapters = jax.eval_shape(lambda: init_adapters(layout, jax.random.key(0)))
    return shapes


@lru_cache(maxsize=64)
def _state_shapes(
    layout: Layout, policy: policies.Policy, governor: governors.Governor
) -> tuple[Any, Any]:
    return jax.eval_shape(lambda: (policy.init(layout), governor.init(layout.num_seeds)))


def check_statistics(statistics: Any) -> None:
    """Raises `TypeError` unless they are a `Statistics`."""
    check_kind(
        "statistics",
        statistics,
        Statistics,
        "pass what `growth.value_and_grad` returns as its third",
    )


def check_commands(commands: Any) -> Commands | None:
    """The commands, if they are `Commands` or None; raises `TypeError` otherwise."""
    if commands is None:
        return None
    if not isinstance(commands, Commands):
        what = "one Command" if isinstance(commands, Command) else describe(commands)
        raise TypeError(
            f"commands must be Commands or None, got {what}; pack them for this very step: "
            "`growth.commands([...])`"
        )
    return commands.checked()


def scalar_loss(loss: Any, argument: str = "loss", *, must_learn: bool = False) -> Scalar:
    """The loss as an array without axes.

    Args:
      loss: as it came.
      argument: its name in messages.
      must_learn: whether it is to be differentiated; else whole numbers will do.

    Raises:
      TypeError: it is no real number.
      ValueError: it has axes.
    """
    try:
        shape, dtype = np.shape(loss), jnp.result_type(loss)
    except (TypeError, ValueError):
        shape, dtype = None, None
    if loss is None or dtype is None or isinstance(loss, Sequence):
        raise TypeError(
            f"{argument} must be one number, got {describe(loss)}"
            + ("; with more than the loss, set has_aux=True" if isinstance(loss, tuple) else "")
        )
    if shape:
        raise ValueError(
            f"{argument} must be one number, got an array of shape {shape}; reduce it, with "
            "`jnp.mean` for instance"
        )
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if not is_float and (must_learn or not jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(
            f"{argument} must be a real floating number, got {dtype}; convert it, with "
            "`.astype(jnp.float32)` for instance, or check what it computes"
        )
    value: Array = jnp.asarray(loss, dtype if is_float else jnp.float32)
    return value


def loss_of(value: Any, has_aux: bool) -> Any:
    """What a loss function returned, looked at; arguments and errors as in `scalar_loss`."""
    returned = "what loss_fn returns"
    if not has_aux:
        return scalar_loss(value, returned, must_learn=True)
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{returned} must be `(loss, aux)` with has_aux, got {describe(value)}")
    return scalar_loss(value[0], "the loss that loss_fn returns", must_learn=True), value[1]


def no_gradient(leaf: Any) -> np.ndarray:
    """JAX's own gradient of what has none."""
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def check_reached(layout: Layout, visits: Visits) -> None:
    """Raises `LayoutError` where the loss function missed a site."""
    missed = [site.name for site in layout.sites if site.name not in visits.names]
    if missed:
        raise LayoutError(
            f"the loss function never reaches site(s) {missed} with the seeds that it is given; "
            f"call `seeds.grow({missed[0]!r}, activation)` of its second argument in the model "
            "(seeds from outside, closed over or of another `ef.use_seeds`, do not learn), or "
            "leave the site out of the layout"
        )


def check_parts(policy: Any, graft: Any, governor: Any, settings: Any) -> None:
    """Raises `TypeError` where `Growth` got something else than a part; None stands for a default.

    Arguments as of `Growth`.
    """
    grafts = () if graft is None else (graft,)
    if isinstance(graft, Sequence) and not isinstance(graft, str | grafting.AlphaSchedule):
        grafts = tuple(graft)
    for name, value, kind, factory in (
        ("policy", policy, policies.Policy, "policies.grow"),
        *(("graft", schedule, grafting.AlphaSchedule, "grafting.linear") for schedule in grafts),
        ("governor", governor, governors.Governor, "governors.standard"),
        ("settings", settings, lifecycle.Settings, "lifecycle.settings"),
    ):
        if value is not None or name == "graft":
            module, _, usual = factory.partition(".")
            called = getattr(value, "__name__", usual) if callable(value) else usual
            check_kind(name, value, kind, f"make one with `ef.{module}.{called}(...)`")


def check_policy(layout: Layout, policy: policies.Policy) -> None:
    """Raises where a policy does not fit the layout, or limits what nothing asks for."""
    jax.eval_shape(lambda: policy.init(layout))
    check_order(policy)


def checked_grafts(graft: Any, settings: lifecycle.Settings) -> tuple[grafting.AlphaSchedule, ...]:
    """The alpha schedules that an argument `graft` stands for; raises `ValueError`."""
    if graft is None:
        graft = grafting.linear() if settings.train_first else grafting.linear(1)
    grafts = (graft,) if isinstance(graft, grafting.AlphaSchedule) else tuple(graft)
    names = [schedule.name for schedule in grafts]
    if not grafts or len(set(names)) != len(grafts):
        raise ValueError(f"graft needs schedules of different names, got {names}")
    longest = int(settings.max_steps[Stage.GRAFTING])
    for schedule in grafts:
        if schedule.max_step * longest < 1 - ROUNDING:
            raise ValueError(
                f"graft {schedule.name!r} needs {1 / schedule.max_step:.0f} steps at least, "
                f"but every seed is culled after max_steps[GRAFTING] = {longest}; give it fewer "
                "num_steps, or "
                "settings=lifecycle.settings(max_steps={Stage.GRAFTING: ...}) more"
            )
    return grafts


def check_options(
    layout: Layout,
    adapters_at_once: Any,
    implementation: Any,
    max_ablations: Any,
    directed_births: Any,
) -> None:
    """Raises `ValueError`; arguments as of `Growth`."""
    if adapters_at_once is not None:
        check_count("adapters_at_once", adapters_at_once, 1, ", or None for every slot")
    if max_ablations is not None:
        check_count("max_ablations", max_ablations, 1, ", or None for every slot")
    check_count("directed_births", directed_births, 0)
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)}, got {implementation!r}"
        )
    if directed_births and not any(has_directed(layout, site) for site in layout.sites):
        raise ValueError(
            f"directed_births={directed_births}, but none of the blueprints {list(layout.names)} "
            "can be born along directions (`init_along`); offer low_rank, bottleneck or gated, or "
            "leave it at 0"
        )


def check_count(name: str, value: object, least: int, also: str = "") -> None:
    """Raises `ValueError` unless `value` is an int of at least `least`."""
    if not is_count(value, least):
        raise ValueError(f"{name} must be an int, at least {least}{also}, got {value!r}")
