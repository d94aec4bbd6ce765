"""Whether a policy keeps the contract."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn import blueprints
from esper_fn._arguments import check_kind, describe
from esper_fn._contract import Contract
from esper_fn._layout import Layout, make_layout
from esper_fn._sites import site
from esper_fn._typing import Array
from esper_fn.lifecycle import NONE, NUM_STAGES, Stage
from esper_fn.lifecycle._commands import Kind, Requests, no_requests
from esper_fn.lifecycle._loss import loss_track, track_loss
from esper_fn.lifecycle._state import seed_state
from esper_fn.policies._base import Observation, Policy, request
from esper_fn.policies._select import seed_blueprints

_STEPS = 24


def check(policy: Policy, layout: Layout | None = None) -> None:
    """Runs a policy and raises where it breaks its contract.

    The state must be arrays, and a decision must keep the shapes and dtypes of state and requests.
    It must name rules and blueprints that there are, note which rule asked or refused, and decide
    the same from the same state, observation, requests and key.

    Args:
      policy: any one.
      layout: `growth.layout` of a growth it is for; a small one of two sites when left out.

    Raises:
      TypeError: it is no `Policy`.
      ValueError: it breaks the contract; the message says how.

    >>> from esper_fn import policies
    >>> check(policies.periodic(every=3))
    """
    check_kind("policy", policy, Policy, "call its factory: `plateau()`")
    contract = Contract(f"policy {list(policy.rules)}")
    if not all(isinstance(name, str) for name in policy.rules):
        contract.fail(f"rules must be names, got {policy.rules!r}")
    layout = _small_layout() if layout is None else layout
    state = policy.init(layout)
    contract.check_state(state)

    # Compiled once: what depends on a value must be array code.
    @jax.jit
    def decide(state: Any, observation: Observation, requests: Requests, key: Array) -> Any:
        return policy.decide(layout, state, observation, requests, key)

    rng = np.random.default_rng(0)
    track = loss_track()
    for step in range(_STEPS):
        track, _ = track_loss(track, jnp.float32(rng.uniform(0.5, 1.0)))
        observation = _observe(layout, rng, step, track)
        requests = _wishes(layout, rng, observation)
        key = jax.random.key(step)
        result = decide(state, observation, requests, key)
        contract.check_pair("decide", result, "requests")
        contract.check_same_form("decide", state, result[0])
        _check_requests(contract, policy, layout, requests, result[1])
        again = decide(state, observation, requests, jax.random.clone(key))
        if not jax.tree.all(jax.tree.map(_is_same, again, result)):
            contract.fail("the same arguments lead to different decisions")
        _check_admit(contract, policy, layout, state, observation)
        state = result[0]


def _is_same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating))


def _small_layout() -> Layout:
    return make_layout(
        sites=[
            site("vectors", features=8, chunks=2),
            site("images", features=4, chunks=2, topology="image", positions=4),
        ],
        blueprints={
            "bottleneck_conv": blueprints.bottleneck_conv(width=2),
            "low_rank": blueprints.low_rank(rank=2),
        },
        capacity=2,
    )


def _observe(layout: Layout, rng: np.random.Generator, step: int, track: Any) -> Observation:
    num_seeds = layout.num_seeds
    seeds = seed_state(num_seeds)

    def measured(scale: float) -> Array:
        return jnp.asarray(scale * rng.normal(size=num_seeds), jnp.float32)

    stages = np.where(rng.uniform(size=num_seeds) < 0.5, Stage.DORMANT, Stage.CULLED)
    count = jnp.full((num_seeds,), step, jnp.int32)
    seeds = seeds._replace(
        stage=jnp.asarray(stages, jnp.int8),
        steps_in_stage=count,
        potential=jnp.abs(measured(1.0)),
        num_potentials=count,
        contribution=measured(0.1),
        num_contributions=count,
        telemetry=seeds.telemetry._replace(gradient_norm=jnp.abs(measured(1.0)), num_steps=count),
    )
    return Observation(
        step=jnp.int32(step),
        seeds=seeds,
        owner=jnp.full((layout.num_slots,), NONE, jnp.int32),
        loss=track,
        step_loss=track.fast,
    )


def _wishes(layout: Layout, rng: np.random.Generator, observation: Observation) -> Requests:
    """Germinations that rules before the policy might ask for."""
    is_wished = jnp.asarray(rng.uniform(size=layout.num_seeds) < 0.3)
    is_wished &= observation.seeds.stage == Stage.DORMANT
    return request(no_requests(layout.num_seeds), is_wished, seed_blueprints(layout), 1.0)


def _check_requests(
    contract: Contract, policy: Policy, layout: Layout, before: Requests, after: Any
) -> None:
    if not isinstance(after, Requests):
        contract.fail(f"decide must return (state, Requests), got {describe(after)} second")
    for name, old, new in zip(Requests._fields, before, after, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            contract.fail(
                f"requests.{name} must be {old.dtype}{list(old.shape)}, got "
                f"{new.dtype}{list(new.shape)}",
            )
    bounds = {
        "kind": (0, max(Kind)),
        "blueprint": (NONE, len(layout.blueprints) - 1),
        "target": (NONE, NUM_STAGES - 1),
        "requested_by": (NONE, len(policy.rules) - 1),
        "vetoed_by": (NONE, len(policy.rules) - 1),
    }
    for name, (low, high) in bounds.items():
        values = np.asarray(getattr(after, name))
        if values.min() < low or values.max() > high:
            contract.fail(f"requests.{name} must be between {low} and {high}, got {values}")
    kind = np.asarray(after.kind)
    is_changed = np.asarray(before.kind) != kind
    if (is_changed & (kind != Kind.NONE) & (np.asarray(after.requested_by) == NONE)).any():
        contract.fail("a request lacks the rule that made it; make the policy with `rule`")
    if (is_changed & (kind == Kind.NONE) & (np.asarray(after.vetoed_by) == NONE)).any():
        contract.fail("a refusal lacks the rule that made it; make the policy with `rule`")


def _check_admit(
    contract: Contract, policy: Policy, layout: Layout, state: Any, observation: Observation
) -> None:
    if policy.admit is None:
        return
    is_admitted = policy.admit(layout, state, observation)
    shape = layout.tables.costs.shape
    if is_admitted.shape != shape or is_admitted.dtype != bool:
        contract.fail(
            f"admit must return bool{list(shape)}, got "
            f"{is_admitted.dtype}{list(is_admitted.shape)}",
        )
