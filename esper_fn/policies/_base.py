"""What a policy is, and how policies nest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from esper_fn._arguments import check_kind
from esper_fn._control import cond
from esper_fn._layout import Layout
from esper_fn._typing import Array, Bool, Float32, Int8, Int32, Key
from esper_fn.lifecycle import NONE, LossTrack, SeedState, Stage
from esper_fn.lifecycle._commands import Kind, Requests


class Observation(NamedTuple):
    """What a policy may react to in a step."""

    step: Int32[Array, ""]
    seeds: SeedState
    owner: Int32[Array, "Q"]
    """The seed that holds each slot, or `NONE`."""
    loss: LossTrack
    """Averages of the training loss, this step's included."""
    step_loss: Float32[Array, ""]
    """The training loss of this step; it may be not finite."""
    is_admitted: Bool[Array, "G B"] | None = None
    """Whether the limits behind a rule still have room for one adapter, by layer of a site and by
    blueprint. None where no limit behind it depends on the adapter."""


class Init(Protocol):
    """The state of a policy."""

    def __call__(self, layout: Layout) -> Any:
        """Any pytree of arrays, tunable numbers included: a new value compiles nothing anew.

        This is the place to refuse a layout that the policy does not fit.
        """
        ...


class Decide(Protocol):
    """One decision of a policy."""

    def __call__(
        self, layout: Layout, state: Any, observation: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        """The next state, of the same shapes and dtypes, and `requests` with rows set or unset.

        A policy asks by setting a row's `kind` and what belongs to it, and refuses by setting the
        `kind` back to `Kind.NONE`. `rule` fills in `requested_by` and `vetoed_by`.
        """
        ...


class Admit(Protocol):
    """What a limiting policy still has room for."""

    def __call__(self, layout: Layout, state: Any, observation: Observation) -> Bool[Array, "G B"]:
        """Whether the limit would let one adapter pass, by layer of a site and by blueprint."""
        ...


class Policy(NamedTuple):
    """Who asks for growth or limits it: `(init, decide)`, which nest by `chain`."""

    rules: tuple[str, ...]
    """Names of the rules inside, for the decision log; `rule` makes a policy of one."""
    init: Init
    decide: Decide
    admit: Admit | None = None
    """What the rules before this one see as `Observation.is_admitted`, so that they ask for what
    fits; None where the adapter makes no difference."""


def rule(name: str, init: Init, decide: Decide, admit: Admit | None = None) -> Policy:
    """Makes a policy of one rule, whose requests and refusals the decision log shows.

    A row counts as requested by this rule where it asks for something else than before, and as
    refused by it where it asked for something before and asks for nothing now.

    Args:
      name: the rule's name in the decision log.
      init: see `Init`.
      decide: see `Decide`.
      admit: see `Admit`; for a limit that lets some adapters pass and others not.

    Returns:
      The policy.

    >>> def decide(layout, state, observation, requests, key):
    ...     return state, requests
    >>> rule("quiet", lambda layout: (), decide).rules
    ('quiet',)
    """

    def decide_and_note(
        layout: Layout, state: Any, observation: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        state, after = decide(layout, state, observation, requests, key)
        is_set, was_set = after.kind != Kind.NONE, requests.kind != Kind.NONE
        is_new = is_set & (
            (after.kind != requests.kind)
            | (after.blueprint != requests.blueprint)
            | (after.graft != requests.graft)
            | (after.target != requests.target)
        )
        this, none = jnp.zeros_like(after.kind), jnp.full_like(after.kind, NONE)
        return state, after._replace(
            requested_by=jnp.where(is_new, this, requests.requested_by),
            vetoed_by=jnp.where(
                was_set & ~is_set, this, jnp.where(is_new, none, requests.vetoed_by)
            ),
        )

    return Policy(rules=(name,), init=init, decide=decide_and_note, admit=admit)


def chain(*policies: Policy) -> Policy:
    """Puts policies behind one another: each acts on the requests of those before it.

    Args:
      *policies: first the ones that ask, then the ones that limit.

    Returns:
      One policy, whose rules are all of theirs.

    Raises:
      TypeError: one of them is no policy.
      ValueError: there are more than 127 rules.

    >>> from esper_fn.policies import cooldown, periodic
    >>> chain(periodic(every=10), chain(cooldown(steps=5))).rules
    ('periodic', 'cooldown')
    """
    for policy in policies:
        check_kind("a link of the chain", policy, Policy, "call a factory: `plateau()`, not a list")
    rules = tuple(name for policy in policies for name in policy.rules)
    if len(rules) > 127:
        raise ValueError(f"at most 127 rules, got {len(rules)}")

    def init(layout: Layout) -> Any:
        return tuple(policy.init(layout) for policy in policies)

    def decide(
        layout: Layout, state: Any, observation: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        return _decide_in_turn(policies, layout, state, observation, requests, key)

    def admit(layout: Layout, state: Any, observation: Observation) -> Bool[Array, "G B"]:
        everything = jnp.ones(layout.tables.costs.shape, bool)
        observation = observation._replace(is_admitted=everything)
        return jnp.asarray(_admitted_before(policies, layout, state, observation)[0])

    is_limiting = any(policy.admit is not None for policy in policies)
    return Policy(rules=rules, init=init, decide=decide, admit=admit if is_limiting else None)


def _decide_in_turn(
    policies: Sequence[Policy],
    layout: Layout,
    state: Any,
    observation: Observation,
    requests: Requests,
    key: Key,
) -> tuple[Any, Requests]:
    states = []
    first = 0
    admitted = _admitted_before(policies, layout, state, observation)
    for index, policy in enumerate(policies):
        none = jnp.full_like(requests.kind, NONE)
        new_state, after = policy.decide(
            layout,
            state[index],
            observation._replace(is_admitted=admitted[index + 1]),
            requests._replace(requested_by=none, vetoed_by=none),
            jax.random.fold_in(key, index),
        )
        is_new, is_refused = after.requested_by != NONE, after.vetoed_by != NONE
        offset = jnp.int8(first)
        requests = after._replace(
            requested_by=jnp.where(is_new, after.requested_by + offset, requests.requested_by),
            vetoed_by=jnp.where(
                is_refused,
                after.vetoed_by + offset,
                jnp.where(is_new, none, requests.vetoed_by),
            ),
        )
        states.append(new_state)
        first += len(policy.rules)
    return tuple(states), requests


def _admitted_before(
    policies: Sequence[Policy], layout: Layout, states: Any, observation: Observation
) -> list[Bool[Array, "G B"] | None]:
    """What the policies from each one on admit; the last entry is what stands behind them all."""
    admitted = [observation.is_admitted]
    for policy, state in zip(reversed(policies), reversed(states), strict=True):
        behind = admitted[-1]
        if policy.admit is not None:
            own = policy.admit(layout, state, observation)
            behind = own if behind is None else own & behind
        admitted.append(behind)
    return admitted[::-1]


_LIMITS = frozenset({"budget", "cooldown", "max_concurrent", "max_total", "stop_after"})


def check_order(policy: Policy) -> None:
    """Raises `ValueError` where a policy limits what no rule before it asks for."""
    first = next(iter(policy.rules), None)
    if first in _LIMITS:
        others = [name for name in policy.rules if name not in _LIMITS]
        raise ValueError(
            f"policy: its rules are {list(policy.rules)}, and {first!r} only limits what rules "
            "before it ask for, so "
            + (f"it would limit nothing of {others}" if others else "nothing would ever grow")
            + f"; put a rule that asks first, `chain(plateau(), {first}(...))`, or `never()` for "
            "growth by commands alone"
        )


def request(
    requests: Requests,
    is_requested: Bool[Array, "S"],
    blueprint: Int8[Array, "S"],
    priority: Float32[Array, "S"] | float = 0.0,
) -> Requests:
    """The requests with some germinations more, in place of what these seeds were asked before.

    Args:
      requests: of the rules so far.
      is_requested: seeds that are to germinate.
      blueprint: index of what each of them is to grow; see `seed_blueprints`.
      priority: rules that limit serve larger ones first.

    Returns:
      All requests.
    """
    none = jnp.int8(NONE)
    return requests._replace(
        kind=jnp.where(is_requested, jnp.int8(Kind.GERMINATE), requests.kind),
        blueprint=jnp.where(is_requested, blueprint, requests.blueprint),
        graft=jnp.where(is_requested, none, requests.graft),
        target=jnp.where(is_requested, none, requests.target),
        priority=jnp.where(is_requested, priority, requests.priority),
    )


def refuse(requests: Requests, is_refused: Bool[Array, "S"]) -> Requests:
    """The requests without some germinations; other kinds of requests stay.

    Args:
      requests: of the rules so far.
      is_refused: seeds that are not to germinate.

    Returns:
      The requests that are left.
    """
    is_refused = is_refused & (requests.kind == Kind.GERMINATE)
    return requests._replace(kind=jnp.where(is_refused, jnp.int8(Kind.NONE), requests.kind))


def germinates(requests: Requests) -> Bool[Array, "S"]:
    """The seeds that are asked to germinate."""
    return requests.kind == Kind.GERMINATE


def can_germinate(requests: Requests, observation: Observation) -> Bool[Array, "S"]:
    """The seeds that are asked to germinate and can; the table refuses any other request later."""
    return germinates(requests) & (observation.seeds.stage == Stage.DORMANT)


def by_priority(requests: Requests, is_candidate: Bool[Array, "S"]) -> Int32[Array, "S"]:
    """Seeds in the order in which germinations are served; the candidates come first."""
    urgency = jnp.where(is_candidate, -requests.priority, jnp.inf)
    return jnp.argsort(urgency, stable=True).astype(jnp.int32)


def if_germinating(requests: Requests, limit: Callable[[Requests], Requests]) -> Requests:
    """`limit(requests)`, computed only in steps in which a germination is requested."""
    result: Requests = cond(
        jnp.any(germinates(requests)), limit, lambda requests: requests, requests
    )
    return result
