"""Streams and rival methods of the scene "stay plastic", cell by cell."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _plastic_network as network
from benchmarks import _plastic_rivals as rivals
from benchmarks import _streams as streams

WIDTHS = (4, 3, 3, 1)
BATCH = (
    jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32),
    jnp.asarray(np.random.default_rng(1).normal(size=(8, 1)), jnp.float32),
)
STREAM = streams.regression(num_steps=10, task_steps=2, bin_steps=2)


def state_after(method: network.Method, hyper: network.Hyper, steps: int = 3) -> network.State:
    arm = network.make_arm("arm", STREAM, method, widths=WIDTHS)
    state = arm.init(jax.random.key(0), hyper)
    for _ in range(steps):
        state, _ = arm.step(state, BATCH, hyper)
    return state


def assert_equal(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


class TestStreams:
    def test_target_unit_fires_where_enough_inputs_agree(self) -> None:
        target = streams.make_target(jax.random.key(3))
        inputs = jax.random.bernoulli(jax.random.key(4), 0.5, (200, 20)).astype(jnp.float32)
        bits = np.concatenate([np.asarray(inputs), np.ones((200, 1))], axis=1)
        agree = (bits[:, None] == (np.asarray(target.weights) > 0)).mean(axis=2)
        expected = (agree > 0.7) @ np.asarray(target.out[:-1]) + float(target.out[-1])
        np.testing.assert_allclose(streams.target_value(target, inputs)[:, 0], expected)
        assert 0 < (agree > 0.7).mean() < 0.2
        assert set(np.unique(target.weights)) == set(np.unique(target.out)) == {-1.0, 1.0}

    def test_one_slow_bit_flips_in_each_task(self) -> None:
        world = STREAM.init(jax.random.key(0), None)
        inputs = np.stack([STREAM.batch(world, jnp.int32(i))[0][0] for i in range(10)])
        changed = (np.diff(inputs[:, :15], axis=0) != 0).sum(axis=1)
        assert changed.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
        assert (np.diff(inputs[:, 15:], axis=0) != 0).any()

    def test_labels_stay_within_a_task_and_change_with_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = np.arange(20, dtype=np.float32).reshape(20, 1, 1)
        plant(monkeypatch, images, np.zeros(20, np.int32))
        stream = streams.labels(num_tasks=2, num_images=20, task_steps=5)
        world = stream.init(jax.random.key(0), stream.data)
        tables = []
        for task in range(2):
            seen: dict[float, int] = {}
            for step in range(5):
                inputs, classes = stream.batch(world, jnp.int32(5 * task + step))
                assert len(np.unique(inputs)) == 20
                for image, label in zip(inputs[:, 0].tolist(), classes.tolist(), strict=True):
                    assert seen.setdefault(image, label) == label
            tables.append(seen)
        assert tables[0] != tables[1]

    def test_pixels_are_permuted_alike_within_a_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = np.tile(np.arange(6, dtype=np.float32).reshape(1, 2, 3), (30, 1, 1))
        plant(monkeypatch, images, np.arange(30, dtype=np.int32) % 10)
        stream = streams.pixels(num_tasks=2, task_images=32)
        world = stream.init(jax.random.key(0), stream.data)
        rows = [np.unique(stream.batch(world, jnp.int32(i))[0], axis=0) for i in range(4)]
        assert all(len(row) == 1 and sorted(row[0]) == list(range(6)) for row in rows)
        assert_equal(rows[0], rows[1])
        assert (rows[1] != rows[2]).any()


def plant(monkeypatch: pytest.MonkeyPatch, images: np.ndarray, classes: np.ndarray) -> None:
    class Planted:
        train_inputs, train_targets = images, classes

    monkeypatch.setattr(streams, "load_data", lambda name: Planted)


class TestNetwork:
    def test_plain_adam_is_optax_adam(self) -> None:
        state = state_after(rivals.plain(), network.Hyper(rate=1e-2))
        params = network.init_params(jax.random.fold_in(jax.random.key(0), 0), WIDTHS)
        optimizer = optax.adam(1e-2)
        opt_state = optimizer.init(params)

        def loss_fn(params: Any) -> jax.Array:
            return jnp.mean((network.forward(params, BATCH[0])[0] - BATCH[1]) ** 2)

        for _ in range(3):
            updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
            params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            state.params,
            params,
        )

    def test_l2_pulls_to_zero_through_the_gradient(self) -> None:
        arm = network.make_arm("l2", STREAM, rivals.plain(), optimizer="sgd", widths=WIDTHS)
        start = arm.init(jax.random.key(0), network.Hyper())
        bare, _ = arm.step(start, BATCH, network.Hyper(rate=0.1))
        pulled, _ = arm.step(start, BATCH, network.Hyper(rate=0.1, l2=0.5))
        expected = jax.tree.map(lambda b, s: b - 0.1 * 0.5 * s, bare.params, start.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pulled.params, expected
        )

    def test_metric_is_of_before_the_update(self) -> None:
        arm = network.make_arm("plain", STREAM, rivals.plain(), widths=WIDTHS)
        state = arm.init(jax.random.key(0), network.Hyper())
        expected = jnp.mean((network.forward(state.params, BATCH[0])[0] - BATCH[1]) ** 2)
        np.testing.assert_allclose(arm.step(state, BATCH, network.Hyper())[1], expected, rtol=1e-6)

    def test_reset_renews_one_unit_and_its_moments_only(self) -> None:
        state = state_after(rivals.plain(), network.Hyper())
        is_reset = [jnp.zeros(3, bool), jnp.asarray([False, True, False])]
        after = network.reset_units(state, is_reset)
        bias = state.params[1][1].at[1].set(0.0)
        out = state.params[2][0].at[1].set(0.0)
        assert_equal(after.params[0], state.params[0])
        assert_equal(after.params[1][1], bias)
        assert_equal(after.params[2][0], out)
        changed = np.asarray(after.params[1][0] != state.params[1][0])
        assert changed[:, 1].all()
        assert not changed[:, [0, 2]].any()
        assert state.moments is not None
        assert after.moments is not None
        for before, now in zip(state.moments, after.moments, strict=True):
            assert_equal(now[1], (before[1][0].at[:, 1].set(0.0), before[1][1].at[1].set(0.0)))
            assert_equal(now[2], (before[2][0].at[1].set(0.0), before[2][1]))
            assert_equal(now[0], before[0])
        assert float(after.moments.steps[0][0][0, 0]) == 3.0


class TestMethods:
    def test_continual_backprop_replaces_the_least_useful_mature_unit(self) -> None:
        method = rivals.continual_backprop()
        state = state_after(rivals.plain(), network.Hyper())
        state = state._replace(statistics=method.init(state.params))
        # Unit 0 of the first layer is the least active, but of 3 equal outgoing weights.
        params = list(state.params)
        params[1] = (jnp.ones((3, 3)), params[1][1])
        state = state._replace(params=params)
        hidden = [jnp.asarray([[0.1, 1.0, 2.0]]), jnp.asarray([[1.0, 1.0, 1.0]])]
        hyper = network.Hyper(replacement=0.2, maturity=2)
        ages = []
        for _ in range(4):
            state = method.update(state, hidden, hyper)._replace(step=state.step + 1)
            ages.append(state.statistics.age[0].tolist())
        # Three mature units at 0.2 make 0.6 in the third step and 1.2 in the fourth.
        assert ages == [[1, 1, 1], [2, 2, 2], [3, 3, 3], [0, 4, 4]]
        assert state.statistics.due[0] == pytest.approx(0.2)
        assert float(state.statistics.utility[0][0]) == 0.0
        # The second layer lost a unit too, which reads the new one through a fresh weight.
        gone = int(np.argmin(state.statistics.age[1]))
        assert_equal(np.delete(state.params[1][0][0], gone), np.zeros(2))
        assert_equal(state.moments.steps[0][0][:, 0], jnp.zeros(4))
        assert_equal(state.moments.steps[0][0][:, 1:], jnp.full((4, 2), 3.0))
        # What it added on average, 0.1 by each weight of 1, is in the biases now.
        moved = np.asarray(state.params[1][1] - params[1][1])
        np.testing.assert_allclose(np.delete(moved, gone), 0.1, rtol=1e-4)

    def test_continual_backprop_without_replacement_is_plain(self) -> None:
        ours = state_after(rivals.continual_backprop(), network.Hyper(maturity=0))
        theirs = state_after(rivals.plain(), network.Hyper())
        assert_equal(ours.params, theirs.params)

    def test_redo_resets_dormant_units_when_due(self) -> None:
        method = rivals.redo()
        state = state_after(rivals.plain(), network.Hyper())
        hidden = [jnp.asarray([[0.0, 1.0, 1.0]]), jnp.asarray([[1.0, 1.0, 1.0]])]
        state = state._replace(statistics=method.init(state.params), step=jnp.int32(4))
        waiting = method.update(state, hidden, network.Hyper(dormant=0.1, period=3))
        assert_equal(waiting.params, state.params)
        after = method.update(state, hidden, network.Hyper(dormant=0.1, period=2))
        assert_equal(after.params[1][0][0], jnp.zeros(3))
        assert_equal(after.params[1][0][1:], state.params[1][0][1:])

    def test_self_normalised_resets_know_a_unit_by_its_silences(self) -> None:
        method = rivals.self_normalised_resets()
        state = state_after(rivals.plain(), network.Hyper())
        hyper = network.Hyper(period=40, percentile=0.9)
        state = state._replace(statistics=method.init(state.params), step=jnp.int32(0))
        # Unit 0 fires in every step, unit 1 in every fourth; then both fall silent.
        resets = []
        for step in range(1, 61):
            unit = [step <= 40, step <= 40 and step % 4 == 0, True]
            hidden = [jnp.asarray([unit], jnp.float32), jnp.ones((1, 3))]
            state = method.update(state._replace(step=jnp.int32(step)), hidden, hyper)
            if step == 40:
                assert state.statistics.threshold[0].tolist() == [1.0, 4.0, 1.0]
            if step > 40:
                resets.append((np.asarray(state.statistics.silent[0]) == 0).tolist())
        assert next(step for step, row in enumerate(resets, 41) if row[0]) == 42
        assert next(step for step, row in enumerate(resets, 41) if row[1]) == 45
        assert_equal(state.params[1][0][2] != 0, jnp.ones(3, bool))

    def test_threshold_doubles_where_silences_reach_it(self) -> None:
        counts = jnp.zeros((2, 64)).at[0, 40].set(5.0)  # 2^10 steps, beyond the threshold
        moved = rivals._next_threshold(counts, jnp.asarray([64.0, 64.0]), jnp.float32(0.9))
        assert moved.tolist() == [128.0, 128.0]

    def test_shrink_and_perturb(self) -> None:
        hyper = network.Hyper(rate=0.0, shrink=0.5)
        start = state_after(rivals.plain(), hyper)
        after = state_after(rivals.shrink_and_perturb(), hyper, steps=1)
        assert_equal(after.params, jax.tree.map(lambda p: 0.5 * p, start.params))
        noisy = state_after(rivals.shrink_and_perturb(), hyper._replace(noise=0.1), steps=1)
        weights = np.asarray(noisy.params[0][0] - after.params[0][0])
        assert 0 < np.abs(weights).max() <= 0.1 * (6 / 4) ** 0.5

    def test_full_reset_starts_anew_at_the_end_of_a_task_only(self) -> None:
        hyper = network.Hyper(rate=0.0)
        start = state_after(rivals.plain(), hyper, steps=1)
        within = state_after(rivals.full_reset(2), hyper, steps=1)
        after = state_after(rivals.full_reset(2), hyper, steps=2)
        assert_equal(within.params, start.params)
        assert (after.params[0][0] != start.params[0][0]).all()
        assert_equal(after.moments.steps, jax.tree.map(jnp.zeros_like, after.params))
