"""Adapters that could never learn: optimisers without them, and hosts frozen too late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import Mlp, grow, set_stages
from torch import nn

from esper_fn.lifecycle import Stage
from torch_bridge import BridgeError

ROWS = {0: ("low_rank", Stage.GRAFTING, 0.5)}


def step(model: nn.Module, bridge: Any, *optimizers: Any) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = model(torch.randn(4, 6)).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    bridge.step(loss)


def steps(number: int, model: nn.Module, bridge: Any, *optimizers: Any) -> None:
    for _ in range(number):
        step(model, bridge, *optimizers)


def host_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".seeds." not in name]


def test_an_optimiser_made_later_without_the_adapters() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    first = torch.optim.SGD(model.parameters(), 0.1)
    step(model, bridge, first)
    later = torch.optim.SGD(host_of(model), 0.1)
    with pytest.raises(BridgeError, match=r"in no optimiser that steps \(SGD\): .*add_param_group"):
        step(model, bridge, later)
    later.add_param_group({"params": bridge.adapter_parameters()})
    step(model, bridge, later)


def test_a_group_taken_out_of_an_optimiser_and_one_that_is_gone() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    optimizer = torch.optim.SGD(bridge.parameter_groups(), 0.1)
    step(model, bridge, optimizer)
    optimizer.param_groups.pop()
    with pytest.raises(BridgeError, match="in no optimiser that steps"):
        step(model, bridge, optimizer)
    adapters = torch.optim.SGD(bridge.adapter_parameters(), 0.1)
    step(model, bridge, optimizer, adapters)
    del adapters
    with pytest.raises(BridgeError, match="in no optimiser that steps"):
        step(model, bridge, optimizer)


def test_optimisers_of_different_parameters_may_take_turns() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    host = torch.optim.SGD(host_of(model), 0.1)
    adapters = torch.optim.SGD(bridge.adapter_parameters(), 0.1)
    step(model, bridge, host, adapters)
    for turn in range(8):
        step(model, bridge, adapters if turn % 4 == 3 else host)
    with pytest.raises(BridgeError, match="in no optimiser that steps"):
        steps(200, model, bridge, host)


def test_freeze_host() -> None:
    model = Mlp()
    bridge = grow(model, "fc1", freeze_host=True)
    assert not any(p.requires_grad for p in host_of(model))
    set_stages(bridge, ROWS)
    before = [p.clone() for p in host_of(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    adapter = bridge.sites[0].get_submodule("low_rank")[0].up
    was = adapter.detach().clone()
    step(model, bridge, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(host_of(model), before, strict=True))
    assert not torch.equal(adapter, was)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_frozen_host_stands_still_whatever_gradients_it_had(kind: Any) -> None:
    model = Mlp()
    model(torch.randn(4, 6)).square().mean().backward()  # as pretraining leaves it
    bridge = grow(model, "fc1", freeze_host=True)
    before = [p.detach().clone() for p in host_of(model)]
    optimizer = kind(model.parameters(), 0.1)
    loss = model(torch.randn(4, 6)).square().mean()
    loss.backward()
    optimizer.step()
    bridge.step(loss)
    for old, new in zip(before, host_of(model), strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=0)


def test_a_failed_grow_freezes_nothing() -> None:
    model = Mlp()
    with pytest.raises(BridgeError):
        grow(model, "nothing", freeze_host=True)
    with pytest.raises(BridgeError, match="freeze_host must be"):
        grow(model, "fc1", freeze_host="yes")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_freezing_everything_after_grow(stacked: bool, when: str) -> None:
    model = Mlp()
    bridge = grow(model, "fc1", stacked=stacked)
    if when == "later":
        set_stages(bridge, ROWS)
        step(model, bridge, torch.optim.SGD(model.parameters(), 0.1))
    model.requires_grad_(False)
    model.out.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(BridgeError, match=r"requires_grad=False .*freeze_host=True"):
        step(model, bridge, optimizer)
    for p in bridge.adapter_parameters():
        p.requires_grad_(True)
    step(model, bridge, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))


def test_peft_on_top() -> None:
    peft = pytest.importorskip("peft")
    model = Mlp()
    bridge = grow(model, "fc1")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc2"], r=2))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.1)
    with pytest.raises(BridgeError, match="by hand or by PEFT"):
        step(wrapped, bridge, optimizer)
    for p in bridge.adapter_parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": bridge.adapter_parameters()})
    step(wrapped, bridge, optimizer)
