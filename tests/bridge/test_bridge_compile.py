"""Under `torch.compile`: no graph break, two programs, and no stage change compiles anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import Mlp, Transformer, grow, reading, set_stages
from torch.utils.checkpoint import checkpoint

import esper_fn as ef
from esper_fn.lifecycle import Stage


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting() -> tuple[Any, list[int]]:
    """A backend that runs AOTAutograd and counts its compilations."""
    from torch._dynamo.backends.debugging import aot_eager

    count: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        count.append(len(inputs))
        return aot_eager(graph, inputs)

    return backend, count


@pytest.mark.parametrize("stacked", [False, True])
def test_no_stage_compiles_anew_and_all_agree_with_eager(stacked: bool) -> None:
    model = Mlp()
    bridge = grow(
        model,
        ["fc1", "fc2"],
        stacked=stacked,
        watch_every=2,
        graft=ef.grafting.linear(num_steps=20),
        settings=ef.lifecycle.settings(train_first=True),
    )
    backend, count = counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(5, 6)
    commands = {
        1: [ef.commands.germinate(0, "bottleneck"), ef.commands.germinate(3, "low_rank")],
        3: [ef.commands.transition(0, Stage.TRAINING), ef.commands.transition(3, Stage.TRAINING)],
        5: [ef.commands.transition(0, Stage.GRAFTING)],
        8: [ef.commands.cull(0)],
    }
    stages = set()
    for step in range(10):
        loss = compiled(x).square().mean()
        eager = model(x).square().mean()
        torch.testing.assert_close(loss, eager)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        info = bridge.step(loss, commands.get(step, ()))
        stages |= set(info.stage.tolist())
        if step < 2:  # one program for steps with work at the sites, then the bare model's
            assert len(count) == step + 1
    assert stages >= {Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.CULLED}
    assert len(count) == 2, count
    assert bridge.seed(1).site == "fc1"
    assert int(bridge.state.seeds.telemetry.num_steps[1]) > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_and_statistics_are_those_of_eager(backend: str) -> None:
    model = Mlp()
    bridge = grow(model, ["fc1", "fc2"])
    set_stages(
        bridge,
        {
            0: ("bottleneck", Stage.FINE_TUNING, 0.7),
            1: ("low_rank", Stage.TRAINING, 0.0),
            2: ("low_rank", Stage.FOSSILIZED, 1.0),
        },
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 6)
    outcome = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        outcome.append((grads, [reading(site) for site in bridge.sites]))
    (eager, taps), (ours, own_taps) = outcome
    for name, grad in eager.items():
        torch.testing.assert_close(ours[name], grad, msg=name)
    for tap, own in zip(taps, own_taps, strict=True):
        torch.testing.assert_close(own, tap)


def test_a_model_compiled_before_it_grew_is_compiled_anew() -> None:
    model, bare = Mlp(), Mlp()
    backend, count = counting()
    x = torch.randn(5, 6)
    compiled, other = (torch.compile(item, backend=backend) for item in (model, bare))
    compiled(x)
    bridge = grow(model, ["fc1", "fc2"])
    for item in (other, compiled):
        loss = item(x).square().mean()
        loss.backward()
    bridge.step(loss)
    assert len(count) == 2  # the bare model's program still serves the bare model
    assert int(bridge.state.seeds.telemetry.num_steps[0]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_dormant_is_bitwise_the_bare_model_with_inductor() -> None:
    model = Mlp()
    bare = Mlp()
    bare.load_state_dict(model.state_dict())
    bridge = grow(model, ["fc1", "fc2"], watch_every=2)
    x = torch.randn(5, 6)
    compiled = [torch.compile(item, fullgraph=True) for item in (bare, model)]
    for _ in range(2):  # a step that measures, and one that does not
        results = []
        for item, run in zip((bare, model), compiled, strict=True):
            item.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            results.append((loss, item.fc1.weight.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        was_measured = bridge.sites[0].state.statistics is not None
        bridge.step(loss)
    assert not was_measured


class Checkpointed(Transformer):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False)[0]
        return self.head(x)


class Rounded(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.round = Round()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.round(self.fc2(self.fc1(x))))


class Round(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x * 4) / 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.parametrize(
    ("model", "target", "backend"),
    [(Checkpointed, r"h\.\d\.fc", "aot_eager"), (Rounded, "round", "inductor")],
)
def test_no_reading_is_lost_or_told_twice(model: Any, target: str, backend: str) -> None:
    """Where a forward pass runs twice, and where nobody reads what a backward pass computes."""
    grown = model()
    features = {"round": 8} if target == "round" else None
    bridge = grow(grown, target, features=features)
    set_stages(bridge, {0: ("bottleneck", Stage.FINE_TUNING, 0.7)})
    for p in bridge.adapter_parameters():
        p.requires_grad_(model is Checkpointed)
    x = torch.randint(11, (4, 5)) if model is Checkpointed else torch.randn(5, 6)
    outcome = []
    for run in (grown, torch.compile(grown, backend=backend, fullgraph=True)):
        run(x).square().mean().backward()
        outcome.append([reading(site) for site in bridge.sites])
    for eager, compiled in zip(*outcome, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
@pytest.mark.parametrize("stacked", [False, True])
def test_blocks_compiled_by_themselves_share_two_programs(stacked: bool) -> None:
    model = Transformer(layers=3)
    bridge = grow(model, r"h\.\d\.fc", stacked=stacked, watch_every=4)
    backend, count = counting()
    for block in model.h:
        block.compile(backend=backend, fullgraph=True)
    plain = Transformer(layers=3)
    plain.load_state_dict({n: item for n, item in model.state_dict().items() if "seeds" not in n})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tokens = torch.randint(11, (4, 5))
    commands = {
        2: [ef.commands.germinate(0, "low_rank"), ef.commands.germinate(4, "bottleneck")],
        4: [ef.commands.transition(0, Stage.TRAINING), ef.commands.transition(4, Stage.TRAINING)],
        7: [ef.commands.cull(0), ef.commands.cull(4)],
    }
    torch.testing.assert_close(model(tokens), plain(tokens))
    lives = []
    for step in range(12):
        loss = model(tokens).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bridge.step(loss, commands.get(step, ()))
        lives.append(bridge.num_live)
    assert max(lives) == 2
    assert lives[-1] == 0
    assert len(count) == 2, count
