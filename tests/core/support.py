"""What several tests of the core share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_fn as ef
from esper_fn.lifecycle import OWNS_ADAPTER


def standard(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation run under NumPy's usual promotion, which Optax relies on."""
    transformation = optax.with_extra_args_support(transformation)

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def make_step(growth: ef.Growth, loss_fn: Any, optimizer: Any) -> Any:
    """The README's training step: `(params, state, opt_state, batch, commands) -> ..., info`."""

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, batch: Any, commands: Any) -> Any:
        loss, grads, statistics = growth.value_and_grad(loss_fn)(params, state, batch)
        updates, opt_state = optimizer.update(
            grads, opt_state, (params, state.adapters), slots=growth.slots(state)
        )
        params, adapters = optax.apply_updates((params, state.adapters), updates)
        state, info = growth.update(state, adapters, statistics, loss, commands)
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


QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}
"""Options that make compiling a third quicker: for tests of numbers, not for tests of bits."""


def blank(growth: ef.Growth) -> ef.GrowthState:
    """`growth.init` without its random numbers, which take seconds to compile: adapters are 0."""
    key = jax.random.key(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(growth.init, key).adapters
    )
    rest: Any = jax.jit(lambda key: growth.init(key)._replace(adapters=None))(key)
    state: ef.GrowthState = rest._replace(adapters=adapters)
    return state


def place(
    growth: ef.Growth,
    state: ef.GrowthState,
    rows: Mapping[int, tuple[str, int, float]],
    noise: float = 0.3,
) -> ef.GrowthState:
    """`state` with seeds put where a test wants them: seed -> (blueprint, stage, alpha).

    Every adapter gets `noise` added, so that none is the identity any more.
    """
    layout, seeds = growth.layout, state.seeds
    tables, owner = layout.tables, np.array(state.owner)
    stage, alpha = np.array(seeds.stage), np.array(seeds.alpha)
    slot, blueprint = np.array(seeds.slot), np.array(seeds.blueprint)
    for seed, (name, to, at) in rows.items():
        stage[seed], alpha[seed] = to, at
        if OWNS_ADAPTER[to]:
            group = int(np.searchsorted(tables.group_start, seed, side="right")) - 1
            index = layout.blueprint_index(name)
            is_own = tables.slot_pool_start == tables.pool_start[group, index]
            slot[seed] = np.flatnonzero(is_own & (owner < 0))[0]
            owner[slot[seed]], blueprint[seed] = seed, index
    leaves, structure = jax.tree.flatten(state.adapters)
    rng = np.random.default_rng(7)
    noised = [
        leaf + jnp.asarray(noise * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves
    ]
    return state._replace(
        owner=jnp.asarray(owner),
        adapters=jax.tree.unflatten(structure, noised),
        seeds=seeds._replace(
            stage=jnp.asarray(stage),
            alpha=jnp.asarray(alpha),
            slot=jnp.asarray(slot),
            blueprint=jnp.asarray(blueprint),
        ),
    )


def adapter_of(growth: ef.Growth, state: ef.GrowthState, seed: int, adapters: Any = None) -> Any:
    """Parameters of a seed's adapter, as NumPy arrays (or its share of `adapters`, say of
    gradients)."""
    place_, _, _ = growth.layout.locate(seed)
    name = growth.layout.names[int(state.seeds.blueprint[seed])]
    slot = int(state.seeds.slot[seed])
    start = next(
        bank.start
        for bank in growth.layout.tables.banks
        if growth.layout.names[bank.blueprint] == name
        and growth.layout.sites[bank.site].name == place_.name
    )
    bank = (state.adapters if adapters is None else adapters)[place_.name][name]
    return jax.tree.map(lambda leaf: np.asarray(leaf[slot - start]), bank)


def same_bits(first: Any, second: Any) -> bool:
    """Whether two trees agree bit for bit, NaN, -0.0 and random keys included."""

    def raw(leaf: Any) -> bytes:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(raw(a) == raw(b) for a, b in pairs)
