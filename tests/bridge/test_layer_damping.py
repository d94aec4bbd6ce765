"""Adapters that learn behind the host descend a damped objective."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bridges import DAMPING, grow, reading, set_stages
from torch import Tensor, nn

import esper_fn as ef
from esper_fn.lifecycle import Stage
from esper_fn.types import Statistics

BLUEPRINTS = {
    "low_rank": ef.blueprints.low_rank(2),
    "bottleneck": ef.blueprints.bottleneck(4, "gelu"),
    "gated": ef.blueprints.gated(4),
    "normalised": ef.blueprints.normalised(4),
}
TRAINING, ACTING = (Stage.TRAINING, 0.0), (Stage.FINE_TUNING, 0.6)
CUTS = {"even": (12, 3), "uneven": (11, 3)}
UTILITY, ERRORS = (Statistics._fields.index(name) for name in ("utility", "num_errors"))


def grown(bank: str, cut: str, trust: float = 0.1) -> tuple[nn.Sequential, Any]:
    """A linear layer of three chunks: the first two learn behind the host, the last one acts."""
    torch.manual_seed(0)
    features, chunks = CUTS[cut]
    model = nn.Sequential(nn.Linear(6, features))
    options: dict[str, Any] = {"blueprints": {bank: BLUEPRINTS[bank]}, "watch_every": 1}
    settings = ef.lifecycle.settings(trust=trust)
    bridge = grow(model, "0", chunks=chunks, capacity=3, settings=settings, **options)
    set_stages(bridge, {0: (bank, *TRAINING), 1: (bank, *TRAINING), 2: (bank, *ACTING)})
    return model, bridge


def pulled(model: nn.Module, bridge: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """All gradients, the output and what was measured."""
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    results = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return results | {"y": y.detach().clone(), "told": reading(bridge.sites[0]).clone()}


def by_hand(
    bank: str, bridge: Any, chunk: int, h: Tensor, dy: Tensor, damping: float
) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """`(d r / d theta)^T (dy + damping r)` and r in float64 by JAX's form; the adapter's name."""
    cut = bridge.sites[0].plan.chunking
    own = slice(int(cut.starts[chunk]), int(cut.starts[chunk] + cut.sizes[chunk]))
    slot = int(bridge.state.seeds.slot[chunk])
    prefix = f"{bank}.{slot}."
    adapter = dict(bridge.sites[0].get_submodule(bank)[slot].named_parameters())
    spec = ef.blueprints.AdapterSpec(cut.widest, cut.widest, "vector")
    mask = jnp.arange(cut.widest) < cut.sizes[chunk]
    with jax.enable_x64(True):
        pad = ((0, 0), (0, cut.widest - int(cut.sizes[chunk])))
        u, slope = (
            jnp.asarray(np.pad(item[:, own].detach().double().numpy(), pad)) for item in (h, dy)
        )
        params = {n: jnp.asarray(p.detach().double().numpy()) for n, p in adapter.items()}

        def run(params: Any) -> Any:
            r = BLUEPRINTS[bank].apply(params, u, spec, mask)
            return jnp.where(mask, r, 0.0)

        r, pull = jax.vjp(run, params)
        (grads,) = pull(slope + damping * r)
        return {n: np.asarray(item) for n, item in grads.items()}, np.asarray(r), prefix


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("bank", BLUEPRINTS)
def test_an_adapter_behind_the_host_descends_the_damped_objective(bank: str, cut: str) -> None:
    model, bridge = grown(bank, cut)
    x, dy = torch.randn(9, 6), torch.randn(9, CUTS[cut][0])
    results = pulled(model, bridge, x, dy)
    h = (x @ model[0].weight.T + model[0].bias).detach()
    cut_of = bridge.sites[0].plan.chunking
    slope = torch.split(dy, cut_of.sizes.tolist(), dim=1)
    for chunk, damping in enumerate((DAMPING, DAMPING, 0.0)):
        expected, r, prefix = by_hand(bank, bridge, chunk, h, dy, damping)
        for name, grad in expected.items():
            (ours,) = (item for n, item in results.items() if n.endswith(prefix + name))
            np.testing.assert_allclose(ours, grad, rtol=1e-4, atol=1e-5)
        # What is measured is of the gradient itself.
        worth = -(slope[chunk].numpy() * r[:, : cut_of.sizes[chunk]]).sum()
        np.testing.assert_allclose(results["told"][chunk, UTILITY], worth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("bank", ["bottleneck", "gated"])
def test_damping_changes_no_bit_but_of_the_damped_adapters(bank: str, cut: str) -> None:
    x, dy = torch.randn(9, 6), torch.randn(9, CUTS[cut][0])
    # In float32 a damping so small is none.
    (model, bridge), (_, slack) = grown(bank, cut), grown(bank, cut, trust=1e30)
    assert 0 < float(slack.sites[0].plan.gains[0, 3]) < 1e-29
    results, bare = (pulled(item[0], item[1], x, dy) for item in ((model, bridge), (_, slack)))
    acting = f"{bank}.{int(bridge.state.seeds.slot[2])}."
    for name, ours in results.items():
        is_damped = "seeds" in name and acting not in name
        assert torch.equal(ours, bare[name]) != is_damped, name
    assert not results["told"][:, ERRORS].any()


@pytest.mark.parametrize("bank", ["low_rank", "bottleneck"])
def test_learning_behind_the_host_ends_at_a_minimum(bank: str) -> None:
    """Undamped, `<dy, r>` is linear in `up`, and the adapter grows with the number of steps."""
    model, bridge = grown(bank, "even")
    x, dy = torch.randn(40, 6), torch.randn(40, 12)
    optimizer = torch.optim.SGD(bridge.adapter_parameters(), 5e-3)
    for _ in range(500):
        optimizer.zero_grad()
        model(x).backward(dy)
        optimizer.step()
        bridge.sites[0].take_statistics()
    h = (x @ model[0].weight.T + model[0].bias).detach()
    for chunk in (0, 1):
        _, r, _ = by_hand(bank, bridge, chunk, h, dy, DAMPING)
        slope = dy[:, 4 * chunk : 4 * chunk + 4].numpy()
        objective = (slope * r).sum() + DAMPING / 2 * np.square(r).sum()
        assert objective < 0
        assert np.linalg.norm(r) <= np.linalg.norm(slope) / DAMPING  # within the trust region


@pytest.mark.parametrize("bank", ["low_rank", "bottleneck"])
def test_a_damped_adapter_goes_no_short_way_on_a_cpu(bank: str) -> None:
    model = nn.Sequential(nn.Linear(6, 16))
    bridge = grow(model, "0", blueprints={bank: BLUEPRINTS[bank]}, chunks=2, capacity=2)
    set_stages(bridge, dict.fromkeys(range(2), (bank, *ACTING)))
    assert bridge.sites[0].plan.banks[0].is_full
    set_stages(bridge, {0: (bank, *ACTING), 1: (bank, *TRAINING)})
    (plan,) = bridge.sites[0].plan.banks
    assert plan.is_damped
    assert not plan.is_full


def test_a_compiled_model_learns_damped_too() -> None:
    (model, bridge), (same, other) = grown("bottleneck", "even"), grown("bottleneck", "even")
    x, dy = torch.randn(9, 6), torch.randn(9, 12)
    torch._dynamo.reset()
    compiled = torch.compile(same, backend="aot_eager")
    results, right = pulled(compiled, other, x, dy), pulled(model, bridge, x, dy)
    for name, expected in right.items():
        ours = results[name if name in results else f"_orig_mod.{name}"]
        assert torch.equal(ours, expected), name
