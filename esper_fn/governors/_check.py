"""Whether a governor keeps the contract."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_fn._arguments import check_kind
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
    state = governor.init(_NUM_SEEDS)
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            name = jax.tree_util.keystr(path) or "(root)"
            raise ValueError(
                f"governor: the state's leaf {name} must be a JAX array, got {type(leaf).__name__}"
            )
    # Compiled once: what depends on a value must be array code.
    update = jax.jit(governor.update)
    track = loss_track()
    for step, loss in enumerate(_LOSSES * 3):
        track, _ = track_loss(track, jnp.float32(loss))
        observation = _observe(step, loss, track)
        after, verdict = update(state, observation)
        if _forms(after) != _forms(state):
            raise ValueError(f"governor: update turns a state {_forms(state)} into {_forms(after)}")
        _check_verdict(verdict)
        again = update(state, observation)
        if not jax.tree.all(jax.tree.map(_is_same, again, (after, verdict))):
            raise ValueError("governor: the same state and observation give different results")
        state = after


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


def _check_verdict(verdict: Verdict) -> None:
    if not isinstance(verdict, Verdict):
        raise ValueError(
            f"governor: update must return (state, Verdict), got {type(verdict).__name__} second"
        )
    for name, form in _FORMS.items():
        value = getattr(verdict, name)
        if (value.shape, value.dtype.name) != form:
            raise ValueError(
                f"governor: verdict.{name} must be {form[1]}{list(form[0])}, got "
                f"{value.dtype.name}{list(value.shape)}"
            )
    if int(verdict.alarm) not in set(Alarm):
        raise ValueError(f"governor: verdict.alarm must be an Alarm, got {verdict.alarm}")


def _forms(state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype.name) for leaf in leaves]
