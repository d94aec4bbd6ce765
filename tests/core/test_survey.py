"""Where growth would pay, and what living seeds are worth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import standard

import esper_fn as ef
from esper_fn import hosts
from esper_fn._lattice import Moments
from esper_fn.lifecycle import Stage
from esper_fn.telemetry import potentials

RIDGE, DIRECTIONS = 1e-3, 4


def numpy_scores(x: np.ndarray, dy: np.ndarray) -> tuple[float, float]:
    """The definition, in float64, by square roots of the covariances."""

    def root(covariance: np.ndarray) -> np.ndarray:
        width = len(covariance)
        ridge = RIDGE * np.trace(covariance) / width * np.eye(width)
        values, vectors = np.linalg.eigh(covariance + ridge)
        return vectors @ np.diag(values**-0.5) @ vectors.T

    rows = len(x)
    crossed = x.T @ dy / rows
    white = root(x.T @ x / rows) @ crossed @ root(dy.T @ dy / rows)
    raw, whitened = (
        float((np.linalg.svd(m, compute_uv=False)[:DIRECTIONS] ** 2).sum())
        for m in (crossed, white)
    )
    return raw, whitened


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 3), (8, 6), (5, 9), (1, 1)])
def test_scores_are_their_definition(inputs: int, outputs: int) -> None:
    source = np.random.default_rng(inputs)
    x, dy = source.normal(size=(200, inputs)), source.normal(size=(200, outputs))
    dy[:, 0] += 2 * x[:, 0]
    moments = Moments(
        num_rows=jnp.asarray([200.0]),
        x_dy=jnp.asarray(x.T @ dy, jnp.float32)[None],
        x_x=jnp.asarray(x.T @ x, jnp.float32)[None],
        dy_dy=jnp.asarray(dy.T @ dy, jnp.float32)[None],
    )
    found = potentials(moments)
    raw, whitened = numpy_scores(x, dy)
    np.testing.assert_allclose(found.raw[0], raw, rtol=1e-3)
    np.testing.assert_allclose(found.whitened[0], whitened, rtol=1e-3)


def test_a_dead_chunk_scores_zero_and_not_noise() -> None:
    zero = jnp.zeros((1, 3, 3))
    found = potentials(Moments(num_rows=jnp.asarray([9.0]), x_dy=zero, x_x=zero, dy_dy=zero))
    assert float(found.whitened[0]) == 0.0
    assert float(found.raw[0]) == 0.0


X = jax.random.normal(jax.random.key(0), (32, 7))
Y = jnp.stack([X[:, 0] * X[:, 1], X[:, 2], X[:, 3]], axis=1)
PARAMS = jax.random.normal(jax.random.key(1), (7, 3)) * 0.3
GROWTH = ef.growth(
    ef.lattice(
        sites=[ef.site("a", features=7, chunks=3), ef.span("b", source_features=7, features=3)],
        blueprints={"low_rank": ef.blueprints.low_rank(2)},
        capacity=2,
    ),
    policy=ef.policies.never(),
    max_ablations=2,
    levels=1,
)


def loss_fn(params: jax.Array, seeds: Any, batch: Any) -> jax.Array:
    x, y = batch
    out = seeds.grow("b", seeds.grow("a", x) @ params, source=x)
    return jnp.mean(jnp.square(out - y))


SURVEY = jax.jit(GROWTH.survey(loss_fn))


def with_bodies(stages: dict[int, Stage]) -> ef.GrowthState:
    """Seeds of site `a` in the given stages, with random bodies at full alpha."""
    state = GROWTH.init(jax.random.key(2))
    seeds, owner = state.seeds, state.owner
    for slot, (seed, stage) in enumerate(stages.items()):
        owner = owner.at[slot].set(seed)
        seeds = seeds._replace(
            stage=seeds.stage.at[seed].set(jnp.int8(stage)),
            slot=seeds.slot.at[seed].set(slot),
            blueprint=seeds.blueprint.at[seed].set(jnp.int8(0)),
            alpha=seeds.alpha.at[seed].set(1.0),
        )
    bodies = {site: dict(banks) for site, banks in state.bodies.items()}
    up = bodies["a"]["low_rank"]["up"]
    bodies["a"]["low_rank"] = {
        **bodies["a"]["low_rank"],
        "up": jax.random.normal(jax.random.key(3), up.shape) * 0.5,
    }
    return state._replace(seeds=seeds, owner=owner, bodies=bodies)


def test_potentials_of_chunks_and_spans_are_measured_where_the_loss_reaches_them() -> None:
    state, info = SURVEY(PARAMS, GROWTH.init(jax.random.key(2)), (X, Y))
    # Chunks of 7 features in 3: 3, 2 and 2 wide. dy at site a is d loss / d (x @ params) params^T.
    d_out = 2 * (np.asarray(X @ PARAMS) - np.asarray(Y)) / Y.size
    d_x = d_out @ np.asarray(PARAMS).T
    expected = [
        numpy_scores(np.asarray(X)[:, a:b].astype(float), d_x[:, a:b].astype(float))
        for a, b in ((0, 3), (3, 5), (5, 7))
    ] + [numpy_scores(np.asarray(X, float), d_out.astype(float))]
    raw, _ = zip(*expected, strict=True)
    np.testing.assert_allclose(info.raw_potential, raw, rtol=2e-3)
    # The narrow chunks are padded to 3 features: the ridge's mean diagonal is over 3, not 2.
    np.testing.assert_allclose(info.potential, [e[1] for e in expected], rtol=5e-3)
    np.testing.assert_array_equal(state.seeds.num_potentials, [1, 1, 1, 1])
    np.testing.assert_array_equal(state.seeds.potential, info.potential)


def test_contribution_is_the_loss_without_minus_the_loss_with() -> None:
    state = with_bodies({0: Stage.EVALUATING, 1: Stage.FINE_TUNING})
    after, info = SURVEY(PARAMS, state, (X, Y))
    with_all = loss_fn(PARAMS, GROWTH.seeds(state), (X, Y))
    np.testing.assert_allclose(info.loss, with_all, rtol=1e-6)
    for seed in (0, 1):
        alpha = state.seeds.alpha.at[seed].set(0.0)
        silent = state._replace(seeds=state.seeds._replace(alpha=alpha))
        without = loss_fn(PARAMS, GROWTH.seeds(silent), (X, Y))
        np.testing.assert_allclose(
            after.seeds.contribution[seed], without - with_all, rtol=1e-3, atol=1e-6
        )
    np.testing.assert_array_equal(after.seeds.num_contributions, [1, 1, 0, 0])


def test_only_seeds_on_trial_are_ablated_and_the_least_measured_come_first() -> None:
    _, info = SURVEY(PARAMS, with_bodies({0: Stage.FOSSILIZED, 2: Stage.EVALUATING}), (X, Y))
    assert sorted(np.asarray(info.ablated).tolist()) == [-1, 2]


def test_a_survey_changes_nothing_but_what_it_measures() -> None:
    state = with_bodies({0: Stage.EVALUATING})
    after, _ = SURVEY(PARAMS, state, (X, Y))
    measured = {"potential", "num_potentials", "contribution", "num_contributions"}
    for name in state.seeds._fields:
        same = jax.tree.map(
            lambda a, b: bool(jnp.array_equal(a, b)),
            getattr(state.seeds, name),
            getattr(after.seeds, name),
        )
        if name not in measured:
            assert all(jax.tree.leaves(same)), name
    # Steps count training steps, never evaluation calls.
    assert int(after.step) == int(state.step)
    for one, two in zip(
        jax.tree.leaves(after._replace(seeds=None, key=None)),
        jax.tree.leaves(state._replace(seeds=None, key=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_whitened_score_names_the_narrow_layer_of_a_trained_host(seed: int) -> None:
    data = ef.data.load("digits")
    host = hosts.mlp((64, 32, 3, 32, 10), spans=1)
    growth = ef.growth(
        ef.lattice(
            sites=host.sites,
            blueprints={"bottleneck": ef.blueprints.bottleneck(4)},
            capacity=1,
        ),
        levels=1,
    )
    x, y = jnp.asarray(data.train_inputs), jnp.asarray(data.train_targets)

    def cross_entropy(params: Any, seeds: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(
            host.apply(params, seeds, inputs), targets
        )
        return losses.mean()

    optimizer = standard(optax.adam(3e-3))
    params = host.init(jax.random.key(seed))

    @jax.jit
    def train(params: Any) -> Any:
        def one(carry: Any, _: None) -> Any:
            params, opt_state = carry
            with jax.numpy_dtype_promotion("standard"):
                slopes = jax.grad(cross_entropy)(params, ef.BareSeeds(), (x, y))
            updates, opt_state = optimizer.update(slopes, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(one, (params, optimizer.init(params)), None, length=200)[0][0]

    with jax.numpy_dtype_promotion("standard"):
        state = growth.init(jax.random.key(9))
        held_out = (jnp.asarray(data.validation_inputs), jnp.asarray(data.validation_targets))
        _, info = jax.jit(growth.survey(cross_entropy))(train(params), state, held_out)
    names = [site.name for site in host.sites]
    assert names[int(np.argmax(info.potential))] == "layer2.0"
