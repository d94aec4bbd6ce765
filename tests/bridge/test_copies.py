"""A copy of a grown model has a life of its own."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from living import enliven, quiet, scatter
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage

GRAFT = ef.grafting.linear(num_steps=12)
X = torch.linspace(-1, 1, 18).reshape(3, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()


def grown(**options: Any) -> tuple[nn.Sequential, torch_bridge.Bridge]:
    model = net()
    # Slowly, as a seed can be culled while it is grafted.
    return model, quiet(model, "0", graft=GRAFT, **options)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def alike(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, np.ndarray]:
    """What a fresh model makes of a state dict, outputs and stages."""
    model, bridge = grown()
    model.load_state_dict(state)
    return model(X), bridge.stages


def test_a_copy_stays_where_it_was_copied() -> None:
    model, bridge = grown()
    dormant = copy.deepcopy(model)
    bare = model(X)
    enliven(bridge)
    acting, expected = copy.deepcopy(model), model(X)
    stages = bridge.stages.copy()
    bridge.step(1.0, [ef.commands.cull(0)])
    scatter(bridge, 0.9)
    assert torch.equal(dormant(X), bare)
    assert torch.equal(acting(X), expected)
    assert not torch.equal(model(X), expected)
    # Saved later than copied, it is still the model it was.
    results, its_stages = alike(acting.state_dict())
    assert torch.equal(results, expected)
    np.testing.assert_array_equal(its_stages, stages)
    results, its_stages = alike(dormant.state_dict())
    assert torch.equal(results, bare)
    assert not its_stages.any()


def test_loading_into_a_copy_moves_nothing_else() -> None:
    model, bridge = grown()
    early, bare = copy.deepcopy(model.state_dict()), model(X)
    enliven(bridge)
    twin, expected, stages = copy.deepcopy(model), model(X), bridge.stages.copy()
    late = copy.deepcopy(model.state_dict())
    twin.load_state_dict(early)
    assert torch.equal(twin(X), bare)
    assert torch.equal(model(X), expected)
    np.testing.assert_array_equal(bridge.stages, stages)
    copied_again = copy.deepcopy(twin)
    twin.load_state_dict(late)
    assert torch.equal(twin(X), expected)
    assert torch.equal(copied_again(X), bare)
    model.load_state_dict(early)
    assert torch.equal(model(X), bare)
    assert not bridge.stages.any()
    assert torch.equal(twin(X), expected)


def by_torch(**options: Any) -> Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]]:
    def make(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
        average = AveragedModel(model, **options)
        return average.module, lambda: average.update_parameters(model)

    return make


def by_state_dict(floats_only: bool) -> Any:
    """As timm's `ModelEmaV2` (everything) and `ModelEmaV3` do."""

    def make(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
        average = copy.deepcopy(model)

        def update() -> None:
            pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
            for old, new in pairs:
                if not floats_only:
                    old.copy_(0.5 * old + (1.0 - 0.5) * new)
                elif old.is_floating_point():
                    old.lerp_(new, weight=0.5)
                else:
                    old.copy_(new)

        return average, update

    return make


def by_subtraction(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    """As diffusion libraries do, in place, buffers too."""
    average = copy.deepcopy(model)

    def update() -> None:
        both = (itertools.chain(item.parameters(), item.buffers()) for item in (average, model))
        for old, new in zip(*both, strict=True):
            if old.is_floating_point():
                old.sub_(0.5 * (old - new))
            else:
                old.data.copy_(old.data - 0.5 * (old.data - new.data))

    return average, update


AVERAGES = {
    "swa": by_torch(),
    "ema": by_torch(multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "buffers, ema": by_torch(use_buffers=True, avg_fn=get_ema_avg_fn(0.5)),
    "buffers, emas": by_torch(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "buffers, swa": by_torch(use_buffers=True, avg_fn=get_swa_avg_fn()),
    "all of a state dict": by_state_dict(floats_only=False),
    "floats of a state dict": by_state_dict(floats_only=True),
    "differences": by_subtraction,
}


def test_averages_live_as_their_model_does() -> None:
    model, bridge = grown()
    averages = {name: make(model) for name, make in AVERAGES.items()}
    bare = model(X)
    enliven(bridge, [0], noise=0.5)
    for _, update in averages.values():
        update()
    enliven(bridge, [1], noise=1.0)
    for _, update in averages.values():
        update()
    stages, expected = bridge.stages.copy(), model(X)
    first, second = (average for average, _ in list(averages.values())[:2])
    torch.testing.assert_close(first(X), second(X))  # half and half, either way
    for name, (average, _) in averages.items():
        assert (average(X) - bare).abs().max() > 1e-3, name
        assert (average(X) - expected).abs().max() > 1e-3, name
        results, its_stages = alike(average.state_dict())
        torch.testing.assert_close(average(X), results, rtol=0, atol=0, msg=name)
        np.testing.assert_array_equal(its_stages, stages)
    # Averages that have come to the model's numbers have come to its outputs.
    for _ in range(30):
        averages["ema"][1]()
        averages["buffers, ema"][1]()
    torch.testing.assert_close(averages["ema"][0](X), expected)
    torch.testing.assert_close(averages["buffers, ema"][0](X), expected)
    # What dies in the model dies in its average, at the next one.
    bridge.step(1.0, [ef.commands.cull(0), ef.commands.cull(1)])
    assert torch.equal(averages["ema"][0](X), averages["ema"][0](X))
    averages["ema"][1]()
    torch.testing.assert_close(averages["ema"][0](X), bare)
    np.testing.assert_array_equal(bridge.stages, [Stage.CULLED] * 2)


def test_an_average_of_a_newborn_begins_with_it() -> None:
    """Not with the adapter that had its slot before."""
    model, bridge = grown(capacity=1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    best = copy.deepcopy(model)
    bare = model(X)
    enliven(bridge, [0], noise=3.0)
    average.update_parameters(model)
    assert (average(X) - bare).abs().max() > 1e-2
    bridge.step(1.0, [ef.commands.cull(0)])
    average.update_parameters(model)
    bridge.step(1.0, [ef.commands.germinate(1, "low_rank")])
    for stage in (Stage.TRAINING, Stage.GRAFTING):
        average.update_parameters(model)
        bridge.step(1.0, [ef.commands.transition(1, stage)])
    bridge.step(1.0)
    average.update_parameters(model)
    assert bridge.seed(1).alpha > 0
    # Nobody has trained the newborn: its average is the newborn.
    (own,) = ([p for n, p in item.named_parameters() if "seeds" in n] for item in [average.module])
    for mean, newborn in zip(own, bridge.adapter_parameters(), strict=True):
        torch.testing.assert_close(mean, newborn)
    torch.testing.assert_close(average(X), model(X))
    assert all(not p.any() for n, p in best.named_parameters() if "seeds" in n)


def test_averages_of_whole_lists_take_the_newest_lifecycle() -> None:
    """`_foreach_` functions of integers, as `get_swa_multi_avg_fn` has them."""
    model, bridge = grown()
    lists = [list(item.buffers()) for item in (copy.deepcopy(model), model)]
    records = [[item for item in every if item.dtype == torch.uint8] for every in lists]
    enliven(bridge)
    records[1] = [item for item in model.buffers() if item.dtype == torch.uint8]
    get_swa_multi_avg_fn()(*records, torch.tensor(3))
    assert torch.equal(*(each for (each,) in records))


def test_two_models_may_be_swapped_in_place() -> None:
    """As Lightning does around a validation."""
    model, bridge = grown()
    average, bare = copy.deepcopy(model), model(X)
    enliven(bridge)
    expected, stages = model(X), bridge.stages.copy()

    def swap() -> None:
        both = (itertools.chain(item.parameters(), item.buffers()) for item in (average, model))
        for single, other in zip(*both, strict=True):
            old = single.data.clone()
            single.data.copy_(other.data)
            other.data.copy_(old)

    swap()
    assert torch.equal(model(X), bare)
    assert torch.equal(average(X), expected)
    swap()
    assert torch.equal(model(X), expected)
    assert torch.equal(average(X), bare)
    np.testing.assert_array_equal(bridge.stages, stages)
    bridge.step(1.0)
    average.load_state_dict(model.state_dict())
    assert torch.equal(average(X), model(X))


def test_bytes_that_are_no_lifecycle_are_refused() -> None:
    model, bridge = grown()
    enliven(bridge)
    twin = copy.deepcopy(model)
    (record,) = (item for item in twin.buffers() if item.dtype == torch.uint8)
    broken = torch.tensor(record.tolist(), dtype=torch.uint8)
    broken[20] += 1
    with pytest.raises(torch_bridge.BridgeError, match="average parameters, and copy buffers"):
        record.copy_(broken)
    state = {**model.state_dict(), "0.seeds.lifecycle": broken}
    with pytest.raises(torch_bridge.BridgeError, match="other than a copy"):
        twin.load_state_dict(state)


def test_a_state_dict_of_a_copy_goes_through_files() -> None:
    model, bridge = grown()
    enliven(bridge)
    best, expected = copy.deepcopy(model), model(X)
    bridge.step(1.0, [ef.commands.cull(0)])
    file = io.BytesIO()
    torch.save(best.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {type(item) for item in state.values()} == {torch.Tensor}
    assert torch.equal(alike(state)[0], expected)
    safetensors = pytest.importorskip("safetensors.torch")
    assert torch.equal(alike(safetensors.load(safetensors.save(best.state_dict())))[0], expected)


def train(model: nn.Module, bridge: Any, steps: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    with torch.enable_grad():
        for _ in range(steps):
            loss = (model(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if bridge is not None:
                bridge.step(loss)
    return losses


def test_a_copy_trains_by_itself() -> None:
    model, bridge = grown()
    enliven(bridge)
    twin, expected, stages = copy.deepcopy(model), model(X), bridge.stages.copy()
    losses = train(twin, None, 5)
    assert losses[-1] < losses[0]
    adapters = [p for name, p in twin.named_parameters() if "seeds" in name]
    moved = [
        not torch.equal(a, b) for a, b in zip(adapters, bridge.adapter_parameters(), strict=True)
    ]
    assert any(moved)
    assert torch.equal(model(X), expected)
    np.testing.assert_array_equal(bridge.stages, stages)
    assert torch.equal(alike(twin.state_dict())[0], twin(X))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_copied_bridge_goes_on_with_its_model(stacked: bool) -> None:
    model, bridge = grown(stacked=stacked)
    enliven(bridge)
    twin = copy.deepcopy(bridge)
    assert twin.model is not model
    expected = model(X)
    losses = train(twin.model, twin, 3)
    twin.step(1.0, [ef.commands.cull(0)])
    assert torch.equal(model(X), expected)
    assert Stage.CULLED not in bridge.stages
    assert train(model, bridge, 3) == losses
    assert twin.state.step == bridge.state.step + 1
    assert twin.stages[0] == Stage.CULLED
    assert not torch.equal(twin.model(X), model(X))
    both = copy.deepcopy({"model": model, "bridge": bridge})
    assert both["bridge"].model is both["model"]
    both["bridge"].unwrap()
    torch.testing.assert_close(both["model"](X), model(X))
    assert bridge.num_live == 2


def test_a_module_that_has_its_bridge_is_copied_with_it() -> None:
    model, bridge = grown()
    model.bridge = bridge
    enliven(bridge)
    twin = copy.deepcopy(model)
    assert twin.bridge.model is twin
    twin.bridge.step(1.0, [ef.commands.cull(0)])
    assert bridge.num_live == 2
    assert twin.bridge.num_live == 1
    average = AveragedModel(model)
    bridge.step(1.0, [ef.commands.cull(0), ef.commands.cull(1)])
    average.update_parameters(model)
    assert torch.equal(average(X), model(X))


def test_a_part_is_copied_as_it_is() -> None:
    model, bridge = grown()
    enliven(bridge)
    part, expected = copy.deepcopy(model[0]), model[0](X)
    bridge.step(1.0, [ef.commands.cull(0), ef.commands.cull(1)])
    assert torch.equal(part(X), expected)
    assert not torch.equal(model[0](X), expected)
    # Without the site that has the record, too.
    model = net()
    bridge = quiet(model, ["0", "3"], chunks=1, graft=GRAFT)
    enliven(bridge)
    part, expected = copy.deepcopy(model[3]), model[3](torch.ones(1, 8))
    bridge.step(1.0, [ef.commands.cull(1)])
    assert torch.equal(part(torch.ones(1, 8)), expected)
    assert not torch.equal(model[3](torch.ones(1, 8)), expected)
    whole = copy.deepcopy(model)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(X), model(X))


def test_compiled_copies_follow_their_own_state() -> None:
    torch._dynamo.reset()
    model, bridge = grown()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    average = AveragedModel(model)
    fast = torch.compile(average, backend="aot_eager", fullgraph=True)
    bare = compiled(X)
    assert torch.equal(fast(X), bare)
    enliven(bridge)
    expected = compiled(X)
    assert torch.equal(fast(X), bare)
    average.update_parameters(model)
    torch.testing.assert_close(fast(X), expected)
    twin = copy.deepcopy(compiled)
    bridge.step(1.0, [ef.commands.cull(0), ef.commands.cull(1)])
    torch.testing.assert_close(compiled(X), bare)
    torch.testing.assert_close(twin(X), expected)
    torch.testing.assert_close(fast(X), expected)
    torch._dynamo.reset()
