"""`using` around compiled and transformed calls: always the seeds of this very block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn import runtime
from esper_fn.errors import LayoutError
from esper_fn.types import Seeds

X = jax.random.normal(jax.random.key(0), (8, 6))
GROWTH = ef.Growth(
    sites=[ef.site("hidden", features=6, chunks=2)],
    blueprints={"scale": ef.blueprints.scale_shift()},
    capacity=2,
    policy=ef.policies.never(),
    adapters_at_once=None,
)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ef.flax.linen.Grow("hidden")(jnp.tanh(x))


class Nnx(nnx.Module):
    def __init__(self) -> None:
        self.hidden = ef.flax.nnx.Grow("hidden")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.hidden(jnp.tanh(x))


def linen_apply(x: jax.Array) -> jax.Array:
    y: jax.Array = Linen().apply({}, x)
    return y


def filter_jit(run: Callable[..., Any]) -> Callable[..., Any]:
    """As Equinox does it: the arrays are arguments, all else is a static one."""

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(static: Callable[..., Any], x: jax.Array) -> Any:
        return static(x)

    return functools.wraps(run)(lambda x: compiled(run, x))


def scanned(x: jax.Array) -> jax.Array:
    y: jax.Array = jax.lax.scan(_carried, x, None, length=1)[0]
    return y


def _carried(x: jax.Array, _: None) -> tuple[jax.Array, None]:
    return linen_apply(x), None


def chosen(x: jax.Array) -> jax.Array:
    y: jax.Array = jax.lax.cond(x.sum() < 1e9, linen_apply, jnp.tanh, x)
    return y


MODEL = Nnx()
_nnx_jit = nnx.jit(lambda model, x: model(x))
BLOCKS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "jit": jax.jit(linen_apply),
    "nnx.jit": lambda x: _nnx_jit(MODEL, x),
    "filter_jit": filter_jit(linen_apply),
    "remat": jax.checkpoint(linen_apply),
    "scan": scanned,
    "cond": chosen,
    "jit of vmap": jax.jit(jax.vmap(linen_apply)),
}


@functools.cache
def seeds(scale: float) -> Seeds:
    """Seed 0 acts: it adds `scale * x` to its chunk."""
    state = GROWTH.init(jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), state.adapters)
    rows = state.seeds
    rows = rows._replace(
        stage=rows.stage.at[0].set(int(ef.Stage.FOSSILIZED)),
        alpha=rows.alpha.at[0].set(1.0),
        slot=rows.slot.at[0].set(0),
        blueprint=rows.blueprint.at[0].set(0),
    )
    return GROWTH.seeds(
        state._replace(seeds=rows, adapters=adapters, owner=state.owner.at[0].set(0))
    )


def right(scale: float) -> np.ndarray:
    y = np.tanh(np.asarray(X))
    y[:, :3] += scale * y[:, :3] + scale
    return y


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_compiled_block_uses_the_seeds_of_the_block_it_runs_in(kind: str) -> None:
    run = BLOCKS[kind]
    for scale in (0.5, 2.0):
        with ef.use_seeds(seeds(scale)):
            np.testing.assert_allclose(run(X), right(scale), rtol=1e-6)
    with ef.use_seeds(seeds(0.5)), ef.use_seeds(ef.NoSeeds()):
        np.testing.assert_allclose(run(X), np.tanh(X), rtol=1e-6)
    with pytest.raises(LayoutError, match="no seeds in scope"):
        run(X)
    # Nor is a failed trace taken up by another block.
    with ef.use_seeds(seeds(0.5)), pytest.raises(LayoutError, match="features"):
        run(X[:, :4])
    with pytest.raises(LayoutError, match="no seeds in scope"):
        run(X)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_compiled_block_inside_a_loss_is_traced_for_each_outer_trace(kind: str) -> None:
    run = BLOCKS[kind]

    def loss(params: jax.Array, own: Seeds) -> jax.Array:
        with ef.use_seeds(own):
            return jnp.sum(run(X * params))

    once = jnp.float32(1.0)
    expected = jnp.sum(jax.grad(lambda x: right_sum(x, 2.0))(X) * X)
    for _ in range(2):
        slopes = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
        np.testing.assert_allclose(slopes(once, seeds(2.0))[0], expected, rtol=1e-5)


def right_sum(x: jax.Array, scale: float) -> jax.Array:
    y = jnp.tanh(x)
    return jnp.sum(y.at[:, :3].add(scale * y[:, :3] + scale))


def test_shapes_are_evaluated_with_the_seeds_of_the_block() -> None:
    run = jax.jit(linen_apply)
    sites = [ef.discover_sites(run, X) for _ in range(2)]
    assert sites[0] == sites[1]
    with ef.use_seeds(seeds(0.5)):
        assert jax.eval_shape(run, X).shape == X.shape
        np.testing.assert_allclose(run(X), right(0.5), rtol=1e-6)
    with ef.use_seeds(seeds(2.0)):
        jax.eval_shape(run, X)
        np.testing.assert_allclose(run(X), right(2.0), rtol=1e-6)
    assert ef.discover_sites(run, X) == sites[0]


def test_a_run_with_a_compiled_model_grows_and_compiles_once() -> None:
    run = jax.jit(linen_apply)

    def loss_fn(params: jax.Array, own: Seeds, batch: jax.Array) -> jax.Array:
        with ef.use_seeds(own):
            return jnp.mean(jnp.square(run(batch * params) - 1.0))

    result = runtime.fit(
        GROWTH,
        loss_fn,
        ef.optim.per_adapter(optax.sgd(0.1)),
        jnp.ones((6,)),
        lambda first, count: jnp.broadcast_to(X, (count, *X.shape)),
        num_steps=12,
        key=jax.random.key(2),
        survey_batch=X,
        options=runtime.FitOptions(survey_every=2, segment_steps=3),
        commands=lambda step: [cmd.germinate(0, "scale")] if step == 0 else [],
    )
    assert result.events[0]["to"] == "GERMINATED"
    assert result.num_compiled == 0
    assert np.isfinite(result.losses).all()


def test_a_function_that_takes_the_seeds_is_compiled_once() -> None:
    @jax.jit
    def evaluate(own: Seeds, x: jax.Array) -> jax.Array:
        with ef.use_seeds(own):
            return BLOCKS["jit"](x)

    states = [seeds(scale) for scale in (0.5, 2.0)]
    evaluate(states[0], X)
    with runtime.count_compilations() as count:
        np.testing.assert_allclose(evaluate(states[1], X), right(2.0), rtol=1e-6)
    assert count.num_compiled == 0


def test_a_compiled_block_shares_its_program_over_all_blocks_of_the_same_seeds() -> None:
    own = seeds(0.5)
    for _ in range(2):
        with runtime.count_compilations() as count, ef.use_seeds(own):
            BLOCKS["jit"](X)
    assert count.num_compiled == 0


def test_seeds_that_are_none_are_refused_at_once() -> None:
    state: Any = GROWTH.init(jax.random.key(1))
    expected = r"got a GrowthState; take .* `growth\.seeds\(state\)`"
    with pytest.raises(LayoutError, match=expected), ef.use_seeds(state):
        pass
