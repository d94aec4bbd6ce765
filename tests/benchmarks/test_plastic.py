"""The protocol of the scene "stay plastic", on tiny streams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _plastic as plastic
from benchmarks import _plastic_rivals as rivals
from benchmarks import _streams as streams
from benchmarks._plastic_grown import grown
from benchmarks._plastic_network import Arm, Hyper, count_parameters, make_arm, matched_widths

STREAM = streams.regression(num_steps=60, task_steps=20, bin_steps=5)


def test_a_sweep_is_the_same_as_its_runs_one_by_one() -> None:
    arm = make_arm("plain", STREAM, rivals.plain(), optimizer="sgd")
    hypers = plastic.grid(rate=(1e-3, 1e-2), l2=(0.0, 0.1))
    together = plastic.play(STREAM, arm, hypers, (0, 1, 2), lanes=5)
    assert together.shape == (4, 3, 12)
    alone = plastic.play(STREAM, arm, hypers[2:3], (1,))
    np.testing.assert_allclose(together[2, 1], alone[0, 0], rtol=1e-4)
    assert not np.allclose(together[2, 1], together[3, 1])


def test_every_arm_meets_the_same_stream() -> None:
    def step(state: jax.Array, batch: streams.Batch, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
        return state, batch[1].sum()

    silent = Arm("silent", lambda key, hyper: jnp.float32(0), step)
    noisy = Arm("noisy", lambda key, hyper: jax.random.normal(key), step)
    first = plastic.play(STREAM, silent, [Hyper()], (0, 1))
    np.testing.assert_array_equal(first, plastic.play(STREAM, noisy, [Hyper()], (0, 1)))
    assert (first[0, 0] != first[0, 1]).any()


def test_surveys_see_the_last_batches_only() -> None:
    def batch(world: jax.Array, step: jax.Array) -> streams.Batch:
        value = jnp.broadcast_to(step, (64,))
        return value[:, None], value

    stream = STREAM._replace(init=lambda key, data: key, batch=batch)
    arm = Arm(
        "watching",
        lambda key, hyper: jnp.int32(0),
        lambda state, batch, hyper: (state, state.astype(jnp.float32)),
        # Of the four steps before: the sum of their numbers.
        survey=lambda state, batch, hyper: batch[1][::64].sum(),
    )
    seen = plastic.play(stream, arm, [Hyper()], (0,))[0, 0]
    sums = [0, 11 + 12 + 13 + 14, 26 + 27 + 28 + 29, 41 + 42 + 43 + 44]
    assert seen.tolist() == np.repeat(sums, 3).tolist()


def test_a_survey_stays_conditional_when_runs_are_mapped() -> None:
    arm = Arm(
        "watching",
        lambda key, hyper: jax.random.normal(key),
        lambda state, batch, hyper: (state, state),
        survey=lambda state, batch, hyper: jnp.tanh(state),
    )
    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.vmap(plastic.make_run(STREAM, arm), in_axes=(0, None, None))
    program = str(jax.make_jaxpr(run)(keys, Hyper(), None))
    # A conditional that `vmap` has made a choice between both results is no `cond` any more.
    assert "cond[" in program
    assert "tanh" in program[program.index("cond[") :]


def test_choice_takes_the_best_last_tenth() -> None:
    metrics = np.zeros((3, 2, 20))
    metrics[0, :, :10] = 9
    metrics[1, :, -2:] = 2
    metrics[2, 0, -1] = np.nan
    assert plastic.best(STREAM, metrics) == 0
    assert plastic.best(STREAM._replace(unit="%"), metrics) == 1


def test_rivals_have_at_least_the_parameters_of_host_and_adapters() -> None:
    for entry in plastic.entries(STREAM):
        if not entry.arm.name.startswith("host"):
            assert entry.arm.num_parameters >= grown(STREAM).num_parameters
    widths = matched_widths((20, 5, 1), 160)
    assert count_parameters(widths) >= 160 > count_parameters((20, widths[1] - 1, 1))


def test_grown_arm_begins_as_the_host() -> None:
    ours = plastic.play(STREAM, grown(STREAM), [Hyper(rate=0.0, adapter_rate=0.0)], (0,))
    host = make_arm("host", STREAM, rivals.plain())
    np.testing.assert_allclose(ours, plastic.play(STREAM, host, [Hyper(rate=0.0)], (0,)), rtol=1e-4)


def test_grown_arm_learns_with_its_adapters_at_their_own_rate() -> None:
    hypers = [Hyper(rate=0.0, adapter_rate=rate) for rate in (0.0, 1e-2)]
    still, moving = plastic.play(STREAM, grown(STREAM), hypers, (0,))
    assert not np.allclose(still, moving)


def test_comparison_gives_rows_and_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    contenders = [
        plastic.Entry(make_arm("grown", STREAM, rivals.plain()), [Hyper(rate=1e-2)]),
        plastic.Entry(make_arm("host", STREAM, rivals.plain()), plastic.grid(rate=(0.0, 1e-2))),
    ]
    rows = plastic.compare(STREAM, contenders, selection_seeds=(100,), final_seeds=(0, 1))
    names = [
        f"regression_{arm}_{part}"
        for arm in ("grown", "host")
        for part in ("all", "last_tenth", "change")
    ]
    assert list(rows) == [*names, "regression_grown_minus_host"]
    # The host is the same network, and of its rates the one that learns is the better one.
    assert rows["regression_host_all"].extra["hyper"]["rate"] == pytest.approx(1e-2)
    assert rows["regression_grown_minus_host"].median == 0.0
    assert rows["regression_host_all"].count == 2
    capsys.readouterr()
