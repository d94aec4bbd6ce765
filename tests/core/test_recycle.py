"""The rule for data that change: what it takes for a change, and whom it releases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policy_player import Player, layout, observe

import esper_fn as ef
from esper_fn import policies, runtime
from esper_fn.commands import Kind
from esper_fn.lifecycle import Cause, Stage
from esper_fn.lifecycle._loss import loss_track, track_loss

S = Stage
# Seeds 0 to 5 have `scale` adapters of 4, 4, 8, 8, 4 parameters, but for seed 3, which is dormant.
STAGES = [S.FOSSILIZED, S.FINE_TUNING, S.EVALUATING, S.DORMANT, S.GRAFTING, S.STABILIZATION]
SLOTS = [0, 1, 4, -1, 5, 8]


def released(requests: Any) -> dict[int, Stage]:
    """Where seeds are asked to go."""
    seeds = np.flatnonzero(np.asarray(requests.kind) == Kind.TRANSITION).tolist()
    return {seed: Stage(int(requests.target[seed])) for seed in seeds}


def ask(player: Player, step_loss: float | None = None, step: int = 0, **columns: Any) -> Any:
    columns = {"utility": [1.0] * 6, **columns}
    return released(
        player.ask(
            observe(step, stage=STAGES, slot=SLOTS, loss=1.0, step_loss=step_loss, **columns)
        )
    )


def test_it_keeps_the_contract() -> None:
    policies.check(policies.recycle())
    policies.check(policies.chain(policies.grow(), policies.recycle(every=3)))


def test_a_change_releases_what_acts() -> None:
    player = Player(policies.recycle(threshold=9.0))
    # Five deviations above the average count as four, less a quarter: 3.75, 7.5, 11.25.
    assert ask(player, 1.5) == ask(player, 1.5) == {}
    assert ask(player, 1.5) == {0: S.DORMANT, 1: S.CULLED, 2: S.CULLED, 4: S.CULLED}


def test_after_a_change_the_loss_is_not_watched() -> None:
    player = Player(policies.recycle(threshold=3.0, patience=4))
    answers = [bool(ask(player, 1.5)) for _ in range(12)]
    assert answers == [True, *[False] * 4, True, *[False] * 4, True, False]


@pytest.mark.parametrize("loss", [np.nan, np.inf, 0.5, 1.0, 1.02])
def test_what_is_no_rise_releases_nothing(loss: float) -> None:
    player = Player(policies.recycle(threshold=3.0))
    assert not any(ask(player, loss) for _ in range(50))


def test_the_least_worthy_adapters_go_first() -> None:
    player = Player(policies.recycle(threshold=3.0, share=0.5))
    # Worth per parameter: 5, 2.5, 1.25 and 2: seeds 2 and 4 bring the least.
    worth = [20.0, 10.0, 10.0, 0.0, 16.0, 0.0]
    assert ask(player, 1.5, utility=worth) == {2: S.CULLED, 4: S.CULLED}


def test_a_harmful_adapter_goes_before_a_useless_one() -> None:
    player = Player(policies.recycle(threshold=3.0, share=0.1))
    assert ask(player, 1.5, utility=[0.0, -1.0, 3.0, 0.0, 2.0, 0.0]) == {1: S.CULLED}


def test_a_paused_seed_stays() -> None:
    player = Player(policies.recycle(threshold=3.0))
    paused = [True, False, False, False, False, False]
    assert 0 not in ask(player, 1.5, is_paused=paused)


def test_it_may_release_one_adapter_from_time_to_time() -> None:
    player = Player(policies.recycle(every=3))
    worth = [3.0, 2.0, 2.0, 0.0, 9.0, 0.0]
    answers = [ask(player, step=step, utility=worth) for step in range(7)]
    assert answers == [{}, {}, {2: S.CULLED}, {}, {}, {2: S.CULLED}, {}]


def test_requests_for_other_seeds_stand() -> None:
    player = Player(policies.recycle(threshold=3.0))
    observation = observe(stage=STAGES, slot=SLOTS, loss=1.0, step_loss=1.5)
    wishes = policies.request(
        policies.no_requests(6), jnp.arange(6) == 3, policies.seed_blueprints(layout()), 1.0
    )
    after = player.ask(observation, wishes)
    assert int(after.kind[3]) == Kind.GERMINATE
    assert set(released(after)) == {0, 1, 2, 4}
    assert np.asarray(after.requested_by).tolist() == [0, 0, 0, -1, 0, -1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"threshold": 0.0},
        {"threshold": float("nan")},
        {"every": 0},
        {"patience": 0},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        policies.recycle(**arguments)


@pytest.mark.parametrize("name", ["normal", "squared normal", "log-normal"])
def test_noise_alone_is_no_change(name: str) -> None:
    """400 streams of 2,000 steps."""
    noise = {
        "normal": lambda x: x,
        "squared normal": jnp.square,
        "log-normal": jnp.exp,
    }[name](jax.random.normal(jax.random.key(1), (2000, 400)))
    policy = policies.recycle()
    observation = observe(stage=STAGES, slot=SLOTS)
    nothing = policies.no_requests(6)

    @jax.jit
    @jax.vmap
    def watch(losses: jax.Array) -> jax.Array:
        def step(carry: Any, loss: jax.Array) -> Any:
            state, track = carry
            track, _ = track_loss(track, loss)
            seen = observation._replace(loss=track, step_loss=loss)
            state, requests = policy.decide(layout(), state, seen, nothing, jax.random.key(0))
            return (state, track), jnp.any(requests.kind != Kind.NONE)

        return jax.lax.scan(step, (policy.init(layout()), loss_track()), losses)[1]

    assert int(watch(noise.T).sum()) <= 2


def test_a_stream_renews_fossils_when_its_target_changes_and_not_before() -> None:
    growth = ef.Growth(
        sites=[ef.site("hidden", features=4)],
        blueprints={"mlp": ef.blueprints.bottleneck(width=8, birth="paired")},
        capacity=1,
        policy=policies.chain(policies.periodic(every=10, score="random"), policies.recycle()),
        governor=ef.governors.disabled(),
    )

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean(jnp.square(seeds.grow("hidden", x) @ params["out"] - y))

    x = jax.random.normal(jax.random.key(0), (900, 32, 4))
    target = jnp.where(jnp.arange(900)[:, None, None] < 600, jnp.sin(3 * x), jnp.cos(2 * x) + 1)
    optimizer = ef.optim.per_adapter(optax.sgd(1e-2), optax.sgd(1e-1, momentum=0.9))
    step = runtime.make_step(growth, loss_fn, optimizer, survey_every=None)
    params = {"out": 0.5 * jnp.eye(4)}
    state = runtime.init(optimizer, params, growth.init(jax.random.key(1)), snapshot_every=None)
    settings = ef.lifecycle.settings(
        max_steps={S.STABILIZATION: 60, S.EVALUATING: 60, S.FINE_TUNING: 100}, embargo_steps=0
    )
    state = state._replace(growth_state=state.growth_state._replace(settings=settings))
    _, info = jax.jit(runtime.scan_steps(step))(state, (x, target), None, growth.commands())
    stage, cause = np.asarray(info.stage)[:, 0], np.asarray(info.cause)[:, 0]
    assert stage[599] == S.FOSSILIZED
    moved = np.flatnonzero(cause == Cause.POLICY)
    first_birth, release, second_birth = moved[:3]
    assert first_birth == 0
    assert 600 < release < 640
    assert stage[release] == S.DORMANT
    assert release < second_birth <= release + 10
    assert float(info.loss[-1]) < 0.5 * float(info.loss[605])
