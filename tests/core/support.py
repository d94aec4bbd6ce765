"""What several tests of the core share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import esper_fn as ef


def standard(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """An Optax transformation run under NumPy's usual promotion, which Optax relies on."""

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def make_step(growth: ef.Growth, loss_fn: Any, optimizer: Any) -> Any:
    """The README's training step: `(params, state, opt_state, batch, commands) -> ..., info`."""

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, batch: Any, commands: Any) -> Any:
        loss, grads, readings = growth.value_and_grad(loss_fn)(params, state, batch)
        updates, opt_state = optimizer.update(
            grads, opt_state, (params, state.bodies), slots=growth.slots(state)
        )
        params, bodies = optax.apply_updates((params, state.bodies), updates)
        state, info = growth.update(state, bodies, readings, loss, commands)
        return params, state, opt_state, info

    return step


def mlp_params(key: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    """Weights of a bias-free MLP."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        jax.random.normal(k, (a, b)) * a**-0.5
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def mean_square(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean(jnp.square(prediction - target))
