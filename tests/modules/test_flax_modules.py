"""Sites placed in Flax models with one line."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import esper_fn as ef
from esper_fn.errors import LayoutError

X = jax.random.normal(jax.random.key(0), (8, 16))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        read = x
        x = ef.flax.linen.Grow("hidden", chunks=4)(nn.relu(nn.Dense(32)(x)))
        return ef.flax.linen.Grow("wide")(nn.Dense(10)(x), source=read)


def linen_model() -> tuple[Any, Any]:
    model = LinenModel()
    with ef.use_seeds(ef.NoSeeds()):
        variables = model.init(jax.random.key(1), X)
    return variables, model.apply


def nnx_model() -> tuple[Any, Any]:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(16, 32, rngs=rngs)
            self.hidden = ef.flax.nnx.Grow("hidden", chunks=4)
            self.last = nnx.Linear(32, 10, rngs=rngs)
            self.wide = ef.flax.nnx.Grow("wide")

        def __call__(self, x: jax.Array) -> jax.Array:
            y = self.last(self.hidden(nnx.relu(self.first(x))))
            return self.wide(y, source=x)

    structure, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(structure, params)(x)


@pytest.fixture(params=[linen_model, nnx_model], ids=["linen", "nnx"])
def model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.param()


def test_discover_finds_the_sites_in_order(model: tuple[Any, Any]) -> None:
    params, apply = model
    sites = ef.discover_sites(apply, params, X)
    assert [(s.name, s.features, s.chunks, s.is_span) for s in sites] == [
        ("hidden", 32, 4, False),
        ("wide", 10, 1, True),
    ]


def test_a_model_grows(model: tuple[Any, Any]) -> None:
    params, apply = model
    growth = ef.Growth(
        sites=ef.discover_sites(apply, params, X),
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=2,
        adapters_at_once=None,
    )

    def loss_fn(params: Any, seeds: Any, batch: jax.Array) -> jax.Array:
        with ef.use_seeds(seeds):
            return jnp.mean(jnp.square(apply(params, batch)))

    state = growth.init(jax.random.key(2))
    loss, _, statistics = jax.jit(growth.value_and_grad(loss_fn))(params, state, X)
    np.testing.assert_array_equal(statistics.num_values, [64, 64, 64, 64, 80])
    np.testing.assert_allclose(loss, loss_fn(params, ef.NoSeeds(), X), rtol=1e-6)


def test_without_seeds_in_scope_the_message_says_how(model: tuple[Any, Any]) -> None:
    params, apply = model
    with pytest.raises(LayoutError, match=r"'hidden': no seeds in scope; put `with ef\.use_seeds"):
        apply(params, X)


def test_the_scope_ends_with_its_block(model: tuple[Any, Any]) -> None:
    params, apply = model
    with pytest.raises(ZeroDivisionError), ef.use_seeds(ef.NoSeeds()):
        raise ZeroDivisionError
    with pytest.raises(LayoutError, match="no seeds in scope"):
        apply(params, X)


def test_seeds_may_be_passed_explicitly() -> None:
    module = ef.flax.nnx.Grow("hidden")
    np.testing.assert_array_equal(module(X, seeds=ef.NoSeeds()), X)


def test_discovering_nothing_or_two_of_a_name_is_an_error() -> None:
    with pytest.raises(LayoutError, match="the model has no site"):
        ef.discover_sites(lambda x: x, X)

    def doubled(x: jax.Array) -> jax.Array:
        return ef.flax.nnx.Grow("a", chunks=2)(ef.flax.nnx.Grow("a", chunks=4)(x))

    with pytest.raises(LayoutError, match="'a' is declared twice"):
        ef.discover_sites(doubled, X)


def test_positions_are_read_off_the_activation() -> None:
    image = jnp.zeros((2, 5, 7, 8))
    (site,) = ef.discover_sites(ef.flax.nnx.Grow("a", topology="image"), image)
    assert (site.positions, site.features) == (35, 8)
