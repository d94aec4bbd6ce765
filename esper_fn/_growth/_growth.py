"""One growing network: the assembly of layout, lifecycle, grafting, policy and governor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from esper_fn import governors, grafting, lifecycle, policies, telemetry
from esper_fn._arguments import check_function, check_key
from esper_fn._control import vary_alike
from esper_fn._growth._births import newborn
from esper_fn._growth._checks import (
    check_options,
    check_parts,
    check_policy,
    check_reached,
    check_state,
    checked_grafts,
    loss_of,
    no_gradient,
)
from esper_fn._growth._state import GrowthState, LossFn, StepInfo, SurveyInfo
from esper_fn._growth._survey import conclude, on_trial, survey
from esper_fn._growth._update import advance, update
from esper_fn._layout import (
    Layout,
    Memory,
    init_adapters,
    make_layout,
    no_directions,
    per_slot_tree,
    slot_gains,
    statistics_of,
    view,
    zero_taps,
)
from esper_fn._leaves import check_leaves, combine, partition
from esper_fn._sites import Moments, Seeds, Site, Visits
from esper_fn._typing import Adapters, Array, Bool, DType, Float32, Int32, Key, Params, Scalar
from esper_fn.base import Blueprint, Implementation
from esper_fn.commands import Command, Commands, pack
from esper_fn.grafting._select import init_states
from esper_fn.lifecycle import NONE, Stage
from esper_fn.optim import AdapterGradients, Slots
from esper_kernels import Statistics

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
        directions (`telemetry.directions`) a survey remembers. If such a seed germinates before
        the next survey, with a blueprint that offers `init_along`, its adapter begins along them;
        any other adapter begins as the blueprint's `init` says. A survey replaces what an earlier
        one remembered; one that did not reach a site, or found nothing finite there, forgets it,
        and so does a roll-back. With 0, the default, there is no memory and no cost.

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

    def init(self, key: Key) -> GrowthState:
        """All seeds dormant, all slots free.

        Raises:
          TypeError: `key` is no random key.
        """
        check_key(key)
        return self._init(key) if isinstance(key, jax.core.Tracer) else self._compiled_init(key)

    def _init(self, key: Key) -> GrowthState:
        adapter_key, key = jax.random.split(key)
        num_slots = self.layout.num_slots
        return GrowthState(
            seeds=lifecycle.seed_state(self.layout.num_seeds),
            adapters=init_adapters(self.layout, adapter_key),
            owner=jnp.full((num_slots,), NONE, jnp.int32),
            generation=jnp.zeros((num_slots,), jnp.int32),
            loss=lifecycle.loss_track(),
            settings=self.settings,
            grafts=init_states(self.grafts, self.layout.num_seeds),
            policy=self.policy.init(self.layout),
            governor=self.governor.init(self.layout.num_seeds),
            key=key,
            step=jnp.int32(0),
            memory=no_directions(self.layout, self.directed_births, telemetry.NUM_DIRECTIONS)
            if self.directed_births
            else None,
        )

    def seeds(self, state: GrowthState) -> Seeds:
        """The seeds for a forward pass, as in an evaluation: `loss_fn(params, seeds, batch)`."""
        check_state(self, state, "growth.seeds(state)")
        return view(
            self.layout,
            state.owner,
            slot_gains(state.seeds, state.owner, state.settings),
            state.adapters,
            zero_taps(self.layout),
            at_once=self.adapters_at_once,
            implementation=self.implementation,
        )

    def slots(self, state: GrowthState) -> Mapping[str, Mapping[str, Slots]]:
        """What `optim.per_adapter` must know of every slot."""
        check_state(self, state, "growth.slots(state)", with_adapters=False)
        births = per_slot_tree(self.layout, state.generation)
        learns = per_slot_tree(
            self.layout, slot_gains(state.seeds, state.owner, state.settings)[:, 1] != 0
        )
        return {
            site: {
                name: Slots(generation=at_site[name], learns=learns[site][name]) for name in at_site
            }
            for site, at_site in births.items()
        }

    def commands(self, commands: Sequence[Command] = (), size: int = 4) -> Commands:
        """Commands as arrays for `update`; see `esper_fn.commands.pack`."""
        return pack(self.layout, [graft.name for graft in self.grafts], commands, size)

    def seed(self, state: GrowthState, index: int) -> lifecycle.Seed:
        """One seed to read; transfers a row from the device."""
        check_state(self, state, "growth.seed(state, index)", with_adapters=False)
        place, layer, chunk = self.layout.locate(index)
        row = jax.device_get(jax.tree.map(lambda leaf: leaf[index], state.seeds))
        told = row.telemetry

        def known(value: Any, count: Any) -> float | None:
            return float(value) if count > 0 else None

        return lifecycle.Seed(
            index=index,
            site=place.name,
            layer=layer,
            chunk=chunk,
            stage=Stage(int(row.stage)),
            parent=Stage(int(row.parent)),
            steps_in_stage=int(row.steps_in_stage),
            blueprint=self.layout.names[int(row.blueprint)] if row.blueprint >= 0 else None,
            slot=int(row.slot) if row.slot >= 0 else None,
            alpha=float(row.alpha),
            graft=self.grafts[int(row.graft)].name,
            embargo_steps=int(row.embargo_steps),
            error_count=int(row.error_count),
            stability=float(row.stability),
            utility=known(told.utility, told.num_live_steps),
            potential=known(row.potential, row.num_potentials),
            contribution=known(row.contribution, row.num_contributions),
        )

    def value_and_grad(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Like `jax.value_and_grad` of `loss_fn(params, seeds, *args)`, with the seeds measured.

        Each site loops over its live adapters, `adapters_at_once` in a round, so time and memory
        follow the number alive. Under `vmap` over states every round selects among whole
        activations: use `growth(adapters_at_once=None)` there.

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
        check_function("loss_fn", loss_fn, "loss_fn(params, seeds, *args)")

        def run(params: Params, state: GrowthState, *args: Any, **kwargs: Any) -> Any:
            check_state(self, state, "(params, state, *args)")
            check_leaves("params", params)
            visits = Visits()
            learning, still = partition(params)
            gains = slot_gains(state.seeds, state.owner, state.settings)

            def loss(learning: Params, adapters: Adapters, taps: Any) -> Any:
                seeds = view(
                    self.layout,
                    state.owner,
                    gains,
                    adapters,
                    taps,
                    at_once=self.adapters_at_once,
                    implementation=self.implementation,
                    visits=visits,
                )
                value = loss_fn(combine(learning, still), seeds, *args, **kwargs)
                return loss_of(value, has_aux)

            value, (slopes, d_adapters, d_taps) = jax.value_and_grad(
                loss, argnums=(0, 1, 2), has_aux=has_aux
            )(learning, state.adapters, vary_alike(zero_taps(self.layout), state.owner))
            check_reached(self.layout, visits)
            d_params = combine(slopes, jax.tree.map(no_gradient, still))
            return value, (d_params, AdapterGradients(d_adapters)), statistics_of(d_taps)

        return run

    def update(
        self,
        state: GrowthState,
        adapters: Adapters,
        statistics: Statistics,
        loss: Scalar,
        commands: Commands | None = None,
    ) -> tuple[GrowthState, StepInfo]:
        """One step of every seed's life.

        Differentiable in the adapters; what was measured counts as constant.

        Args:
          state: before the step.
          adapters: parameters after the optimiser's update; adapters that do not learn keep their
            old ones whatever stands here, bit for bit, and so does one that became non-finite.
          statistics: from `value_and_grad`.
          loss: the training loss of the step.
          commands: what people ask, from `commands`.

        Returns:
          The state for the next step, and what happened.
        """
        return update(self, state, adapters, statistics, loss, commands)

    def survey(self, loss_fn: LossFn, *, has_aux: bool = False) -> Callable[..., Any]:
        """Measures where growth would pay and what living seeds are worth.

        Growth potential of every chunk from the gradient's second moments, and, for up to
        `max_ablations` seeds in EVALUATING or FINE_TUNING, the loss without each of them minus the
        loss with it. A loss that is not finite measures nothing; if it is so only with a seed, that
        counts as an error of the seed. With `directed_births`, the state remembers where adapters
        of the most promising dormant seeds should look. Give it held-out batches.

        Args:
          loss_fn: as in `value_and_grad`; deterministic.
          has_aux: whether it returns more than the loss.

        Returns:
          A function of `(params, state, *args, **kwargs)` that returns `(state, SurveyInfo)`.
        """
        return survey(self, loss_fn, has_aux=has_aux)

    # For a host outside of JAX, which keeps the adapters itself (`torch_bridge`): the same steps
    # with the state's adapters left alone.

    def advance(
        self,
        state: GrowthState,
        statistics: Statistics,
        loss: Scalar,
        *,
        drift: Float32[Array, "S"],
        has_broken: Bool[Array, "S"],
        commands: Commands | None = None,
    ) -> tuple[GrowthState, StepInfo, Key]:
        """`update` without the adapters: whoever holds them settles and bears them.

        Args:
          state: before the step; its `adapters` are handed on.
          statistics: as in `update`.
          loss: as in `update`.
          drift: how far each seed's adapter moved, over the size it had.
          has_broken: seeds whose adapter became non-finite and was put back.
          commands: as in `update`.

        Returns:
          The state, what happened, and the key for `newborn` of the slots whose `generation` rose.
        """
        return advance(
            self, state, statistics, loss, drift=drift, has_broken=has_broken, commands=commands
        )

    def gains(self, state: GrowthState) -> Float32[Array, "Q 4"]:
        """The gains of every slot, the columns of `esper_kernels.Gains`; zero for free slots."""
        return slot_gains(state.seeds, state.owner, state.settings)

    def newborn(
        self, key: Key, slot: int, seed: int = NONE, memory: Memory | None = None
    ) -> Params:
        """The adapter that `update` puts into a slot, bit for bit. Not for use inside `jit`.

        Args:
          key: from `advance`.
          slot: on the flat slot axis.
          seed: who holds it.
          memory: of the state before `advance`.
        """
        return newborn(self.layout, key, slot, seed, memory)

    def on_trial(self, state: GrowthState) -> tuple[Int32[Array, "V"], Bool[Array, "V"]]:
        """The seeds whose contribution a survey should measure now, and which rows are meant."""
        return on_trial(self, state)

    def conclude(
        self,
        state: GrowthState,
        moments: Sequence[Sequence[Array]],
        loss: Scalar,
        chosen: Int32[Array, "V"],
        is_chosen: Bool[Array, "V"],
        missing: Float32[Array, "V"],
    ) -> tuple[GrowthState, SurveyInfo]:
        """What a survey makes of its measurements.

        Args:
          state: as it was surveyed.
          moments: of each site the rows, `x^T dy`, `x^T x` and `dy^T dy` of every chunk.
          loss: on held-out data.
          chosen: from `on_trial`.
          is_chosen: from `on_trial`.
          missing: the loss without each of them.
        """
        own = [Moments(*site) for site in moments]
        return conclude(self, state, own, loss, chosen, is_chosen, missing)
