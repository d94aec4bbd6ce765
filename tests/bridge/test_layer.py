"""What a site computes: bare when dormant, and the four gains when alive."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from bridges import DAMPING, Cnn, Mlp, Transformer, gradients, grow, reading, set_stages
from torch import nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage
from esper_fn.types import Statistics

INPUTS: dict[str, tuple[Any, Any, torch.Tensor, dict[str, Any]]] = {
    "mlp": (Mlp, ["fc1", "fc2"], torch.randn(5, 6), {}),
    "uneven": (Mlp, ["fc1", "fc2"], torch.randn(5, 6), {"chunks": 3}),
    "cnn": (Cnn, ["conv1", "norm", "conv2"], torch.randn(3, 1, 6, 6), {}),
    "blocks": (
        Transformer,
        ["embed", torch_bridge.blocks("h"), "ln"],
        torch.randint(11, (2, 4)),
        {"features": {torch_bridge.blocks("h"): 8}},
    ),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("stage", ["dormant", "germinated", "training"])
def test_output_and_gradients_are_the_bare_models_bit_for_bit(name: str, stage: str) -> None:
    make, targets, x, options = INPUTS[name]
    bare = make()
    model = copy.deepcopy(bare)
    before = dict(model.named_parameters())
    bridge = grow(model, targets, watch_every=1, **{"capacity": 4, **options})
    assert type(model) is make
    assert all(dict(model.named_parameters())[n] is p for n, p in before.items())
    if stage != "dormant":
        to = Stage[stage.upper()]
        set_stages(bridge, dict.fromkeys(range(4), ("bottleneck", to, 0.0)))
    expected, results = bare(x), model(x)
    assert torch.equal(results, expected)
    d_bare = gradients(bare, expected.square().sum())
    d_model = gradients(model, results.square().sum())
    for item, grad in d_bare.items():
        assert torch.equal(d_model[item], grad), item
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))
    learns = [n for n in d_model if "seeds" in n and d_model[n].any()]
    assert bool(learns) == (stage == "training")


def adapter_by_hand(site: Any, bank: str, slot: int, u: torch.Tensor) -> torch.Tensor:
    adapter = site.get_submodule(bank)[slot]
    z = u @ adapter.down + (adapter.bias if hasattr(adapter, "bias") else 0)
    return (torch.relu(z) if bank == "bottleneck" else z) @ adapter.up


@pytest.mark.parametrize("bank", ["bottleneck", "low_rank"])
@pytest.mark.parametrize(
    ("stage", "act", "learn", "feel", "damping"),
    [
        (Stage.TRAINING, 0.0, 1, 0.0, DAMPING),
        (Stage.GRAFTING, 0.4, 1, 0.4, 0.0),
        (Stage.EVALUATING, 0.4, 1, 0.4, 0.0),
        (Stage.FINE_TUNING, 0.4, 1, 0.4, 0.0),
        (Stage.FOSSILIZED, 0.4, 1, 0.4, 0.0),
    ],
)
def test_each_stage_has_its_four_gains(
    bank: str, stage: Stage, act: float, learn: int, feel: float, damping: float
) -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    bridge = grow(model, "0")
    set_stages(bridge, {1: (bank, stage, 0.4)})
    (site,) = bridge.sites
    x, dy = torch.randn(7, 6), torch.randn(7, 8)
    h = (x @ model[0].weight.T + model[0].bias).detach()
    u = h[:, 4:].clone().requires_grad_()
    slot = int(bridge.state.seeds.slot[1]) - next(
        item.start for item in bridge.sites[0].bank_slots if item.name == bank
    )
    r = adapter_by_hand(site, bank, slot, u)
    params = list(site.get_submodule(bank)[slot].parameters())
    (d_u,) = torch.autograd.grad(r, [u], dy[:, 4:], retain_graph=True)
    d_params = torch.autograd.grad(r, params, dy[:, 4:] + damping * r.detach())
    wanted_y, wanted_d_h = h.clone(), dy.clone()
    wanted_y[:, 4:] += act * r.detach()
    wanted_d_h[:, 4:] += feel * d_u

    y = model(x)
    torch.testing.assert_close(y, wanted_y)
    y.backward(dy)
    torch.testing.assert_close(model[0].bias.grad, wanted_d_h.sum(0))
    for p, grad in zip(params, d_params, strict=True):
        torch.testing.assert_close(p.grad, learn * grad)
    settings_ = dict(zip(Statistics._fields, reading(site).T, strict=True))
    torch.testing.assert_close(settings_["utility"][1], -(dy[:, 4:] * r).sum().detach())
    torch.testing.assert_close(settings_["output_square"][1], r.square().sum().detach())
    torch.testing.assert_close(settings_["gradient_square"][0], dy[:, :4].square().sum())
    torch.testing.assert_close(settings_["total"], h.unflatten(1, (2, 4)).sum((0, 2)))
    assert settings_["num_live"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bank", ["bottleneck", "low_rank"])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_a_site_in_which_all_live_computes_as_its_adapters_one_by_one(
    bank: str, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    bridge = grow(model, "0")
    set_stages(bridge, {k: (bank, Stage.FINE_TUNING, 0.3 + 0.2 * k) for k in range(2)})
    assert bridge.sites[0].plan.banks[0].is_full
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 8)
    site = bridge.sites[0]
    first = next(item.start for item in site.bank_slots if item.name == bank)
    slots = [int(bridge.state.seeds.slot[k]) - first for k in range(2)]
    h = (x @ model[0].weight.T + model[0].bias).detach().requires_grad_()
    adapters = [
        adapter_by_hand(site, bank, s, u) for s, u in zip(slots, h.chunk(2, -1), strict=True)
    ]
    expected = h + torch.cat([0.3 * adapters[0], 0.5 * adapters[1]], dim=-1)
    params = site.parameters_of(bank, tuple(slots))
    d_h, *_ = torch.autograd.grad(expected, [h, *params], dy, retain_graph=True)
    # What an adapter learns does not shrink with its alpha.
    d_params = torch.autograd.grad(torch.cat(adapters, dim=-1), params, dy)
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.backward(dy)
    torch.testing.assert_close(model[0].bias.grad, d_h.reshape(-1, 8).sum(0))
    for p, grad in zip(params, d_params, strict=True):
        torch.testing.assert_close(p.grad, grad)
    utility = reading(site)[:, Statistics._fields.index("utility")]
    settings_ = [-(a * b).sum() for a, b in zip(dy.chunk(2, -1), adapters, strict=True)]
    torch.testing.assert_close(utility, torch.stack(settings_).detach())


def test_blueprints_of_every_kind_agree_with_jax() -> None:
    from torch_bridge._adapters import form_of

    every = [
        getattr(ef.blueprints, name)(**sizes)
        for name, sizes in {
            "noop": {},
            "scale_shift": {},
            "low_rank": {"rank": 3},
            "bottleneck": {"width": 4},
            "gated": {"width": 4},
            "normalised": {"width": 4},
            "squeeze_excite": {"width": 3},
            "depthwise_conv": {"window": 3},
            "bottleneck_conv": {"width": 3},
            "self_attention": {"width": 4},
        }.items()
    ]
    every += [ef.blueprints.bottleneck(4, phi) for phi in ("gelu", "silu")]  # type: ignore[arg-type]
    every += [ef.blueprints.bottleneck(4, phi, "paired") for phi in ("relu", "gelu", "silu")]  # type: ignore[arg-type]
    every += [ef.blueprints.self_attention(4, is_causal=False)]
    for blueprint in every:
        for topology in blueprint.topologies:
            form_of(blueprint, ef.blueprints.AdapterSpec(6, 6, topology))


def test_a_torch_form_that_computes_something_else_is_refused() -> None:
    with pytest.raises(torch_bridge.BridgeError, match="does not compute what its JAX form does"):
        grow(Mlp(), "fc1", blueprints={"n": ef.blueprints.normalised(4, epsilon=10.0)})


def test_an_adapter_that_breaks_reaches_nothing_and_is_rolled_back() -> None:
    model = Mlp()
    bare = copy.deepcopy(model)
    bridge = grow(model, "fc1")
    set_stages(bridge, {0: ("low_rank", Stage.FINE_TUNING, 0.5)})
    with torch.no_grad():
        for p in bridge.adapter_parameters():
            p.fill_(torch.inf)
    x = torch.randn(5, 6)
    assert torch.equal(model(x), bare(x))
    loss = model(x).square().mean()
    grads, expected = gradients(model, loss), gradients(bare, bare(x).square().mean())
    assert torch.equal(grads["fc1.weight"], expected["fc1.weight"])
    info = bridge.step(loss)
    assert info.stage[0] == Stage.ROLLED_BACK


def test_checkpointed_blocks_measure_once() -> None:
    from torch.utils.checkpoint import checkpoint

    statistics = []
    for use_reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Transformer()
        bridge = grow(model, ["fc", "ln"], watch_every=1)
        set_stages(bridge, {0: ("low_rank", Stage.GRAFTING, 0.5)})
        h = model.embed(torch.arange(8).reshape(2, 4))
        for block in model.h:
            if use_reentrant is None:
                h, _ = block(h)
            else:
                h = checkpoint(lambda h, b=block: b(h)[0], h, use_reentrant=use_reentrant)
        model.head(h).square().mean().backward()
        statistics.append(torch.cat([reading(site) for site in bridge.sites]))
    torch.testing.assert_close(statistics[1], statistics[0])
    torch.testing.assert_close(statistics[2], statistics[0])


def test_a_frozen_host_still_has_a_loss_to_go_backward_from() -> None:
    model = Mlp().requires_grad_(False)
    bridge = grow(model, "fc1", watch_every=1)
    loss = model(torch.randn(5, 6)).square().mean()
    loss.backward()
    bridge.step(loss)
    assert float(bridge.state.seeds.telemetry.gradient_norm[0]) > 0
    assert not any(p.requires_grad for n, p in model.named_parameters() if "seeds" not in n)


def test_accumulated_batches_add_up() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    set_stages(bridge, {0: ("low_rank", Stage.TRAINING, 0.0)})
    x = torch.randn(8, 6)
    results = []
    for parts in (1, 4):
        for part in x.chunk(parts):
            (model(part).square().sum() / 8).backward()
        results.append(reading(bridge.sites[0]))
    utility = Statistics._fields.index("utility")
    torch.testing.assert_close(results[1][:, utility], results[0][:, utility])
    np.testing.assert_allclose(results[1][:, 1:3], results[0][:, 1:3], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_moved_model_grows_on(dtype: torch.dtype) -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    set_stages(bridge, {0: ("bottleneck", Stage.FINE_TUNING, 0.5)})
    model.to(dtype)
    assert all(p.dtype == dtype for p in bridge.adapter_parameters())
    loss = model(torch.randn(5, 6, dtype=dtype)).square().mean()
    loss.backward()
    assert loss.dtype == dtype
    assert bridge.sites[0].state.statistics.dtype == torch.float32
    bridge.step(loss)
