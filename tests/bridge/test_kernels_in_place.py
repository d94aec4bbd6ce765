"""The kernels in place of the layer's own mathematics; their reference stands in for a GPU here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import Cnn, Mlp, Transformer, gradients, grow, reading, set_stages
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper_fn as ef
from esper_fn.lifecycle import Stage
from torch_bridge.backends import Triton, _passes

BLUEPRINTS = {"gated": ef.blueprints.gated(4), "low_rank": ef.blueprints.low_rank(2)}


@pytest.mark.usefixtures("kernels_on_a_cpu")
@pytest.mark.parametrize(
    ("make", "compiles", "dtype", "stacked"),
    [
        (Mlp, False, torch.float32, False),
        (Mlp, False, torch.bfloat16, True),
        (Mlp, True, torch.float32, True),
        (Mlp, True, torch.bfloat16, False),
        (Cnn, False, torch.float32, True),
        (Cnn, False, torch.bfloat16, False),
    ],
)
def test_a_site_by_kernel_is_the_site_without(
    monkeypatch: Any, make: Any, dtype: torch.dtype, stacked: bool, compiles: bool
) -> None:
    model = make().to(dtype)
    names = ["fc1", "fc2"] if make is Mlp else ["conv1", "conv2"]
    bridge = grow(model, names, blueprints=BLUEPRINTS, stacked=stacked)
    rows = {0: ("gated", Stage.FINE_TUNING, 0.7), 1: ("gated", Stage.TRAINING, 0.0)}
    set_stages(bridge, {**rows, 3: ("low_rank", Stage.FOSSILIZED, 1.0)})
    x = torch.randn((5, 6) if make is Mlp else (2, 1, 6, 6), dtype=dtype)
    calls = []
    forward = Triton.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(Triton, "forward", counted)
    results = []
    for order in ([_passes.REFERENCE], _passes.BACKENDS):
        torch._dynamo.reset()
        monkeypatch.setattr(_passes, "BACKENDS", order)
        run: nn.Module = torch.compile(model, backend="aot_eager") if compiles else model
        y = run(x)
        grads = gradients(model, y.float().square().sum())
        results.append((y, grads, [reading(site) for site in bridge.sites]))
    assert len(calls) == 2
    loose = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(results[1][0], results[0][0], **loose)
    for name, grad in results[0][1].items():
        other = results[1][1].get(name, torch.zeros_like(grad))
        scale = float(grad.abs().max()) + 1e-6
        assert float((other - grad).abs().max()) <= loose["rtol"] * 4 * scale + 1e-5, name
    for mine, theirs in zip(results[1][2], results[0][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_a_compiler_meets_the_kernels_themselves(backend: str, stacked: bool) -> None:
    """A site of one bank: no stage compiles anew, and all it computes is what eager code does."""
    torch._dynamo.reset()
    seen: list[str] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph.print_readable(print_output=False))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = Mlp()
    blueprints = {"bottleneck": ef.blueprints.bottleneck(3)}
    bridge = grow(model, ["fc1", "fc2"], blueprints=blueprints, stacked=stacked, watch_every=2)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(5, 6)
    commands = {
        1: [ef.commands.germinate(0, "bottleneck"), ef.commands.germinate(3, "bottleneck")],
        3: [ef.commands.transition(0, Stage.TRAINING), ef.commands.transition(3, Stage.TRAINING)],
        5: [ef.commands.transition(0, Stage.GRAFTING)],
        6: [ef.commands.cull(0)],
    }
    stages = set()
    for step in range(10):
        results = []
        for run in (model, compiled):
            optimizer.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((loss, grads, [reading(site) for site in bridge.sites]))
        (eager, expected, statistics), (loss, grads, own_statistics) = results
        torch.testing.assert_close(loss, eager)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, msg=name)
        torch.testing.assert_close(own_statistics, statistics)
        for site, own in zip(bridge.sites, own_statistics, strict=True):
            if own is not None:
                site.state.add(own)
        optimizer.step()
        stages |= set(bridge.step(loss, commands.get(step, ())).stage.tolist())
    assert stages >= {Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.CULLED}
    assert ["graft_open" in graph for graph in seen] == [True, False]


class Checkpointed(Transformer):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False)[0]
        return self.head(x)


@pytest.mark.usefixtures("kernels_on_a_cpu")
@pytest.mark.parametrize("case", ["checkpointed", "batches", "frozen_host", "frozen_adapters"])
def test_compiled_kernels_read_what_eager_ones_do(case: str) -> None:
    torch._dynamo.reset()
    is_deep = case == "checkpointed"
    model: nn.Module = Checkpointed() if is_deep else Mlp()
    host = list(model.parameters())
    blueprints = {"bottleneck": ef.blueprints.bottleneck(3)}
    bridge = grow(model, r"h\.\d\.fc" if is_deep else ["fc1", "fc2"], blueprints=blueprints)
    rows = {0: ("bottleneck", Stage.FINE_TUNING, 0.7), 1: ("bottleneck", Stage.TRAINING, 0.0)}
    set_stages(bridge, rows)
    for p in {"frozen_host": host, "frozen_adapters": bridge.adapter_parameters()}.get(case, []):
        p.requires_grad_(False)
    programs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        programs.append(len(inputs))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for size in (5, 7, 9) if case == "batches" else (5,):
        x = torch.randint(11, (4, size)) if is_deep else torch.randn(size, 6)
        results = []
        for run in (model, compiled):
            grads = gradients(model, run(x).square().mean())
            results.append((grads, [reading(site) for site in bridge.sites]))
        (expected, statistics), (grads, own_statistics) = results
        torch.testing.assert_close({name: grads[name] for name in expected}, expected)
        assert not any(grads[name].any() for name in grads.keys() - expected.keys())  # they rest
        torch.testing.assert_close(own_statistics, statistics)
    assert len(programs) == (2 if case == "batches" else 1)  # one for all further batch sizes


@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_adapters_in_another_dtype_are_another_call() -> None:
    # What was compiled for one dtype would read the other's bits, as under autocast.
    model = Mlp()
    bridge = grow(model, "fc1", blueprints=BLUEPRINTS)
    set_stages(bridge, {0: ("low_rank", Stage.FINE_TUNING, 0.7)})
    (site,) = bridge.sites
    for dtype in (torch.float32, torch.bfloat16):
        site.to(dtype)
        model(torch.randn(5, 6))
        calls = _passes.BACKENDS[0].calls[site.plan].values()
        assert {call.case.adapter_dtype for call in calls} >= {str(dtype).removeprefix("torch.")}
