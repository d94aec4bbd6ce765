"""Any torch optimiser: fresh state for newborns, nothing at all for adapters that rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import Mlp, adapter_of, grow, set_stages

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
}

TRAIN_FIRST = ef.lifecycle.settings(train_first=True)


def train(model: Any, bridge: Any, optimizer: Any, steps: int = 1, **options: Any) -> Any:
    for _ in range(steps):
        loss = model(torch.randn(5, 6)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        info = bridge.step(loss, **options)
    return info


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resting_adapters_do_not_move_and_learning_ones_do(kind: str, stacked: bool) -> None:
    model = Mlp()
    settings = ef.lifecycle.settings(train_first=True, freeze=[Stage.EVALUATING])
    bridge = grow(model, "fc1", stacked=stacked, settings=settings)
    set_stages(
        bridge,
        {0: ("low_rank", Stage.TRAINING, 0.0), 1: ("low_rank", Stage.TRAINING, 0.0)},
    )
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, bridge, optimizer, 3)  # moments that would move an adapter
    first, second = (
        int(bridge.state.seeds.slot[s]) - bridge.sites[0].bank_slots[1].start for s in (0, 1)
    )
    site = bridge.sites[0]
    train(model, bridge, optimizer, commands=[ef.commands.transition(0, Stage.GRAFTING)])
    place_stage(bridge, 0, Stage.EVALUATING)

    def rows(slot: int) -> list[torch.Tensor]:
        return adapter_of(site, "low_rank", slot)

    before = rows(first), rows(second)
    train(model, bridge, optimizer, 4)
    for was, now in zip(before[0], rows(first), strict=True):
        assert torch.equal(was, now)
    assert any(not torch.equal(a, b) for a, b in zip(before[1], rows(second), strict=True))


def place_stage(bridge: Any, seed: int, stage: Stage) -> None:
    state = bridge.state
    bridge._lifecycle.state = state._replace(
        seeds=state.seeds._replace(
            stage=state.seeds.stage.at[seed].set(int(stage)),
            alpha=state.seeds.alpha.at[seed].set(0.5),
            is_paused=state.seeds.is_paused.at[seed].set(True),
        )
    )
    bridge._loaded()


def test_a_newborn_starts_with_fresh_state() -> None:
    model = Mlp()
    bridge = grow(model, "fc1", capacity=1, settings=TRAIN_FIRST)
    set_stages(bridge, {0: ("low_rank", Stage.TRAINING, 0.0)})
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, bridge, optimizer, 3)
    params = bridge.sites[0].parameters_of("low_rank")
    assert all(optimizer.state[p]["step"] == 3 for p in params)
    train(model, bridge, optimizer, commands=[ef.commands.cull(0)])
    train(model, bridge, optimizer, commands=[ef.commands.germinate(1, "low_rank")])
    assert bridge.stages[1] == Stage.GERMINATED
    assert not any(p in optimizer.state for p in params)
    assert not torch.any(params[1]), "born with up = 0"
    train(model, bridge, optimizer, 4)
    assert bridge.stages[1] == Stage.TRAINING
    assert 0 < optimizer.state[params[0]]["step"] < 4


def test_stacked_newborns_have_zero_moments_and_match_slot_by_slot_under_sgd() -> None:
    results = []
    for stacked in (False, True):
        torch.manual_seed(0)
        model = Mlp()
        bridge = grow(model, "fc1", stacked=stacked)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        options = [ef.commands.germinate(0, "low_rank")]
        train(model, bridge, optimizer, commands=options)
        train(model, bridge, optimizer, 5)
        train(model, bridge, optimizer, commands=[ef.commands.germinate(1, "low_rank")])
        train(model, bridge, optimizer, 10)
        results.append(
            [leaf for slot in (0, 1) for leaf in adapter_of(bridge.sites[0], "low_rank", slot)]
        )
    for single, stack in zip(*results, strict=True):
        torch.testing.assert_close(stack, single)
        assert single.any()


def test_a_lag_of_one_decides_one_step_later() -> None:
    results = []
    for lag in (0, 1):
        torch.manual_seed(0)
        model = Mlp()
        bridge = grow(model, "fc1", lag=lag, settings=TRAIN_FIRST)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        options = [ef.commands.germinate(0, "low_rank")]
        first = train(model, bridge, optimizer, commands=options)
        assert (first is None) == bool(lag)
        stages = []
        for _ in range(5):
            info = train(model, bridge, optimizer)
            stages.append(int(info.stage[0]))
        results.append(stages)
    assert results[0] == [Stage.GERMINATED] + [Stage.TRAINING] * 4
    assert results[1][1:] == results[0][:-1]


def test_an_optimiser_made_before_is_found_out() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bridge = grow(model, "fc1")
    with pytest.raises(torch_bridge.BridgeError, match="made before grow"):
        train(model, bridge, optimizer)
    with pytest.raises(torch_bridge.BridgeError, match="made before grow"):
        bridge.attach(optimizer)
    optimizer.add_param_group({"params": bridge.adapter_parameters()})
    bridge.attach(optimizer)
    train(model, bridge, optimizer)


def test_two_optimisers_may_share_the_model() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    host, adapters = bridge.parameter_groups()
    pair = torch.optim.SGD([host], 0.1), torch.optim.Adam([adapters], 0.1)
    for _ in range(2):
        loss = model(torch.randn(5, 6)).square().mean()
        loss.backward()
        for optimizer in pair:
            optimizer.step()
        bridge.step(loss)


def test_optimisers_that_share_the_adapters_are_attached_together() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    first, *others = bridge.adapter_parameters()
    host, _ = bridge.parameter_groups()
    shared = torch.optim.SGD([*host["params"], first], 0.1)
    other = torch.optim.SGD(others, 0.1)
    with pytest.raises(torch_bridge.BridgeError, match="attach them together"):
        bridge.attach(shared)
    bridge.attach([shared, other])


def test_a_scaled_loss_measures_the_same() -> None:
    results = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = Mlp()
        bridge = grow(model, "fc1")
        set_stages(bridge, {0: ("low_rank", Stage.TRAINING, 0.0)})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        bridge.attach(optimizer, scaler)
        for _ in range(2):
            loss = model(torch.randn(5, 6)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            bridge.step(loss)
        options = bridge.state.seeds.telemetry
        results.append((float(options.utility[0]), float(options.gradient_norm[0])))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[0][1] > 0


def test_autocast_trains_adapters() -> None:
    model = Mlp()
    bridge = grow(model, ["fc1", "fc2"])
    set_stages(bridge, {0: ("bottleneck", Stage.FINE_TUNING, 0.5)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in bridge.adapter_parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(5, 6)).square().mean()
    loss.backward()
    optimizer.step()
    info = bridge.step(loss)
    moved = [
        not torch.equal(a, b) for a, b in zip(before, bridge.adapter_parameters(), strict=True)
    ]
    assert sum(moved) == 3
    assert info.stage[0] == Stage.FINE_TUNING


def test_an_adapter_the_optimiser_breaks_is_put_back_and_rolled_back() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    set_stages(bridge, {0: ("low_rank", Stage.TRAINING, 0.0)})
    optimizer = torch.optim.SGD(bridge.adapter_parameters(), 0.1)
    slot = int(bridge.state.seeds.slot[0]) - bridge.sites[0].bank_slots[1].start
    params = bridge.sites[0].parameters_of("low_rank", (slot,))
    before = [p.detach().clone() for p in params]
    loss = model(torch.randn(5, 6)).square().mean()
    loss.backward()
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    info = bridge.step(loss)
    assert info.stage[0] == Stage.ROLLED_BACK
    for was, now in zip(before, params, strict=True):
        assert torch.equal(was, now)
