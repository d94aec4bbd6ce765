"""A copy loads by itself, also where it needs more room, and never moves its original."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from living import enliven, quiet, scatter
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage

X = torch.linspace(-1, 1, 18).reshape(3, 6)
GRAFT = ef.grafting.linear(num_steps=12)


def grown(**options: Any) -> tuple[nn.Sequential, torch_bridge.Bridge]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, quiet(model, ["0", "2"], **{"graft": GRAFT, "capacity": 1, **options})


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]:
    """Two adapters at each target, under another policy, capacity and number of ablations."""
    with torch.no_grad():
        model, bridge = grown(capacity=3, policy=ef.policies.plateau(), max_ablations=2)
        enliven(bridge)
        state = {name: item.clone() for name, item in model.state_dict().items()}
        return state, model(X), bridge.stages.copy()


@pytest.mark.parametrize("stacked", [False, True])
def test_a_copy_without_a_bridge_makes_room_for_itself(saved: Any, stacked: bool) -> None:
    state, expected, stages = saved
    model, bridge = grown(stacked=stacked)
    twin, bare = copy.deepcopy(model), model(X)
    keys = list(model.state_dict())
    twin.load_state_dict(state)
    torch.testing.assert_close(twin(X), expected)
    assert torch.equal(model(X), bare)
    assert list(model.state_dict()) == keys
    assert bridge.layout.capacity == 1
    assert not bridge.stages.any()
    # What the copy saves is what it is, and so is its own copy.
    again, its_bridge = grown(stacked=stacked)
    again.load_state_dict(twin.state_dict())
    torch.testing.assert_close(again(X), expected)
    np.testing.assert_array_equal(its_bridge.stages, stages)
    torch.testing.assert_close(copy.deepcopy(twin)(X), expected)
    # The model goes on as if nothing had been.
    enliven(bridge, [0])
    assert bridge.num_live == 1
    torch.testing.assert_close(twin(X), expected)


def test_a_copied_bridge_makes_room_and_goes_on(saved: Any) -> None:
    state, expected, stages = saved
    model, bridge = grown()
    bare, twin = model(X), copy.deepcopy(bridge)
    twin.model.load_state_dict(state)
    torch.testing.assert_close(twin.model(X), expected)
    np.testing.assert_array_equal(twin.stages, stages)
    assert (twin.layout.capacity, bridge.layout.capacity) == (3, 1)
    with pytest.warns(UserWarning, match="saved under another policy"):
        twin.step(1.0, [ef.commands.cull(0)])
    assert twin.num_live == 3
    assert torch.equal(model(X), bare)
    assert not bridge.stages.any()


def test_a_failed_load_changes_no_copy(saved: Any) -> None:
    model, bridge = grown()
    enliven(bridge, [0])
    twin, expected = copy.deepcopy(model), model(X)
    average = AveragedModel(model)
    for broken in (
        {**saved[0], "2.bias": torch.zeros(4)},
        {**saved[0], "2.seeds.low_rank.1.down": torch.zeros(1)},
        {**saved[0], "0.seeds.lifecycle": saved[0]["0.seeds.lifecycle"][:-1]},
        {**saved[0], "0.seeds.lifecycle": "text"},
    ):
        for item in (model, twin, average.module):
            with pytest.raises(torch_bridge.BridgeError, match=r"[Nn]othing was loaded"):
                item.load_state_dict(broken)
            assert torch.equal(item(X), expected)
            assert len(list(item.parameters())) == len(list(model.parameters()))


def test_averages_follow_a_model_that_got_room(saved: Any) -> None:
    state, expected, _ = saved
    model, bridge = grown()
    enliven(bridge, [0], noise=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    best, before = copy.deepcopy(model), model(X)
    model.load_state_dict(state)
    torch.testing.assert_close(model(X), expected)
    assert torch.equal(average(X), before)
    assert torch.equal(best(X), before)
    average.update_parameters(model)
    torch.testing.assert_close(average(X), expected)
    scatter(bridge, 0.9, seed=7)
    with pytest.warns(UserWarning, match="saved under another policy"):
        bridge.step(1.0)
    average.update_parameters(model)
    assert (average(X) - model(X)).abs().max() > 1e-4
    assert torch.equal(best(X), before)
    # An average is resumed from a file of its own.
    fresh, its_bridge = grown()
    resumed = AveragedModel(fresh, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(average.state_dict())
    assert torch.equal(resumed(X), average(X))
    assert torch.equal(fresh(X), model(X))
    for item, to in ((average, model), (resumed, fresh)):
        item.update_parameters(to)
    torch.testing.assert_close(resumed(X), average(X))
    assert its_bridge.num_live == bridge.num_live


def test_an_average_with_more_room_than_its_model_says_so(saved: Any) -> None:
    model, bridge = grown()
    average = AveragedModel(model)
    enliven(bridge, [0])
    average.module.load_state_dict(saved[0])
    records = [
        next(item for item in each.buffers() if item.dtype == torch.uint8)
        for each in (average.module, model)
    ]
    with pytest.raises(torch_bridge.BridgeError, match="capacity differ"):
        records[0].copy_(records[1])
    # A birth in the model concerns no slot of the average.
    bridge.step(1.0, [ef.commands.germinate(2, "low_rank")])
    torch.testing.assert_close(average(X), saved[1])


def test_a_copied_part_takes_another_policy_and_refuses_what_has_no_room(saved: Any) -> None:
    model, _ = grown(capacity=3)
    whole, _ = grown(capacity=3)
    whole.load_state_dict(saved[0])
    part = copy.deepcopy(model[0])
    state = {n.removeprefix("0."): item for n, item in saved[0].items() if n.startswith("0.")}
    part.load_state_dict(state)
    torch.testing.assert_close(part(X), whole[0](X))
    small, bridge = grown()
    with pytest.raises(torch_bridge.BridgeError, match=r"grow\(capacity=3\)"):
        copy.deepcopy(small[0]).load_state_dict(state)
    assert not bridge.stages.any()


def test_stages_survive_where_a_checkpoint_has_fewer_adapters(saved: Any) -> None:
    """The other direction: a model with more room, whose copy loads a smaller file."""
    few, of_few = grown()
    enliven(of_few, [0])
    model, bridge = grown(capacity=3)
    enliven(bridge)
    twin, expected = copy.deepcopy(model), model(X)
    twin.load_state_dict(few.state_dict())
    torch.testing.assert_close(twin(X), few(X))
    assert torch.equal(model(X), expected)
    assert (bridge.stages > Stage.DORMANT).all()
