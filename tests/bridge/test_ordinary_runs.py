"""Ordinary runs: batches that miss targets, padded batches, threads, transforms."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import pytest
import torch
from bridges import Mlp, grow, set_stages
from torch import nn

import esper_fn as ef
from esper_fn.lifecycle import Stage
from torch_bridge import BridgeError

ROWS = torch.randn(2, 5, 8)


def step(bridge: Any, optimizer: Any, loss: torch.Tensor) -> Any:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return bridge.step(loss)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


# --- targets that a batch misses -------------------------------------------------------------


class Drops(nn.Module):
    """Layers dropped by turns, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.idle = nn.Linear(8, 8)
        self.turn = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        for index, layer in enumerate(self.layers):
            if index == 0 and self.turn > 0:
                continue
            if index == 1 and self.turn % 2 == 0:
                continue
            x = x + layer(x)
        return x


def test_a_target_missed_by_a_batch_is_not_measured_in_it() -> None:
    model = Drops()
    bridge = grow(model, nn.Linear, watch_every=1, chunks=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step(bridge, optimizer, model(ROWS).square().mean())
    seen = bridge.state.seeds.telemetry.num_steps.tolist()
    assert seen == [1, 2, 4, 0]


def test_a_target_that_is_never_reached_is_warned_of_once() -> None:
    model = Drops()
    bridge = grow(model, nn.Linear, watch_every=1, chunks=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(80):
            step(bridge, optimizer, model(ROWS).square().mean())
    (message,) = [str(item.message) for item in caught]
    assert "1 of 4 targets" in message
    assert "exclude=" in message
    assert "idle" in message


class Viewed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).view(*x.shape[:2], -1)


class Projects(nn.Module):
    """Its layer's output is a view that is written to in place, as where inputs are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Viewed(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        y[:, 0] = 1.0
        return y


def test_a_view_that_is_written_to_is_measured() -> None:
    model = Projects()
    x = torch.randn(2, 5, 3)
    loss = model(x).square().mean()
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    bridge = grow(model, "layer", watch_every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    again = model(x).square().mean()
    assert torch.equal(again, loss)
    again.backward()
    results = [p.grad for p in model.layer.parameters(recurse=False)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    optimizer.step()
    bridge.step(again)
    assert (bridge.state.seeds.telemetry.num_steps > 0).all()


class NoDerivative(nn.Module):
    """As layers of torch.ao are: the backward pass goes on without a gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NoDerivative.apply(x)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> None:
        return None


def test_a_layer_without_a_derivative_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), NoDerivative())
    grow(model, "0")
    with pytest.raises(BridgeError, match=r"target '0': no gradient comes back .* quantise"):
        model(torch.randn(2, 4)).sum().backward()


def test_dynamically_quantised_layers_grow_like_a_frozen_host() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
        bridge = grow(model, "all-linear", chunks=2)
        set_stages(bridge, {0: ("low_rank", Stage.GRAFTING, 0.5)})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(3, 4)
        before = torch.cat([p.detach().flatten() for p in bridge.adapter_parameters()])
        step(bridge, optimizer, model(x).sum())
        expected = model(x)
        after = torch.cat([p.detach().flatten() for p in bridge.adapter_parameters()])
        assert not torch.equal(before, after)
        torch.testing.assert_close(bridge.unwrap()(x), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("is_live", [False, True])
def test_an_encoder_evaluates_padded_batches(is_live: bool) -> None:
    model = encoder()
    bridge = grow(model, "all-linear")
    if is_live:
        set_stages(
            bridge,
            {0: ("low_rank", Stage.FOSSILIZED, 1.0), 3: ("bottleneck", Stage.FOSSILIZED, 1.0)},
        )
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(ROWS, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        results = model(ROWS, src_key_padding_mask=padding)
    torch.testing.assert_close(results[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("topology", ["vector", "sequence"])
def test_ragged_batches_train(topology: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    kinds = {"scale_shift": ef.blueprints.scale_shift(), "low_rank": ef.blueprints.low_rank(2)}
    bridge = grow(model, "0", topology=topology, blueprints=kinds)
    set_stages(bridge, {0: ("low_rank", Stage.FOSSILIZED, 1.0)})
    rows = [torch.randn(3, 4), torch.randn(5, 4)]
    ragged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    results = model(ragged) + model(ragged)
    for part, row in zip(results.unbind(), rows, strict=True):
        torch.testing.assert_close(part, 2 * model(row))
    model.zero_grad()
    model(ragged).values().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(torch.cat(rows)).square().sum().backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(plain) > 2
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b)


# --- threads and transforms ------------------------------------------------------------------


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if x.sum() > 1e6:
            raise ValueError("too large")
        time.sleep(0.005)
        return y


def test_threads_may_share_a_model() -> None:
    model = Slow()
    grow(model, "fc")
    x = torch.randn(2, 6)
    expected = model(x)
    results: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.extend(torch.equal(model(x), expected) for _ in range(5))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    model = Slow()
    grow(model, "fc")
    with pytest.raises(ValueError, match="too large"):
        model(torch.full((2, 6), 1e6))
    model.fc(torch.randn(2, 6))
    model.fc(torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # within torch's own jvp
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("chunks", [2, 3])
def test_transforms_of_torch_func(chunks: int) -> None:
    model = Mlp()
    bridge = grow(model, ["fc1", "fc2"], chunks=chunks)
    x = torch.randn(4, 6)
    func = torch.func
    assert torch.equal(func.vmap(model)(x), model(x))
    set_stages(
        bridge,
        {
            0: ("low_rank", Stage.FOSSILIZED, 1.0),
            1: ("bottleneck", Stage.GRAFTING, 0.4),
            chunks: ("low_rank", Stage.TRAINING, 0.0),
        },
    )
    torch.testing.assert_close(func.vmap(model)(x), model(x))
    params = dict(model.named_parameters())

    def loss_fn(params: Any, x: torch.Tensor) -> torch.Tensor:
        return func.functional_call(model, params, (x,)).square().mean()

    loss_fn(params, x).backward()
    results = func.grad(loss_fn)(params, x)
    for name, p in params.items():
        torch.testing.assert_close(results[name], torch.zeros_like(p) if p.grad is None else p.grad)
    each = func.vmap(func.grad(loss_fn), in_dims=(None, 0))(params, x)
    # Not the mean of `found`, as what learns damped is damped in each sample by itself.
    rows = [func.grad(loss_fn)(params, row) for row in x]
    torch.testing.assert_close(
        each, {name: torch.stack([item[name] for item in rows]) for name in each}
    )
    along = torch.ones_like(x)
    _, pushed = func.jvp(model, (x,), (along,))
    torch.testing.assert_close(pushed, func.vmap(func.jacrev(model))(x).sum(-1))
    assert func.hessian(lambda row: model(row).sum())(x[0]).isfinite().all()
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, along))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, pushed)
