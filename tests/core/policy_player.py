"""A small layout, what policies see of it, and a policy that is asked step by step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drive import NONE

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn.commands import Kind
from esper_fn.lifecycle._loss import loss_track
from esper_fn.lifecycle._state import seed_state
from esper_fn.policies import Observation, Requests, no_requests, periodic


@lru_cache(maxsize=1)
def layout() -> Any:
    """Seeds 0-2 of `a` (2 features each), 3-4 of `b` (4 each), 5 of the image `c`.

    Slots 0-1, 2-3 are `a`'s `scale` and `rank`, 4-5, 6-7 `b`'s, 8 `c`'s `scale`, 9 its `rank`, 10
    its `conv`. Parameters: scale 2 F, rank 4 F, conv 4 F.
    """
    return make_layout(
        sites=[
            ef.site("a", features=6, chunks=3),
            ef.site("b", features=8, chunks=2),
            ef.site("c", features=2, topology="image", positions=4),
        ],
        blueprints={
            "scale": ef.blueprints.scale_shift(),
            "rank": ef.blueprints.low_rank(rank=2),
            "conv": ef.blueprints.depthwise_conv(window=2),
        },
        capacity=2,
    )


def observe(
    step: int = 0,
    *,
    stage: Sequence[int] = (0,) * 6,
    loss: float | None = None,
    owner: Sequence[int] = (NONE,) * 11,
    potential: Sequence[float | None] = (None,) * 6,
    gradient: Sequence[float | None] = (None,) * 6,
    contribution: Sequence[float | None] = (None,) * 6,
    steps_in_stage: Sequence[int] = (9,) * 6,
    is_paused: Sequence[bool] = (False,) * 6,
    slot: Sequence[int] = (NONE,) * 6,
    utility: Sequence[float] = (0.0,) * 6,
    step_loss: float | None = None,
) -> Observation:
    """What a policy sees; `None` is not measured.

    The loss varies by 0.1 around its average `loss`; that of the step is the average when left out.
    """

    def known(values: Sequence[float | None]) -> tuple[jax.Array, jax.Array]:
        value = jnp.asarray([0.0 if v is None else v for v in values], jnp.float32)
        return value, jnp.asarray([0 if v is None else 3 for v in values], jnp.int32)

    seeds = DORMANT
    surveyed, num_potentials = known(potential)
    norm, num_steps = known(gradient)
    worth, num_contributions = known(contribution)
    track = loss_track()
    if loss is not None:
        track = track._replace(
            slow=jnp.float32(loss), square=jnp.float32(0.01), num_steps=jnp.int32(100)
        )
    return Observation(
        step=jnp.int32(step),
        seeds=seeds._replace(
            stage=jnp.asarray(stage, jnp.int8),
            steps_in_stage=jnp.asarray(steps_in_stage, jnp.int32),
            is_paused=jnp.asarray(is_paused),
            slot=jnp.asarray(slot, jnp.int32),
            potential=surveyed,
            num_potentials=num_potentials,
            contribution=worth,
            num_contributions=num_contributions,
            telemetry=seeds.telemetry._replace(
                gradient_norm=norm,
                num_steps=num_steps,
                utility_slow=jnp.asarray(utility, jnp.float32),
            ),
        ),
        owner=jnp.asarray(owner, jnp.int32),
        loss=track,
        step_loss=track.slow if step_loss is None else jnp.float32(step_loss),
    )


@cache
def compiled(policy: Any) -> Any:
    return jax.jit(lambda *args: policy.decide(layout(), *args))


NOTHING = no_requests(6)
DORMANT = seed_state(6)


class Player:
    """A policy with its state, asked step by step."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.state = policy.init(layout())
        self.decide = compiled(policy)
        self.key = jax.random.key(0)

    def ask(self, observation: Observation, requests: Requests | None = None) -> Requests:
        self.key, key = jax.random.split(self.key)
        requests = NOTHING if requests is None else requests
        self.state, requests = self.decide(self.state, observation, requests, key)
        return requests


def requested(requests: Requests) -> list[int]:
    return np.flatnonzero(np.asarray(requests.kind) == Kind.GERMINATE).tolist()


def wish(
    *seeds: int, priority: Sequence[float] | None = None, blueprint: Sequence[int] | int = 0
) -> Requests:
    """Germinations that some rule before has asked."""
    result = jax.tree.map(np.array, NOTHING)
    index = list(seeds)
    result.kind[index] = Kind.GERMINATE
    result.blueprint[index] = blueprint
    result.priority[index] = 0.0 if priority is None else priority
    result.requested_by[index] = 0
    return jax.tree.map(jnp.asarray, result)


ALL = (0.1, 0.6, 0.3, 0.5, 0.2, 0.4)


EVERY_STEP = periodic(every=1)


BORN = [0, 1, *[NONE] * 9]
"""Owners once seeds 0 and 1 have adapters."""
