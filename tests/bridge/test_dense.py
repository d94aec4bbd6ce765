"""The short cuts of a site on a CPU: where they end, and that the definition takes over there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import reading
from test_backends import ADAPTERS, HOSTS, grown
from torch import nn

from torch_bridge.backends import DenseCpu, Reference, _dense_cpu, _passes


def results(model: nn.Module, site: Any, x: torch.Tensor, steepness: float = 1.0) -> Any:
    """The output, the gradients of the input and of all parameters, and what was measured."""
    x = x.clone().requires_grad_()
    y = model(x)
    slope = torch.linspace(-steepness, steepness, y.numel()).view(y.shape)
    grads = torch.autograd.grad(y, [x, *model.parameters()], slope)
    return [y.detach(), *grads, reading(site)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a pass ended where it began, without the definition."""
    count = {"forward": 0, "backward": 0}

    def counting(kind: Any, name: str, step: int) -> Any:
        method = getattr(kind, name)

        def run(*arguments: Any, **options: Any) -> Any:
            count[name] += step
            return method(*arguments, **options)

        return run

    for name in count:
        monkeypatch.setattr(DenseCpu, name, counting(DenseCpu, name, 1))
        monkeypatch.setattr(Reference, name, counting(Reference, name, -1))
    return count


def by_definition(*arguments: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_passes, "BACKENDS", [_passes.REFERENCE])
        return results(*arguments, **options)


@pytest.mark.parametrize(("host", "adapter"), [("tokens", "low_rank"), ("images", "gelu")])
def test_a_compiler_meets_the_same(host: str, adapter: str, taken: dict[str, int]) -> None:
    model, site = grown(host, adapter)
    x = torch.randn(HOSTS[host][1])
    expected = results(model, site, x)
    torch._dynamo.reset()
    outcome = results(torch.compile(model, backend="aot_eager", fullgraph=True), site, x)
    assert taken == {"forward": 2, "backward": 2}
    torch.testing.assert_close(outcome, expected)


def test_two_batches_add_up() -> None:
    model, site = grown("tokens", "low_rank")
    xs = torch.randn(2, *HOSTS["tokens"][1])
    expected = sum(results(model, site, x)[-1] for x in xs)
    for x in xs:
        y = model(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    torch.testing.assert_close(reading(site), expected)


def test_half_precision_parameters_are_left_to_the_definition(taken: dict[str, int]) -> None:
    model, site = grown("tokens", "gelu")
    site.half()
    x = torch.randn(HOSTS["tokens"][1])
    outcome = results(model, site, x, steepness=1e5)
    assert taken == {"forward": 0, "backward": 0}
    assert all(part.isfinite().all() for part in outcome)


@pytest.mark.parametrize("adapter", ["low_rank", "gelu"])
def test_aligned_factors_of_the_largest_norms_stay_finite(
    adapter: str, taken: dict[str, int]
) -> None:
    model, site = grown("tokens", adapter)
    largest = 0.7 * _dense_cpu.MAX_NORM
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[0, 0] = 0.99 * _dense_cpu.MAX_NORM
        module = site.get_submodule("adapter")
        module.down[:, 0, 0], module.up[:, 0, 0] = largest, -largest
    x = torch.zeros(HOSTS["tokens"][1])
    x[0, 0, 0] = 1
    steepness = 0.99 * _dense_cpu.MAX_GRADIENT_NORM / (4 * 20 * 32) ** 0.5
    outcome = results(model, site, x, steepness=steepness)
    assert taken == {"forward": 1, "backward": 1}
    assert all(part.isfinite().all() for part in outcome)


def test_matrices_come_first_where_that_takes_fewer_operations() -> None:
    leaves = {"down": torch.zeros(2, 4, 4), "up": torch.zeros(2, 4, 4)}
    is_merged = _dense_cpu._is_merged
    assert is_merged("none", leaves, torch.zeros(2, 5, 4))
    assert not is_merged("none", leaves, torch.zeros(2, 4, 4))
    assert not is_merged("relu", leaves, torch.zeros(2, 5, 4))
    assert not is_merged("none", {**leaves, "bias": leaves["up"]}, torch.zeros(2, 5, 4))
    narrow = {"down": torch.zeros(2, 4, 2), "up": torch.zeros(2, 2, 4)}
    assert not is_merged("none", narrow, torch.zeros(2, 500, 4))


@pytest.mark.parametrize(
    ("adapter", "leaf", "value"),
    [
        ("low_rank", "x", 1e10),
        ("low_rank", "down", float("nan")),
        ("low_rank", "up", 1e30),
        ("gelu", "x", float("nan")),
        ("gelu", "down", float("inf")),
        ("gelu", "up", 1e10),
        ("gelu", "bias", 1e30),
        ("gelu", "bias", float("inf")),
    ],
)
def test_large_numbers_are_left_to_the_definition(
    leaf: str, value: float, adapter: str, taken: dict[str, int]
) -> None:
    model, site = grown("tokens", adapter)
    x = torch.randn(HOSTS["tokens"][1])
    if leaf == "x":
        x[1, 2, 3] = value
    else:
        with torch.no_grad():
            getattr(site.get_submodule("adapter"), leaf).view(2, -1)[1, 0] = value
    outcome = results(model, site, x)
    assert taken == {"forward": 0, "backward": 0}
    torch.testing.assert_close(
        outcome, by_definition(model, site, x), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("adapter", ["low_rank", "gelu"])
def test_a_steep_gradient_is_left_to_the_definition(adapter: str, taken: dict[str, int]) -> None:
    model, site = grown("tokens", adapter)
    x = torch.randn(HOSTS["tokens"][1])
    outcome = results(model, site, x, steepness=1e25)
    assert taken == {"forward": 1, "backward": 0}
    # Sums of squares overflow in both; the rest agrees.
    torch.testing.assert_close(outcome, by_definition(model, site, x, steepness=1e25))


@pytest.mark.parametrize("adapter", ["low_rank", "relu", "gelu", "silu"])
def test_all_is_finite_up_to_the_norms_that_are_let_through(
    adapter: str, taken: dict[str, int]
) -> None:
    model, site = grown("tokens", adapter)
    x = torch.randn(HOSTS["tokens"][1])
    with torch.no_grad():
        model[0].bias.zero_()
        for name, leaf in site.get_submodule("adapter").named_parameters():
            rows = x.shape[0] * x.shape[1] if name == "bias" else 1
            leaf.mul_(0.99 * _dense_cpu.MAX_NORM / leaf.norm() / rows**0.5)
        h = torch.nn.functional.linear(x, model[0].weight)
        x *= 0.99 * _dense_cpu.MAX_NORM / h.norm()
    steepness = 0.99 * _dense_cpu.MAX_GRADIENT_NORM / h.numel() ** 0.5
    outcome = results(model, site, x, steepness=steepness)
    assert taken == {"forward": 1, "backward": 1}
    assert all(part.isfinite().all() for part in outcome)


@pytest.mark.parametrize("adapter", ["narrow", "odd_rank", "low_rank"])
def test_any_number_of_rows(adapter: str) -> None:
    model, site = grown("wide" if adapter == "odd_rank" else "tokens", adapter)
    for num_rows in (1, 63, 64, 129):
        x = torch.randn(num_rows, 6)
        outcome, expected = results(model, site, x), by_definition(model, site, x)
        torch.testing.assert_close(outcome, expected, rtol=1e-4, atol=1e-4)


def test_statistics_in_another_dtype_are_read() -> None:
    """Hooks on what autograd saves may give anything back."""
    model, site = grown("tokens", "low_rank")
    x = torch.randn(HOSTS["tokens"][1])
    expected = results(model, site, x)

    def unpack(saved: torch.Tensor) -> torch.Tensor:
        return saved.double() if saved.shape in {(2, 5), (2,)} else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        outcome = results(model, site, x)
    torch.testing.assert_close(outcome, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_default_of_the_process_reaches_what_is_measured(adapter: str) -> None:
    _, site = grown("tokens", adapter)
    x = torch.randn(70, 32)
    leaves = dict(site.get_submodule("adapter").named_parameters())
    adapters = {"adapter": {name: leaf.detach() for name, leaf in leaves.items()}}
    torch.set_default_dtype(torch.float64)
    try:
        backend = _passes.select(site.plan, adapters, x)
        _, residual = backend.forward(site.plan, adapters, x, measures=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert residual is not None
    assert residual.statistics.dtype == torch.float32
    torch.testing.assert_close(residual.statistics[:, 1], x.view(70, 2, 16).sum((0, 2)))
