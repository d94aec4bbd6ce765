"""A grown model is saved by safetensors and loaded into a fresh one: adapters and stages."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bridges import Mlp, grow, set_stages

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage

OPTIONS: dict[str, Any] = {"policy": ef.policies.periodic(every=2, start=1)}
ROWS = {
    0: ("low_rank", Stage.FOSSILIZED, 1.0),
    1: ("bottleneck", Stage.TRAINING, 0.0),
    2: ("bottleneck", Stage.FINE_TUNING, 0.6),
}


def train(model: Any, bridge: Any, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bridge.step(loss)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stacked", [False, True])
def test_a_grown_checkpoint_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, stacked: bool
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Mlp()
    bridge = grow(model, ["fc1", "fc2"], stacked=stacked, **OPTIONS)
    set_stages(bridge, ROWS)
    train(model, bridge, torch.optim.SGD(model.parameters(), 0.05), 3)
    safetensors.save_file(model.state_dict(), tmp_path / "grown.safetensors")

    torch.manual_seed(9)
    other = Mlp()
    fresh = grow(other, ["fc1", "fc2"], stacked=stacked, **OPTIONS)
    other.load_state_dict(safetensors.load_file(tmp_path / "grown.safetensors"))
    np.testing.assert_array_equal(fresh.stages, bridge.stages)
    assert fresh.seed(2) == bridge.seed(2)
    assert fresh.num_live == bridge.num_live > 1
    x = torch.randn(5, 6)
    assert torch.equal(other(x), model(x))
    losses = [
        train(item, its, torch.optim.SGD(item.parameters(), 0.05), 8)
        for item, its in ((model, bridge), (other, fresh))
    ]
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(fresh.stages, bridge.stages)


def test_names_are_stable_and_the_host_keeps_its_own() -> None:
    model = Mlp()
    bare = set(model.state_dict())
    grow(model, "fc1")
    names = set(model.state_dict())
    assert bare < names
    assert "fc1.seeds.low_rank.1.down" in names
    assert names - bare == {
        "fc1.seeds.lifecycle",
        *(f"fc1.seeds.low_rank.{k}.{leaf}" for k in range(2) for leaf in ("down", "up")),
        *(f"fc1.seeds.bottleneck.{k}.{leaf}" for k in range(2) for leaf in ("down", "bias", "up")),
    }


def test_another_growth_is_refused() -> None:
    saved = Mlp()
    grow(saved, "fc1")
    state = saved.state_dict()
    model = Mlp()
    grow(model, "fc1", chunks=4)
    with pytest.raises(torch_bridge.BridgeError, match="belongs to another growth"):
        model.load_state_dict(state)


def test_a_bare_checkpoint_names_what_it_lacks() -> None:
    state = Mlp().state_dict()
    model = Mlp()
    grow(model, "fc1")
    with pytest.raises(RuntimeError, match=r"fc1\.seeds\.lifecycle"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)


def test_a_copy_of_the_model_computes_the_same_and_a_pickle_is_refused() -> None:
    model = Mlp()
    bridge = grow(model, ["fc1", "fc2"])
    set_stages(bridge, ROWS)
    average = copy.deepcopy(model)
    x = torch.randn(5, 6)
    assert torch.equal(average(x), model(x))
    assert set(average.state_dict()) == set(model.state_dict())
    with pytest.raises(torch_bridge.BridgeError, match=r"state_dict\(\)"):
        pickle.dumps(model)
