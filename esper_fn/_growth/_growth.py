"""One growing network: the assembly of layout, lifecycle, grafting, policy and governor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from esper_fn import governors, grafting, lifecycle, policies
from esper_fn._arguments import check_key, check_kind
from esper_fn._growth._checks import (
    check_options,
    check_parts,
    check_policy,
    check_state,
    checked_grafts,
)
from esper_fn._growth._external import ExternalSteps
from esper_fn._growth._gradients import make_gradients
from esper_fn._growth._seed import read_seed
from esper_fn._growth._state import GrowthState, LossFn, Parts, StepInfo
from esper_fn._growth._survey import SurveyOptions, make_survey
from esper_fn._growth._update import update
from esper_fn._layout import (
    Layout,
    evaluation_seeds,
    init_adapters,
    make_layout,
    map_banks,
    slot_gains,
    split_by_bank,
)
from esper_fn._sites import Seeds, Site, Statistics
from esper_fn._survey import (
    NUM_DIRECTIONS,
    no_directions,
)
from esper_fn._typing import (
    Adapters,
    DType,
    Implementation,
    Key,
    Scalar,
)
from esper_fn.blueprints._base import Blueprint
from esper_fn.commands import Command
from esper_fn.commands._pack import pack
from esper_fn.grafting._select import init_states
from esper_fn.lifecycle import NONE
from esper_fn.lifecycle._commands import Commands
from esper_fn.lifecycle._loss import loss_track
from esper_fn.lifecycle._state import seed_state
from esper_fn.optim import Slots

# The program runs once: it takes less time to run it slowly than to optimise it.
_INIT_OPTIONS: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True, init=False, slots=True, eq=False)
class Growth:
    """A growing network: where it may grow, what, and who decides. Its methods are pure.

    It holds no arrays that change: those are in a `GrowthState`, which `init` makes. Immutable, and
    equal only to itself, so it may be a static argument of `jit`.

    Args:
      sites: where seeds sit (`ef.site`, `ef.discover_sites`); their order is that of the seeds.
      blueprints: name -> blueprint; each is offered at the sites whose topology it serves.
      capacity: adapters that may be alive at once, for each site, layer and blueprint; a site with
        fewer chunks has a slot for each of them.
      dtype: dtype of the adapters' parameters.
      policy: decides where and when to grow; `policies.grow()` when left out.
      graft: the alpha schedule, or several of different names, of which the first is the default
        and a command may choose another. When left out, adapters act fully at once
        (`grafting.linear(1)`), or, if the settings let them train first, by `grafting.linear()`.
      governor: the guard; `governors.standard()` when left out.
      settings: the gates' thresholds; `lifecycle.settings()` when left out.
      adapters_at_once: live adapters of a bank that a site computes in one round of its loop. One
        at a time needs the least memory and is fastest on a CPU; on a GPU, where a round waits for
        the host, try more. None computes every slot, dead or alive, without a loop: for `vmap` over
        whole states.
      implementation: what computes the adapters of a site. `auto`: a GPU kernel where one can, else
        `loops`. `pallas` and `reference` (the kernels' definition, every chunk at once) must serve
        every bank of the form that a blueprint's `activation` names, except over spans.
      max_ablations: seeds measured by ablation in one survey; None for all that are to be judged.
      directed_births: N, the dormant seeds of highest potential in each layer of each site whose
        directions a survey stores. If such a seed germinates before the next survey, with a
        blueprint that offers `init_along`, its adapter begins along them; any other adapter begins
        as the blueprint's `init` says. A survey replaces what an earlier one stored; one that did
        not reach a site, or measured nothing finite there, clears it, and so does a roll-back. With
        0, the default, nothing is stored and nothing costs.

    Attributes:
      layout: the sites, blueprints and slots, with the indices of seeds and slots.

    Raises:
      TypeError: an argument of another kind, a factory that was not called for instance.
      LayoutError: no site, a name given twice, a blueprint that serves no site, a site no
        blueprint serves, a capacity below one, a dtype that is not floating.
      ValueError: adapters_at_once or max_ablations no int or below 1, directed_births no int, below
        0, or above it where no blueprint offers `init_along`; schedules of one name; a schedule
        that cannot end within the longest stay in GRAFTING; a policy that limits what no rule
        before it asks for.
      UnknownNameError: the policy asks for a blueprint that is not offered.

    >>> import esper_fn as ef
    >>> growth = ef.Growth(
    ...     sites=[ef.site("hidden", features=256, chunks=16)],
    ...     blueprints={"low_rank": ef.blueprints.low_rank(rank=8)},
    ...     capacity=4,
    ... )
    >>> growth.layout.num_seeds, growth.layout.num_slots
    (16, 4)
    """

    layout: Layout
    policy: policies.Policy
    grafts: tuple[grafting.AlphaSchedule, ...]
    governor: governors.Governor
    settings: lifecycle.Settings
    adapters_at_once: int | None
    implementation: Implementation
    max_ablations: int
    directed_births: int
    _arguments: Mapping[str, Any] = field(repr=False)
    _compiled_init: Callable[[Key], GrowthState] = field(repr=False)

    def __init__(
        self,
        *,
        sites: Iterable[Site],
        blueprints: Mapping[str, Blueprint],
        capacity: int,
        dtype: DType = jnp.float32,
        policy: policies.Policy | None = None,
        graft: grafting.AlphaSchedule | Sequence[grafting.AlphaSchedule] | None = None,
        governor: governors.Governor | None = None,
        settings: lifecycle.Settings | None = None,
        adapters_at_once: int | None = 1,
        implementation: Implementation = "auto",
        max_ablations: int | None = None,
        directed_births: int = 0,
    ) -> None:
        check_parts(policy, graft, governor, settings)
        layout = make_layout(sites=sites, blueprints=blueprints, capacity=capacity, dtype=dtype)
        check_options(layout, adapters_at_once, implementation, max_ablations, directed_births)
        limits = lifecycle.settings() if settings is None else settings
        policy = policies.grow() if policy is None else policy
        check_policy(layout, policy)
        parts = {
            "layout": layout,
            "policy": policy,
            "grafts": checked_grafts(graft, limits),
            "governor": governors.standard() if governor is None else governor,
            "settings": limits,
            "adapters_at_once": adapters_at_once,
            "implementation": implementation,
            "max_ablations": layout.num_slots if max_ablations is None else max_ablations,
            "directed_births": directed_births,
            "_arguments": {
                **layout.arguments,
                "policy": policy,
                "graft": graft,
                "governor": governor,
                "settings": settings,
                "adapters_at_once": adapters_at_once,
                "implementation": implementation,
                "max_ablations": max_ablations,
                "directed_births": directed_births,
            },
            "_compiled_init": jax.jit(self._init, compiler_options=_INIT_OPTIONS),
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Growth:
        """Another growth, with these arguments of the constructor changed.

        Args:
          **changes: see `Growth`.

        Raises:
          TypeError, ValueError, LayoutError: as the constructor.
        """
        return Growth(**{**self._arguments, **changes})

    @property
    def _parts(self) -> Parts:
        return Parts(self.layout, self.policy, self.grafts, self.governor)

    def init(self, key: Key) -> GrowthState:
        """The state before the first step: all seeds are dormant, all slots free.

        Args:
          key: a random key; the state keeps a part of it for what it draws later.

        Raises:
          TypeError: `key` is no random key.
        """
        check_key(key)
        return self._init(key) if isinstance(key, jax.core.Tracer) else self._compiled_init(key)

    def _init(self, key: Key) -> GrowthState:
        adapter_key, key = jax.random.split(key)
        num_slots = self.layout.num_slots
        return GrowthState(
            seeds=seed_state(self.layout.num_seeds),
            adapters=init_adapters(self.layout, adapter_key),
            owner=jnp.full((num_slots,), NONE, jnp.int32),
            generation=jnp.zeros((num_slots,), jnp.int32),
            loss=loss_track(),
            settings=self.settings,
            grafts=init_states(self.grafts, self.layout.num_seeds),
            policy=self.policy.init(self.layout),
            governor=self.governor.init(self.layout.num_seeds),
            key=key,
            step=jnp.int32(0),
            directions=no_directions(self.layout, self.directed_births, NUM_DIRECTIONS)
            if self.directed_births
            else None,
        )

    def seeds(self, state: GrowthState, *, exact: bool = False) -> Seeds:
        """The seeds for a forward pass, as in an evaluation: `loss_fn(params, seeds, batch)`.

        A derivative through a site follows the rule of training: reverse mode only, and an adapter
        learns as if alpha were 1, learns in TRAINING though it does not act, and does not learn
        where it is frozen. With `exact` the same `y = x + alpha * r` is plain JAX: `jvp`, `jacfwd`,
        `jacrev`, `hessian` and `linearize` give its true derivatives in the parameters, the inputs
        and `state.adapters`. An adapter with outputs that are not finite counts as constant.

        Args:
          state: the network as it is.
          exact: whether derivatives are those of the function that is computed. Then every slot
            computes, dead or alive, so time and memory follow the capacity; no GPU kernel serves.

        Raises:
          TypeError: `state` is no `GrowthState`, or `exact` no bool.
          LayoutError: it is one of another growth.
        """
        check_state(self._parts, state, "growth.seeds(state)")
        check_kind("exact", exact, bool, "it is fixed while tracing; pass True or False")
        return evaluation_seeds(
            self.layout,
            self.adapters_at_once,
            self.implementation,
            state.seeds,
            state.owner,
            state.settings,
            state.adapters,
            is_exact=exact,
        )

    def slots(self, state: GrowthState) -> Mapping[str, Mapping[str, Slots]]:
        """What `optim.per_adapter` needs to know of every slot, as its argument `slots`.

        Args:
          state: before the step.

        Returns:
          `optim.Slots` of each bank: site -> blueprint -> slots.
        """
        check_state(self._parts, state, "growth.slots(state)", with_adapters=False)
        learns = slot_gains(state.seeds, state.owner, state.settings)[:, 1] != 0
        return map_banks(
            Slots, split_by_bank(self.layout, state.generation), split_by_bank(self.layout, learns)
        )

    def commands(self, commands: Sequence[Command] = (), size: int = 4) -> Commands:
        """Commands as one array of a fixed size, so that no step is compiled anew.

        Args:
          commands: for one step, made by the functions of `esper_fn.commands`. Of two commands for
            one seed the first one counts.
          size: number of rows, at least as many as there are commands.

        Raises:
          CommandError: more commands than rows, or a seed that does not exist.
          UnknownNameError: a blueprint or alpha schedule that the growth was not given.
        """
        return pack(self.layout, [graft.name for graft in self.grafts], commands, size)

    def seed(self, state: GrowthState, index: int) -> lifecycle.Seed:
        """One seed to read; transfers a row from the device.

        Args:
          state: the network as it is.
          index: of the seed; `growth.layout.seed_index(site, chunk)` finds one.
        """
        check_state(self._parts, state, "growth.seed(state, index)", with_adapters=False)
        return read_seed(self.layout, [graft.name for graft in self.grafts], state.seeds, index)

    def value_and_grad(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Like `jax.value_and_grad` of `loss_fn(params, seeds, *args)`, with the seeds measured.

        Each site loops over its live adapters, `adapters_at_once` in a round, so time and memory
        follow the number alive. Under `vmap` over states every round selects among whole
        activations: use `Growth(adapters_at_once=None)` there.

        Leaves of `params` that are no floating numbers (counts, flags, random keys) are constants:
        their gradient is the empty one of `jax.grad(allow_int=True)`.

        Args:
          loss_fn: pure; returns a scalar, or `(scalar, aux)` with `has_aux`.
          has_aux: whether it returns more than the loss.

        Returns:
          A function of `(params, state, *args, **kwargs)` that returns
          `(value, (d params, d adapters), statistics)`; the gradients of the adapters are
          `optim.AdapterGradients`, for `optim.per_adapter`.

        Raises:
          LayoutError: while tracing, where the loss function does not reach a site, and for the
            state of another growth.
          TypeError, ValueError: while tracing, for a loss that is not one floating number, and for
            arguments of the wrong kind; at once for a `loss_fn` that is no function.
        """
        return make_gradients(
            self._parts, self.adapters_at_once, self.implementation, loss_fn, has_aux=has_aux
        )

    def update(
        self,
        state: GrowthState,
        adapters: Adapters,
        statistics: Statistics,
        loss: Scalar,
        commands: Commands | None = None,
        *,
        reference_loss: Scalar | None = None,
    ) -> tuple[GrowthState, StepInfo]:
        """One step of every seed's life.

        Differentiable in the adapters; what was measured counts as constant.

        Args:
          state: before the step.
          adapters: parameters after the optimiser's update. An adapter that does not learn, or
            whose parameters are not finite, keeps those it had before, bit for bit.
          statistics: from `value_and_grad`.
          loss: the training loss of the step.
          commands: from `Growth.commands`; None for none.
          reference_loss: from `rollback.reference_loss`, so that the governor tells data that
            changed from a run that diverged; None where it is not measured.

        Returns:
          The state for the next step, and what happened.
        """
        return update(self._parts, state, adapters, statistics, loss, commands, reference_loss)

    def survey(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Measures where growth would pay and what living seeds are worth.

        Growth potential of every chunk from the gradient's second moments, and, for up to
        `max_ablations` seeds in EVALUATING or FINE_TUNING, the loss without each of them minus the
        loss with it. A loss that is not finite measures nothing; if it is so only with a seed, that
        counts as an error of the seed. With `directed_births`, the state stores the directions in
        which adapters of the most promising dormant seeds begin. Give it held-out batches.

        Args:
          loss_fn: as in `value_and_grad`; deterministic.
          has_aux: whether it returns more than the loss.

        Returns:
          A function of `(params, state, *args, **kwargs)` that returns `(state, SurveyInfo)`.
        """
        options = SurveyOptions(self.adapters_at_once, self.implementation, self.max_ablations)
        return make_survey(self._parts, options, loss_fn, has_aux=has_aux)

    @property
    def external(self) -> ExternalSteps:
        """The same steps for a host outside of JAX, which holds the adapters itself."""
        return ExternalSteps(self._parts, self.max_ablations)
