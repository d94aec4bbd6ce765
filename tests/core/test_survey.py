"""Growth potential and contribution, against NumPy and by hand."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import QUICK, blank, place, same_bits, standard

import esper_fn as ef
from esper_fn._layout import make_layout
from esper_fn._sites import Moments
from esper_fn._survey import directions, potentials
from esper_fn.lifecycle import Stage

RIDGE, DIRECTIONS = 1e-3, 4


def _inverse_root(covariance: np.ndarray) -> np.ndarray:
    width = len(covariance)
    values, vectors = np.linalg.eigh(
        covariance + RIDGE * np.trace(covariance) / width * np.eye(width)
    )
    return vectors @ np.diag(values**-0.5) @ vectors.T


def _by_hand(x: np.ndarray, dy: np.ndarray) -> tuple[float, float]:
    """Raw and whitened score from rows of input and gradient."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    rows = len(x)
    crossed = x.T @ dy / rows
    white = _inverse_root(x.T @ x / rows) @ crossed @ _inverse_root(dy.T @ dy / rows)
    raw, whitened = (
        float(np.sum(np.linalg.svd(matrix, compute_uv=False)[:DIRECTIONS] ** 2))
        for matrix in (crossed, white)
    )
    return raw, whitened


def _moments(x: np.ndarray, dy: np.ndarray) -> Moments:
    return Moments(
        num_rows=jnp.asarray([len(x)], jnp.float32),
        x_dy=jnp.asarray(x.T @ dy, jnp.float32)[None],
        x_x=jnp.asarray(x.T @ x, jnp.float32)[None],
        dy_dy=jnp.asarray(dy.T @ dy, jnp.float32)[None],
    )


@pytest.mark.parametrize("widths", [(2, 2), (3, 9), (7, 6), (6, 12)])
def test_scores_are_singular_values(widths: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(widths))
    inputs, outputs = widths
    x = rng.standard_normal((200, inputs)) @ rng.standard_normal((inputs, inputs))
    dy = 0.3 * x @ rng.standard_normal((inputs, outputs)) + rng.standard_normal((200, outputs))
    raw, whitened = _by_hand(x, dy)
    scores = potentials(_moments(x, dy))
    np.testing.assert_allclose(scores.raw, [raw], rtol=1e-4)
    np.testing.assert_allclose(scores.whitened, [whitened], rtol=1e-3)
    assert 0 < float(scores.whitened[0]) <= DIRECTIONS
    # Whitened scores do not depend on units, nor on the scale of the loss.
    scaled = potentials(_moments(100 * x, 1e-4 * dy))
    np.testing.assert_allclose(scaled.whitened, scores.whitened, rtol=1e-4)
    np.testing.assert_allclose(scaled.raw, 1e-4 * scores.raw, rtol=1e-4)


def test_a_cpu_computes_no_batch_of_factorisations_at_once() -> None:
    """As many batches as there are threads wait for ever in JAX 0.10."""

    def both(moments: Moments) -> Any:
        return potentials(moments), directions(moments)

    moments = _moments(np.ones((4, 6)), np.ones((4, 6)))
    many = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 3), moments)
    runs = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), many)
    program = jax.jit(jax.vmap(both)).lower(runs).as_text()
    calls = [line for line in program.splitlines() if "custom_call @lapack" in line]
    assert len(calls) >= 5
    for call in calls:
        assert re.findall(r"tensor<([\dx]+)xf32>", call.rpartition(" : ")[2])[0] == "6x6"


def test_nothing_to_gain_scores_zero() -> None:
    x = np.random.default_rng(0).standard_normal((50, 5))
    for inputs, slopes in ((0 * x, x), (x, 0 * x), (0 * x, 0 * x)):
        scores = potentials(_moments(inputs, slopes))
        assert scores.raw.tolist() == [0.0]
        assert scores.whitened.tolist() == [0.0]
    # What the gradient does along a direction that the input never takes is no gain either.
    _, whitened = _by_hand(x, np.random.default_rng(1).standard_normal((50, 5)))
    assert whitened < 1


# --- through a loss function -----------------------------------------------------------------

LAYOUT = make_layout(
    sites=[
        ef.site("hidden", features=11, chunks=2),
        ef.site("over", source_features=11, features=6),
        ef.site("deep", features=6, chunks=2, layers=2),
    ],
    blueprints={"gelu": ef.blueprints.bottleneck(3, activation="gelu")},
    capacity=2,
)
ROWS = {
    0: ("gelu", Stage.FINE_TUNING, 0.5),
    1: ("gelu", Stage.EVALUATING, 1.0),
    2: ("gelu", Stage.FOSSILIZED, 1.0),
    3: ("gelu", Stage.GRAFTING, 0.3),
    5: ("gelu", Stage.EVALUATING, 0.8),
}


def loss_fn(params: Any, seeds: Any, x: jax.Array) -> Any:
    h = seeds.grow("hidden", jnp.tanh(x @ params["in"]))
    out = seeds.grow("over", h @ params["out"], source=h)

    def step(out: jax.Array, own: Any) -> Any:
        return own.grow("deep", jnp.tanh(out)), None

    out, _ = jax.lax.scan(step, out, seeds.layers("deep"))
    return jnp.mean(jnp.square(out - 0.4)), out


@cache
def setting(max_ablations: int = 8) -> Any:
    growth = ef.Growth(**LAYOUT.arguments, max_ablations=max_ablations)
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.standard_normal((5, 11)) * 0.5, jnp.float32),
        "out": jnp.asarray(rng.standard_normal((11, 6)) * 0.4, jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((40, 5)), jnp.float32)
    survey = jax.jit(growth.survey(loss_fn, has_aux=True), compiler_options=QUICK)
    return growth, params, place(growth, blank(growth), ROWS), x, survey


@cache
def loss_of() -> Any:
    growth, params, _, x, _ = setting()
    return jax.jit(lambda state: loss_fn(params, growth.seeds(state), x)[0], compiler_options=QUICK)


def test_potential_is_that_of_each_chunks_input_and_gradient() -> None:
    growth, params, state, x, survey = setting()
    dormant = place(growth, state._replace(owner=jnp.full_like(state.owner, -1)), {})
    dormant = dormant._replace(
        seeds=dormant.seeds._replace(stage=jnp.zeros_like(dormant.seeds.stage))
    )
    after, info = survey(params, dormant, x)
    bare = ef.NoSeeds()

    def shifted(shifts: Any) -> jax.Array:
        """The loss with the activations of the first two sites moved by hand."""
        h = jnp.tanh(x @ params["in"]) + shifts[0]
        out = h @ params["out"] + shifts[1]
        for _ in range(2):
            out = bare.grow("deep", jnp.tanh(out))
        return jnp.mean(jnp.square(out - 0.4))

    h = np.asarray(jnp.tanh(x @ params["in"]))
    slopes = jax.grad(shifted)((jnp.zeros((40, 11)), jnp.zeros((40, 6))))
    d_h, d_out = (np.asarray(slope) for slope in slopes)
    padded = [np.pad(part, ((0, 0), (0, 1))) for part in (h[:, 6:], d_h[:, 6:])]
    want = [_by_hand(h[:, :6], d_h[:, :6]), _by_hand(*padded), _by_hand(h, d_out)]
    np.testing.assert_allclose(info.raw_potential[:3], [raw for raw, _ in want], rtol=1e-3)
    np.testing.assert_allclose(info.potential[:3], [white for _, white in want], rtol=1e-2)
    assert after.seeds.num_potentials.tolist() == [1] * LAYOUT.num_seeds
    np.testing.assert_array_equal(after.seeds.potential, info.potential)
    # No seed is on trial: nothing was ablated, and nothing pretends to have been measured.
    assert info.ablated.tolist() == [-1] * LAYOUT.num_seeds
    assert not np.any(info.contribution)
    assert after.seeds.num_contributions.tolist() == [0] * LAYOUT.num_seeds
    np.testing.assert_allclose(info.loss, loss_of()(dormant), rtol=1e-5)


def test_contribution_is_the_loss_without_minus_the_loss_with() -> None:
    _, params, state, x, survey = setting()
    after, info = survey(params, state, x)
    on_trial = [0, 1, 5]
    assert sorted(int(seed) for seed in info.ablated if seed >= 0) == on_trial
    with_all = loss_of()(state)
    np.testing.assert_allclose(info.loss, with_all, rtol=1e-5)
    for seed in range(LAYOUT.num_seeds):
        if seed not in on_trial:
            assert after.seeds.num_contributions[seed] == 0
            assert after.seeds.contribution[seed] == 0
            continue
        without = state._replace(
            seeds=state.seeds._replace(stage=state.seeds.stage.at[seed].set(Stage.DORMANT))
        )
        worth = float(loss_of()(without) - with_all)
        np.testing.assert_allclose(after.seeds.contribution[seed], worth, rtol=1e-3, atol=1e-7)
        assert after.seeds.num_contributions[seed] == 1
    assert float(jnp.max(jnp.abs(after.seeds.contribution))) > 1e-5


def test_further_surveys_are_averaged() -> None:
    _, params, state, x, survey = setting()
    once, first = survey(params, state, x)
    twice, second = survey(params, once, x + 0.5)
    assert twice.seeds.num_contributions[jnp.asarray([0, 1, 5])].tolist() == [2, 2, 2]
    for column in np.flatnonzero(np.asarray(second.ablated) >= 0):
        seed = int(second.ablated[column])
        before = float(first.contribution[np.asarray(first.ablated).tolist().index(seed)])
        want = (before + float(second.contribution[column])) / 2
        np.testing.assert_allclose(twice.seeds.contribution[seed], want, rtol=1e-4, atol=1e-8)


def test_a_survey_changes_nothing_but_what_it_measured() -> None:
    _, params, state, x, survey = setting()
    after, _ = survey(params, state, x)
    measured = ("potential", "num_potentials", "contribution", "num_contributions")
    kept = {name: getattr(state.seeds, name) for name in measured}
    assert same_bits(after._replace(seeds=after.seeds._replace(**kept)), state)
    assert not same_bits(after.seeds, state.seeds)
    assert same_bits(survey(params, state, x), survey(params, state, x))


def test_ablations_are_limited_and_go_to_the_least_measured() -> None:
    _, params, state, x, survey = setting(2)
    assert survey(params, state, x)[1].ablated.shape == (2,)
    seen = []
    for _ in range(3):
        state, info = survey(params, state, x)
        seen.append(sorted(info.ablated.tolist()))
    assert seen[0] != seen[1]
    assert state.seeds.num_contributions.tolist() == [2, 2, 0, 0, 0, 2, 0]


def test_what_is_not_finite_is_not_measured() -> None:
    _, params, state, x, survey = setting()
    after, info = survey(params, state, x.at[0, 0].set(jnp.nan))
    assert np.isnan(info.loss)
    assert after.seeds.num_potentials.tolist() == [0] * LAYOUT.num_seeds
    assert after.seeds.num_contributions.tolist() == [0] * LAYOUT.num_seeds
    assert same_bits(after.seeds.contribution, state.seeds.contribution)
    assert same_bits(after.seeds.potential, state.seeds.potential)


# --- the planted bottleneck ------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_the_whitened_score_names_the_damaged_layer(damaged: int) -> None:
    """An MLP on scikit-learn's digits with one hidden layer cut from 32 units to 3."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = jnp.asarray(digits.data[:600] / 16 - 0.3, jnp.float32)
    batch = (images, jnp.asarray(digits.target[:600]))
    widths = [64, 32, 32, 32, 10]
    widths[damaged] = 3
    spans = [
        ef.site(f"layer {i}", source_features=widths[i - 1], features=widths[i + 1])
        for i in (1, 2, 3)
    ]

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        below, h = batch[0], jax.nn.relu(batch[0] @ params[0])
        for index, weights in enumerate(params[1:], start=1):
            out = seeds.grow(f"layer {index}", h @ weights, source=below)
            below, h = h, jax.nn.relu(out)
        chosen = jax.nn.one_hot(batch[1], 10)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(out) * chosen, axis=-1))

    optimizer = standard(optax.adam(3e-3))
    rng = np.random.default_rng(1)
    params = [
        jnp.asarray(rng.standard_normal((a, b)) * (2 / a) ** 0.5, jnp.float32)
        for a, b in itertools.pairwise(widths)
    ]

    def train(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, opt_state = carry
            grads = jax.grad(loss_fn)(params, ef.NoSeeds(), batch)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=200)
        return params

    params = jax.jit(train, compiler_options=QUICK)(params)
    growth = ef.Growth(
        sites=spans,
        blueprints={"more": ef.blueprints.bottleneck(8)},
        capacity=1,
        adapters_at_once=None,
    )
    survey = jax.jit(growth.survey(loss_fn), compiler_options=QUICK)
    _, info = survey(params, blank(growth), batch)
    assert float(info.loss) < 1.6  # it did learn something
    scores = [float(score) for score in info.potential]
    others = [score for index, score in enumerate(scores, start=1) if index != damaged]
    assert scores[damaged - 1] > 2 * max(others), scores
