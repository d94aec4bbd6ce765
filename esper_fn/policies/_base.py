"""What a policy is, and how policies nest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from esper_fn._arguments import check_kind
from esper_fn._control import cond
from esper_fn._layout import Layout
from esper_fn._typing import Array, Bool, Float32, Int8, Int32, Key
from esper_fn.commands import Kind
from esper_fn.lifecycle import NONE, LossTrack, SeedState, Stage


class Observation(NamedTuple):
    """All a policy sees."""

    step: Int32[Array, ""]
    seeds: SeedState
    owner: Int32[Array, "Q"]
    loss: LossTrack
    is_admitted: Bool[Array, "G B"] | None = None
    """Which adapters the limits behind a rule still admit, by layer of a site and by blueprint,
    each on its own. None where no limit stands behind it, or none that depends on the adapter."""


class Requests(NamedTuple):
    """What the rules so far ask for, one row a seed, and who asked or refused."""

    kind: Int8[Array, "S"]
    """A `Kind`; NONE asks nothing."""
    blueprint: Int8[Array, "S"]
    graft: Int8[Array, "S"]
    """Index of an alpha schedule; NONE takes the first."""
    target: Int8[Array, "S"]
    priority: Float32[Array, "S"]
    """Who is kept where a later rule has no room for all; larger is sooner."""
    requested_by: Int8[Array, "S"]
    """Index in `Policy.rules` of the rule that asked, or NONE."""
    vetoed_by: Int8[Array, "S"]
    """Index of the rule that refused, or NONE; NONE again where a later rule asked anew."""


class Init(Protocol):
    """The policy's state, tunable numbers included."""

    def __call__(self, layout: Layout) -> Any:
        """A pytree of arrays."""
        ...


class Decide(Protocol):
    """One decision."""

    def __call__(
        self, layout: Layout, state: Any, seen: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        """The next state, and `requests` with requests added or struck out.

        A rule adds by setting a row's `kind` (and what belongs to it) and strikes out by setting
        it back to NONE; `requested_by` and `vetoed_by` are filled in for it.
        """
        ...


class Admit(Protocol):
    """What a limit still has room for."""

    def __call__(self, layout: Layout, state: Any, seen: Observation) -> Bool[Array, "G B"]:
        """Whether one adapter of each blueprint at each layer of a site would pass on its own."""
        ...


class Policy(NamedTuple):
    """Telemetry and seed states in, requests out: `(init, decide)`, which nest by `chain`."""

    rules: tuple[str, ...]
    """Names of the rules inside, for the decision log."""
    init: Init
    decide: Decide
    admit: Admit | None = None
    """Shown to the rules before this one as `Observation.is_admitted`, so that they ask for what
    fits; None where it does not depend on the adapter."""


def no_requests(num_seeds: int) -> Requests:
    """Nothing is asked."""
    nobody = jnp.full((num_seeds,), NONE, jnp.int8)
    return Requests(
        kind=jnp.zeros((num_seeds,), jnp.int8),
        blueprint=nobody,
        graft=nobody,
        target=nobody,
        priority=jnp.zeros((num_seeds,), jnp.float32),
        requested_by=nobody,
        vetoed_by=nobody,
    )


def rule(name: str, init: Init, decide: Decide, admit: Admit | None = None) -> Policy:
    """A policy of one named rule, which has asked where a row differs from what it was given.

    Args:
      name: in the decision log.
      init: see `Init`.
      decide: see `Decide`.
      admit: of a limit that some adapters may pass and others not; see `Admit`.
    """

    def noted(
        layout: Layout, state: Any, seen: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        state, after = decide(layout, state, seen, requests, key)
        had, has = requests.kind != Kind.NONE, after.kind != Kind.NONE
        asks = has & (
            (after.kind != requests.kind)
            | (after.blueprint != requests.blueprint)
            | (after.graft != requests.graft)
            | (after.target != requests.target)
        )
        mine, nobody = jnp.zeros_like(after.kind), jnp.full_like(after.kind, NONE)
        return state, after._replace(
            requested_by=jnp.where(asks, mine, requests.requested_by),
            vetoed_by=jnp.where(had & ~has, mine, jnp.where(asks, nobody, requests.vetoed_by)),
        )

    return Policy(rules=(name,), init=init, decide=noted, admit=admit)


def chain(*policies: Policy) -> Policy:
    """The policies in turn, each acting on what the ones before it ask.

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
        layout: Layout, state: Any, seen: Observation, requests: Requests, key: Key
    ) -> tuple[Any, Requests]:
        states = []
        first = 0
        admitted = _admitted_before(policies, layout, state, seen)
        for index, policy in enumerate(policies):
            nobody = jnp.full_like(requests.kind, NONE)
            child, after = policy.decide(
                layout,
                state[index],
                seen._replace(is_admitted=admitted[index + 1]),
                requests._replace(requested_by=nobody, vetoed_by=nobody),
                jax.random.fold_in(key, index),
            )
            asked, vetoed = after.requested_by != NONE, after.vetoed_by != NONE
            requests = after._replace(
                requested_by=jnp.where(
                    asked, after.requested_by + jnp.int8(first), requests.requested_by
                ),
                vetoed_by=jnp.where(
                    vetoed,
                    after.vetoed_by + jnp.int8(first),
                    jnp.where(asked, nobody, requests.vetoed_by),
                ),
            )
            states.append(child)
            first += len(policy.rules)
        return tuple(states), requests

    def admit(layout: Layout, state: Any, seen: Observation) -> Bool[Array, "G B"]:
        everything = jnp.ones(layout.tables.costs.shape, bool)
        seen = seen._replace(is_admitted=everything)
        return jnp.asarray(_admitted_before(policies, layout, state, seen)[0])

    is_limiting = any(policy.admit is not None for policy in policies)
    return Policy(rules=rules, init=init, decide=decide, admit=admit if is_limiting else None)


def _admitted_before(
    policies: Sequence[Policy], layout: Layout, states: Any, seen: Observation
) -> list[Bool[Array, "G B"] | None]:
    """What the policies from each one on admit, and at last what stands behind all of them."""
    admitted = [seen.is_admitted]
    for policy, state in zip(reversed(policies), reversed(states), strict=True):
        behind = admitted[-1]
        if policy.admit is not None:
            own = policy.admit(layout, state, seen)
            behind = own if behind is None else own & behind
        admitted.append(behind)
    return admitted[::-1]


_LIMITS = frozenset({"budget", "concurrency", "cooldown", "quota", "until"})


def check_order(policy: Policy) -> None:
    """Raises `ValueError` where a policy limits what no rule before it asks for."""
    first = next(iter(policy.rules), None)
    if first in _LIMITS:
        asks = [name for name in policy.rules if name not in _LIMITS]
        raise ValueError(
            f"policy: its rules are {list(policy.rules)}, and {first!r} only limits what rules "
            "before it ask for, so "
            + (f"it would limit nothing of {asks}" if asks else "nothing would ever grow")
            + f"; put a rule that asks first, `chain(plateau(), {first}(...))`, or `never()` for "
            "growth by commands alone"
        )


def strike(requests: Requests, is_struck: Bool[Array, "S"]) -> Requests:
    """The requests without the germinations in `is_struck`."""
    is_struck = is_struck & (requests.kind == Kind.GERMINATE)
    return requests._replace(kind=jnp.where(is_struck, jnp.int8(Kind.NONE), requests.kind))


def germinations(requests: Requests) -> Bool[Array, "S"]:
    """Who is asked to germinate."""
    return requests.kind == Kind.GERMINATE


def servable(requests: Requests, seen: Observation) -> Bool[Array, "S"]:
    """Who is asked to germinate and can; any other request is refused by the table in the end."""
    return germinations(requests) & (seen.seeds.stage == Stage.DORMANT)


def by_priority(requests: Requests, asks: Bool[Array, "S"]) -> Int32[Array, "S"]:
    """Seeds in the order in which germinations are served; those not in `asks` come last."""
    urgency = jnp.where(asks, -requests.priority, jnp.inf)
    return jnp.argsort(urgency, stable=True).astype(jnp.int32)


def when_asked(requests: Requests, narrow: Any) -> Requests:
    """`narrow(requests)`, computed only in steps in which a germination is asked."""
    result: Requests = cond(jnp.any(germinations(requests)), narrow, lambda same: same, requests)
    return result
