"""The example hosts: what they compute, where their sites are, what they state of themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_fn as ef
from esper_fn.demo import hosts

HOSTS = {
    "mlp": (hosts.mlp((6, 8, 3, 5), spans=2, chunks=4), jnp.ones((4, 6)), (4, 5)),
    "conv": (
        hosts.conv((8, 8, 1), (4, 6), hidden=7, classes=3),
        jnp.ones((2, 8, 8, 1)),
        (2, 3),
    ),
    "transformer": (
        hosts.transformer(vocabulary=11, length=9, width=8, blocks=2, heads=2, hidden=6),
        jnp.zeros((3, 9), jnp.int32),
        (3, 9, 11),
    ),
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_reaches_all_its_sites_and_is_itself_while_they_sleep(name: str) -> None:
    host, inputs, shape = HOSTS[name]
    growth = ef.Growth(
        sites=host.sites,
        blueprints={"bottleneck": ef.blueprints.bottleneck(2)},
        capacity=1,
        adapters_at_once=None,
    )
    params = host.init(jax.random.key(0))
    state = growth.init(jax.random.key(1))

    def loss_fn(params: object, seeds: object, inputs: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(host.apply(params, seeds, inputs)))  # type: ignore[arg-type]

    _, _, statistics = jax.jit(growth.value_and_grad(loss_fn))(params, state, inputs)
    assert (np.asarray(statistics.num_values) > 0).all()
    bare = host.apply(params, ef.NoSeeds(), inputs)
    assert bare.shape == shape
    np.testing.assert_allclose(
        host.apply(params, growth.seeds(state), inputs), bare, rtol=1e-5, atol=1e-6
    )


def test_flops_are_counted_by_hand() -> None:
    assert HOSTS["mlp"][0].flops == 2 * (6 * 8 + 8 * 3 + 3 * 5)
    flat = 2 * 2 * 6
    assert HOSTS["conv"][0].flops == 2 * (9 * 1 * 4 * 64 + 9 * 4 * 6 * 16 + flat * 7 + 7 * 3)


def test_parameters_are_counted() -> None:
    assert hosts.count_parameters(HOSTS["mlp"][0]) == 6 * 8 + 8 + 8 * 3 + 3 + 3 * 5 + 5


def test_the_transformer_does_not_see_the_future() -> None:
    host, inputs, _ = HOSTS["transformer"]
    params = host.init(jax.random.key(0))
    changed = inputs.at[:, 5].set(3)
    before, two = (host.apply(params, ef.NoSeeds(), x) for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :5], two[:, :5])
    assert (np.asarray(before[:, 5:]) != np.asarray(two[:, 5:])).any()


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least three positive sizes"):
        hosts.mlp((3, 2))
    with pytest.raises(ValueError, match="width 6 must be divisible by heads 4"):
        hosts.transformer(vocabulary=3, length=4, width=6, heads=4)
