"""Whether a governor keeps the contract."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_kind, describe
from esper_fn._contract import Contract
from esper_fn.governors._base import Alarm, Governor, Observation, Verdict
from esper_fn.lifecycle import Stage
from esper_fn.lifecycle._loss import loss_track, track_loss
from esper_fn.lifecycle._state import seed_state

_NUM_SEEDS = 5
_LOSSES = (1.0, 0.9, 1.1, 1.0, 50.0, 80.0, float("nan"), float("inf"), 1.0, 0.0, -3.0, 1e30)


def check(governor: Governor) -> None:
    """Runs a governor and raises where it breaks its contract.

    The state must be arrays, and an update must keep their shapes and dtypes. The verdict must have
    the shapes and dtypes of `Verdict` whatever the loss is, and the same state and observation must
    have the same verdict.

    Args:
      governor: any one.

    Raises:
      TypeError: it is no `Governor`.
      ValueError: it breaks the contract; the message says how.

    >>> from esper_fn import governors
    >>> check(governors.standard())
    """
    check_kind("governor", governor, Governor, "call its factory: `standard()`")
    contract = Contract("governor")
    state = governor.init(_NUM_SEEDS)
    contract.check_state(state)
    # Compiled once: what depends on a value must be array code.
    update = jax.jit(governor.update)
    track = loss_track()
    for step, loss in enumerate(_LOSSES * 3):
        track, _ = track_loss(track, jnp.float32(loss))
        observation = _observe(step, loss, track)
        result = update(state, observation)
        contract.check_pair("update", result, "Verdict")
        contract.check_same_form("update", state, result[0])
        _check_verdict(contract, result[1])
        again = update(state, observation)
        if not jax.tree.all(jax.tree.map(_is_same, again, result)):
            contract.fail("the same state and observation give different results")
        state = result[0]


def _is_same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b, equal_nan=True)


def _observe(step: int, loss: float, track: Any) -> Observation:
    seeds = seed_state(_NUM_SEEDS)
    stages = [Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING, Stage.FOSSILIZED]
    seeds = seeds._replace(
        stage=jnp.asarray(stages, jnp.int8),
        alpha=jnp.asarray([0.0, 0.0, 0.5, 1.0, 1.0], jnp.float32),
        telemetry=seeds.telemetry._replace(num_live_steps=jnp.full((_NUM_SEEDS,), 100 + step)),
    )
    drift = jnp.asarray([0.0, 0.1, 1e-4, 1e6 if step % 5 == 4 else 0.01, 0.0], jnp.float32)
    return Observation(seeds=seeds, loss=jnp.float32(loss), track=track, drift=drift)


_FORMS = {
    "alarm": ((), "int8"),
    "forbids_germination": ((), "bool"),
    "should_roll_back": ((), "bool"),
    "is_quarantined": ((_NUM_SEEDS,), "bool"),
    "is_elevated": ((), "bool"),
}


def _check_verdict(contract: Contract, verdict: Any) -> None:
    if not isinstance(verdict, Verdict):
        contract.fail(f"update must return (state, Verdict), got {describe(verdict)} second")
    for name, (shape, dtype) in _FORMS.items():
        value = getattr(verdict, name)
        if (value.shape, value.dtype.name) != (shape, dtype):
            form = f"{value.dtype.name}{list(value.shape)}"
            contract.fail(f"verdict.{name} must be {dtype}{list(shape)}, got {form}")
    if int(verdict.alarm) not in set(Alarm):
        contract.fail(f"verdict.alarm must be an Alarm, got {verdict.alarm}")
