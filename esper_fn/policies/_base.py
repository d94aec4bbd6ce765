"""What a policy is, and how policies nest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from esper_fn._arguments import check_kind
from esper_fn._control import cond
from esper_fn._lattice import Lattice
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
    """Which bodies the limits behind a rule still admit, by layer of a site and by blueprint, each
    on its own. None where no limit stands behind it, or none that depends on the body."""


class Proposal(NamedTuple):
    """What the rules so far ask for, one row a seed, and who asked or refused."""

    kind: Int8[Array, "S"]
    """A `Kind`; NONE asks nothing."""
    blueprint: Int8[Array, "S"]
    graft: Int8[Array, "S"]
    """Index of a grafting strategy; NONE takes the first."""
    target: Int8[Array, "S"]
    priority: Float32[Array, "S"]
    """Who is kept where a later rule has no room for all; larger is sooner."""
    asked_by: Int8[Array, "S"]
    """Index in `Policy.rules` of the rule that asked, or NONE."""
    vetoed_by: Int8[Array, "S"]
    """Index of the rule that refused, or NONE; NONE again where a later rule asked anew."""


class Init(Protocol):
    """The policy's state, tunable numbers included."""

    def __call__(self, lattice: Lattice) -> Any:
        """A pytree of arrays."""
        ...


class Decide(Protocol):
    """One decision."""

    def __call__(
        self, lattice: Lattice, state: Any, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[Any, Proposal]:
        """The next state, and `proposal` with requests added or struck out.

        A rule adds by setting a row's `kind` (and what belongs to it) and strikes out by setting
        it back to NONE; `asked_by` and `vetoed_by` are filled in for it.
        """
        ...


class Admit(Protocol):
    """What a limit still has room for."""

    def __call__(self, lattice: Lattice, state: Any, seen: Observation) -> Bool[Array, "G B"]:
        """Whether one body of each blueprint at each layer of a site would pass on its own."""
        ...


class Policy(NamedTuple):
    """Telemetry and seed states in, requests out: `(init, decide)`, which nest by `chain`."""

    rules: tuple[str, ...]
    """Names of the rules inside, for the decision log."""
    init: Init
    decide: Decide
    admit: Admit | None = None
    """Shown to the rules before this one as `Observation.is_admitted`, so that they ask for what
    fits; None where it does not depend on the body."""


def no_proposal(num_seeds: int) -> Proposal:
    """Nothing is asked."""
    nobody = jnp.full((num_seeds,), NONE, jnp.int8)
    return Proposal(
        kind=jnp.zeros((num_seeds,), jnp.int8),
        blueprint=nobody,
        graft=nobody,
        target=nobody,
        priority=jnp.zeros((num_seeds,), jnp.float32),
        asked_by=nobody,
        vetoed_by=nobody,
    )


def rule(name: str, init: Init, decide: Decide, admit: Admit | None = None) -> Policy:
    """A policy of one named rule, which has asked where a row differs from what it was given.

    Args:
      name: in the decision log.
      init: see `Init`.
      decide: see `Decide`.
      admit: of a limit that some bodies may pass and others not; see `Admit`.
    """

    def noted(
        lattice: Lattice, state: Any, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[Any, Proposal]:
        state, after = decide(lattice, state, seen, proposal, key)
        had, has = proposal.kind != Kind.NONE, after.kind != Kind.NONE
        asks = has & (
            (after.kind != proposal.kind)
            | (after.blueprint != proposal.blueprint)
            | (after.graft != proposal.graft)
            | (after.target != proposal.target)
        )
        mine, nobody = jnp.zeros_like(after.kind), jnp.full_like(after.kind, NONE)
        return state, after._replace(
            asked_by=jnp.where(asks, mine, proposal.asked_by),
            vetoed_by=jnp.where(had & ~has, mine, jnp.where(asks, nobody, proposal.vetoed_by)),
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

    def init(lattice: Lattice) -> Any:
        return tuple(policy.init(lattice) for policy in policies)

    def decide(
        lattice: Lattice, state: Any, seen: Observation, proposal: Proposal, key: Key
    ) -> tuple[Any, Proposal]:
        states = []
        first = 0
        admitted = _admitted_before(policies, lattice, state, seen)
        for index, policy in enumerate(policies):
            nobody = jnp.full_like(proposal.kind, NONE)
            child, after = policy.decide(
                lattice,
                state[index],
                seen._replace(is_admitted=admitted[index + 1]),
                proposal._replace(asked_by=nobody, vetoed_by=nobody),
                jax.random.fold_in(key, index),
            )
            asked, vetoed = after.asked_by != NONE, after.vetoed_by != NONE
            proposal = after._replace(
                asked_by=jnp.where(asked, after.asked_by + jnp.int8(first), proposal.asked_by),
                vetoed_by=jnp.where(
                    vetoed,
                    after.vetoed_by + jnp.int8(first),
                    jnp.where(asked, nobody, proposal.vetoed_by),
                ),
            )
            states.append(child)
            first += len(policy.rules)
        return tuple(states), proposal

    def admit(lattice: Lattice, state: Any, seen: Observation) -> Bool[Array, "G B"]:
        everything = jnp.ones(lattice.tables.costs.shape, bool)
        seen = seen._replace(is_admitted=everything)
        return jnp.asarray(_admitted_before(policies, lattice, state, seen)[0])

    is_limiting = any(policy.admit is not None for policy in policies)
    return Policy(rules=rules, init=init, decide=decide, admit=admit if is_limiting else None)


def _admitted_before(
    policies: Sequence[Policy], lattice: Lattice, states: Any, seen: Observation
) -> list[Bool[Array, "G B"] | None]:
    """What the policies from each one on admit, and at last what stands behind all of them."""
    admitted = [seen.is_admitted]
    for policy, state in zip(reversed(policies), reversed(states), strict=True):
        behind = admitted[-1]
        if policy.admit is not None:
            own = policy.admit(lattice, state, seen)
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


def strike(proposal: Proposal, is_struck: Bool[Array, "S"]) -> Proposal:
    """The proposal without the germinations in `is_struck`."""
    is_struck = is_struck & (proposal.kind == Kind.GERMINATE)
    return proposal._replace(kind=jnp.where(is_struck, jnp.int8(Kind.NONE), proposal.kind))


def germinations(proposal: Proposal) -> Bool[Array, "S"]:
    """Who is asked to germinate."""
    return proposal.kind == Kind.GERMINATE


def servable(proposal: Proposal, seen: Observation) -> Bool[Array, "S"]:
    """Who is asked to germinate and can; any other request is refused by the table in the end."""
    return germinations(proposal) & (seen.seeds.stage == Stage.DORMANT)


def by_priority(proposal: Proposal, asks: Bool[Array, "S"]) -> Int32[Array, "S"]:
    """Seeds in the order in which germinations are served; those not in `asks` come last."""
    urgency = jnp.where(asks, -proposal.priority, jnp.inf)
    return jnp.argsort(urgency, stable=True).astype(jnp.int32)


def when_asked(proposal: Proposal, narrow: Any) -> Proposal:
    """`narrow(proposal)`, computed only in steps in which a germination is asked."""
    result: Proposal = cond(jnp.any(germinations(proposal)), narrow, lambda same: same, proposal)
    return result
