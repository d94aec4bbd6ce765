"""A checkpoint loads where only sites and blueprints are the same, wholly or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bridges import Mlp, grow, set_stages

import esper_fn as ef
from esper_fn.lifecycle import Stage
from torch_bridge import BridgeError

ROWS = {
    0: ("low_rank", Stage.FOSSILIZED, 1.0),
    3: ("low_rank", Stage.FOSSILIZED, 1.0),
    5: ("low_rank", Stage.GRAFTING, 0.5),
    7: ("bottleneck", Stage.FOSSILIZED, 1.0),
}


def trained(**options: Any) -> tuple[Mlp, Any]:
    model = Mlp()
    return model, grow(model, "fc1", chunks=8, **options)


@pytest.fixture(scope="module")
def saved() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A state dict of four adapters in banks of six slots, an input, and the model's output."""
    torch.manual_seed(1)
    model, bridge = trained(capacity=6, policy=ef.policies.plateau())
    set_stages(bridge, ROWS)
    x = torch.randn(5, 6)
    return {n: item.clone() for n, item in model.state_dict().items()}, x, model(x).detach()


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 6},
        {"capacity": 3},
        {"capacity": 1},
        {"capacity": 8, "governor": ef.governors.standard(), "max_ablations": 2},
        {"capacity": 2, "stacked": True},
        {"capacity": 6, "stacked": True, "policy": ef.policies.plateau()},
        {"capacity": 3, "graft": ef.grafting.momentum()},
    ],
)
def test_inference_needs_neither_policy_nor_capacity(saved: Any, options: dict[str, Any]) -> None:
    state, x, expected = saved
    model, bridge = trained(**options)
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    stages = {index: Stage(item) for index, item in enumerate(bridge.stages.tolist()) if item}
    assert stages == {index: stage for index, (_, stage, _) in ROWS.items()}
    assert bridge.num_live == 4
    again, _ = trained(**options)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_training_goes_on_under_another_policy_and_says_so(saved: Any) -> None:
    state, x, _ = saved
    model, bridge = trained(capacity=3)
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="saved under another policy"):
        bridge.step(loss)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    bridge.step(loss)
    assert bridge.num_live == 4


def _damaged(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "fc1.seeds.lifecycle"
    results = dict(state)
    if how == "cut":
        results[key] = state[key][:-3]
    elif how == "noise":
        results[key] = torch.randint(256, (5000,), dtype=torch.uint8)
    elif how == "floats":
        results[key] = torch.zeros(7)
    elif how == "length":
        results[key] = state[key].clone()
        results[key][8:16] = 255
    elif how == "host":
        results["out.bias"] = torch.zeros(4)
    elif how == "rank":
        results["fc1.seeds.low_rank.0.down"] = torch.zeros(2, 5)
    elif how == "adapter":
        del results["fc1.seeds.low_rank.0.down"]
    return results


@pytest.mark.parametrize("how", ["cut", "noise", "floats", "length", "host", "rank", "adapter"])
def test_a_failed_load_changes_nothing(saved: Any, how: str) -> None:
    model, bridge = trained(capacity=3)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    with pytest.raises(BridgeError, match=r"Nothing was loaded|nothing was loaded"):
        model.load_state_dict(_damaged(saved[0], how))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], item) for name, item in before.items())
    assert not bridge.stages.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "fc2"}, "belongs to another growth: it has sites"),
        ({"chunks": 4}, "belongs to another growth: it has sites"),
        (
            {"blueprints": {"low_rank": ef.blueprints.low_rank(2)}},
            r"it has blueprints \['bottleneck'\]",
        ),
    ],
)
def test_another_growth_leaves_the_host_as_it_was(
    saved: Any, options: dict[str, Any], message: str
) -> None:
    model = Mlp()
    targets = options.pop("targets", "fc1")
    grow(model, targets, **{"chunks": 8, **options})
    before = [p.clone() for p in model.parameters()]
    state = {name.replace("fc1.seeds", f"{targets}.seeds"): item for name, item in saved[0].items()}
    with pytest.raises(BridgeError, match=message):
        model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_part_of_a_greater_module_loads_too(saved: Any) -> None:
    state, x, expected = saved
    model, bridge = trained(capacity=2)
    whole = torch.nn.Sequential(torch.nn.Identity(), model)
    whole.load_state_dict({f"1.{name}": item for name, item in state.items()})
    torch.testing.assert_close(whole(x), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(bridge.stages), list(ROWS))
