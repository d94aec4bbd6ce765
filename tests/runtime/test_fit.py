"""The ready loop: what it compiles, reports, takes in and gives up on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_fn as ef
from esper_fn import commands as cmd
from esper_fn import policies as P  # noqa: N812 -- short in tables
from esper_fn import runtime
from esper_fn.demo import hosts
from esper_fn.errors import NonFiniteLossError
from esper_fn.lifecycle import Stage
from esper_fn.runtime._loop import segment_length

STEPS = 120
HOST = hosts.mlp((6, 8, 2, 4), spans=1, chunks=2)
QUICK = ef.lifecycle.settings(
    min_steps={Stage.STABILIZATION: 3, Stage.FINE_TUNING: 10},
    max_steps={Stage.STABILIZATION: 8, Stage.FINE_TUNING: 40},
)


def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
    inputs, targets, scale = batch
    logits = HOST.apply(params, seeds, inputs) * scale
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def grow(policy: P.Policy, **options: Any) -> ef.Growth:
    return ef.Growth(
        sites=HOST.sites,
        blueprints={"bottleneck": ef.blueprints.bottleneck(4)},
        capacity=2,
        policy=policy,
        graft=ef.grafting.linear(8),
        settings=QUICK,
        adapters_at_once=None,
        **options,
    )


SPIKES: dict[int, float] = {}


def batches(first: int, count: int) -> Any:
    source = np.random.default_rng(0)
    inputs = source.normal(size=(1024, 6)).astype(np.float32)
    targets = (inputs[:, :4] ** 2).argmax(1).astype(np.int32)
    rows = (np.arange(first, first + count)[:, None] * 32 + np.arange(32)) % 1024
    scale = np.asarray([SPIKES.get(step, 1.0) for step in range(first, first + count)], np.float32)
    return inputs[rows], targets[rows], scale


SURVEY = tuple(leaf[0] for leaf in batches(20, 1))
OPTIMIZER = ef.optim.per_adapter(optax.adamw(1e-2))
PERIODIC = P.chain(P.periodic(every=10, start=10), P.max_total(3), P.stop_after(60))
GROWTH = grow(PERIODIC)
PROGRAM = runtime.compile_fit(GROWTH, loss_fn, OPTIMIZER, survey_every=5)
PARAMS = HOST.init(jax.random.key(0))


def fit(**options: Any) -> runtime.Fit:
    arguments: dict[str, Any] = {
        "num_steps": STEPS,
        "key": jax.random.key(1),
        "survey_batch": SURVEY,
        "options": runtime.FitOptions(survey_every=5, segment_steps=20),
        "program": PROGRAM,
        **options,
    }
    return runtime.fit(GROWTH, loss_fn, OPTIMIZER, PARAMS, batches, **arguments)


@pytest.fixture(scope="module")
def finished() -> runtime.Fit:
    return fit()


def test_a_seed_travels_from_dormant_to_fossil_through_its_gates(finished: runtime.Fit) -> None:
    fossils = [event["seed"] for event in finished.events if event["to"] == "FOSSILIZED"]
    assert fossils
    life = [event for event in finished.events if event["seed"] == fossils[0]]
    assert [event["to"] for event in life[:6]] == [
        "GERMINATED",
        "GRAFTING",
        "STABILIZATION",
        "EVALUATING",
        "FINE_TUNING",
        "FOSSILIZED",
    ]
    assert life[0]["cause"] == "policy:periodic"
    assert all(event["cause"].split(":")[0] in ("gate", "dwell_limit") for event in life[1:])
    assert life[-1]["measured"]["contribution"] > 0


def test_nothing_is_compiled_after_the_first_segment(finished: runtime.Fit) -> None:
    assert finished.num_compiled == 0


def test_a_listener_that_compiles_is_counted() -> None:
    def compiles(segment: runtime.Segment) -> None:
        jax.jit(lambda x: x + segment.first_step)(jnp.ones(3))

    assert fit(listener=compiles).num_compiled == STEPS // 20 - 1


def test_the_same_run_twice_is_the_same_bit_for_bit(finished: runtime.Fit) -> None:
    again = fit()
    np.testing.assert_array_equal(finished.losses, again.losses)
    assert finished.events == again.events
    for first, second in zip(
        jax.tree.leaves(finished.state.params), jax.tree.leaves(again.state.params), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def test_a_whole_run_in_one_scan_decides_as_the_segments_do(finished: runtime.Fit) -> None:
    run = jax.jit(runtime.scan_steps(runtime.make_step(GROWTH, loss_fn, OPTIMIZER, survey_every=5)))
    state = runtime.init(OPTIMIZER, PARAMS, GROWTH.init(jax.random.key(1)))
    _, infos = run(state, batches(0, STEPS), SURVEY)
    events = runtime.lifecycle_events(GROWTH, jax.device_get(infos), 0)
    assert [(e["step"], e["seed"], e["to"]) for e in events] == [
        (e["step"], e["seed"], e["to"]) for e in finished.events
    ]
    np.testing.assert_allclose(infos.loss, finished.losses, rtol=1e-4)


def test_params_handed_in_stay_usable(finished: runtime.Fit) -> None:
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(PARAMS))


def test_commands_are_taken_between_segments() -> None:
    seed = GROWTH.layout.seed_index("layer2.0", 0)

    def ask(step: int) -> list[cmd.Command]:
        return {0: [cmd.germinate(seed, "bottleneck")], 20: [cmd.pause_seed(seed)]}.get(step, [])

    done = fit(commands=ask, num_steps=60)
    births = [e for e in done.events if e["seed"] == seed and e["to"] == "GERMINATED"]
    assert births[0]["step"] == 0
    assert births[0]["cause"] == "command"
    assert bool(done.state.growth_state.seeds.is_paused[seed])


def quiet() -> ef.GrowthState:
    """A start from which nothing grows."""
    start = GROWTH.init(jax.random.key(5))
    first = start.policy[0]._replace(start=jnp.int32(10**6))
    return start._replace(policy=(first, *start.policy[1:]))


def test_a_start_is_not_consumed_and_dormant_growth_trains_the_host_as_no_growth_does() -> None:
    start = quiet()
    done = fit(start=start, num_steps=40)
    assert done.events == []
    assert int(start.step) == 0
    assert done.adapter_flops == 0
    bare = runtime.fit_host(
        loss_fn, optax.adamw(1e-2), PARAMS, batches, num_steps=40, segment_steps=20
    )
    np.testing.assert_allclose(done.losses, bare.losses, rtol=1e-4)
    assert repr(done).startswith("Fit(40 steps; loss ")
    assert "seeds: all DORMANT; 0 adapter parameters; 0 roll-backs" in repr(done)


def test_a_non_finite_loss_is_rolled_back_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, finished: runtime.Fit
) -> None:
    monkeypatch.setitem(SPIKES, 110, float("nan"))
    done = fit()
    assert done.num_rollbacks == 1
    assert np.isnan(done.losses).sum() == 1
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(done.state.params))
    assert np.isfinite(done.losses[111:]).all()
    # Fossils stand; what was on trial is out.
    on_trial = np.isin(np.asarray(done.state.growth_state.seeds.stage), [3, 4, 5, 6])
    assert not on_trial.any()


def test_a_loss_that_stays_non_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(70, 120):
        monkeypatch.setitem(SPIKES, step, float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"at step \d+, \d+ roll-backs so far.*NaN"):
        fit()


def test_without_snapshots_a_non_finite_loss_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SPIKES, 7, float("inf"))
    with pytest.raises(NonFiniteLossError, match="at step 7"):
        runtime.fit_host(loss_fn, optax.sgd(1e-2), PARAMS, batches, num_steps=40, segment_steps=20)


def test_segment_length() -> None:
    assert segment_length(1500, 25) == 25
    assert segment_length(7, 5) == 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        segment_length(0, 5)


def test_events_of_one_run_are_all_legal(finished: runtime.Fit) -> None:
    for event in finished.events:
        assert ef.lifecycle.TRANSITIONS[Stage[event["from"]], Stage[event["to"]]]
