"""The short way of a site on a CPU: it computes what the general way does, and steps aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bridges import grow, place, reading
from torch import nn

import esper_fn as ef
from esper_fn.lifecycle import Stage
from torch_bridge import _dense

ADAPTERS = {
    "low_rank": ef.blueprints.low_rank(4),
    "narrow": ef.blueprints.low_rank(2),
    "of odd rank": ef.blueprints.low_rank(17),
    **{
        activation: ef.blueprints.bottleneck(3, activation=activation)
        for activation in ("relu", "gelu", "silu")
    },
}
HOSTS = {
    "one row": (nn.Linear(6, 8), (6,)),
    "rows": (nn.Linear(6, 8), (40, 6)),
    "few rows": (nn.Linear(6, 8), (3, 6)),
    "tokens": (nn.Linear(6, 32), (4, 20, 6)),
    "images": (nn.Conv2d(2, 8, 3), (5, 2, 6, 6)),
    "wide": (nn.Linear(6, 128), (70, 6)),
}


def grown(host: str, adapter: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    layer = copy.deepcopy(HOSTS[host][0])
    layer.reset_parameters()
    model = nn.Sequential(layer)
    bridge = grow(model, "0", blueprints={"adapter": ADAPTERS[adapter]}, stacked=True)
    place(bridge, {k: ("adapter", Stage.FINE_TUNING, 0.3 + 0.2 * k) for k in range(2)})
    return model, bridge.sites[0]


def results(model: nn.Module, site: Any, x: torch.Tensor, steepness: float = 1.0) -> Any:
    """The output, the gradients of the input and of all parameters, and what was measured."""
    x = x.clone().requires_grad_()
    y = model(x)
    slope = torch.linspace(-steepness, steepness, y.numel()).view(y.shape)
    grads = torch.autograd.grad(y, [x, *model.parameters()], slope)
    return [y.detach(), *grads, reading(site)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the short way was gone to its end."""
    count = {"forward": 0, "backward": 0}

    def counting(name: str) -> Any:
        way = getattr(_dense, name)

        def run(*given: Any, **told: Any) -> Any:
            found = way(*given, **told)
            count[name] += found is not None
            return found

        return run

    for name in count:
        monkeypatch.setattr(_dense, name, counting(name))
    return count


def by_the_general_way(*given: Any, **told: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dense, "serves", lambda plan, x: False)
        return results(*given, **told)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("host", HOSTS)
def test_both_ways_agree(host: str, adapter: str, taken: dict[str, int]) -> None:
    model, site = grown(host, adapter)
    x = torch.randn(HOSTS[host][1])
    found, wanted = results(model, site, x), by_the_general_way(model, site, x)
    assert taken == {"forward": 1, "backward": 1}
    # Sums in another order, of which some cancel.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted[0])
    assert taken == {"forward": 2, "backward": 1}


@pytest.mark.parametrize("adapter", ["low_rank", "gelu"])
@pytest.mark.parametrize("host", ["tokens", "images"])
def test_a_compiler_meets_the_same(host: str, adapter: str, taken: dict[str, int]) -> None:
    model, site = grown(host, adapter)
    x = torch.randn(HOSTS[host][1])
    wanted = results(model, site, x)
    torch._dynamo.reset()
    found = results(torch.compile(model, backend="aot_eager", fullgraph=True), site, x)
    assert taken == {"forward": 2, "backward": 2}
    torch.testing.assert_close(found, wanted)


def test_two_batches_add_up() -> None:
    model, site = grown("tokens", "low_rank")
    xs = torch.randn(2, *HOSTS["tokens"][1])
    wanted = sum(results(model, site, x)[-1] for x in xs)
    for x in xs:
        y = model(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    torch.testing.assert_close(reading(site), wanted)


def test_half_precision_parameters_go_the_general_way(taken: dict[str, int]) -> None:
    model, site = grown("tokens", "gelu")
    site.half()
    x = torch.randn(HOSTS["tokens"][1])
    found = results(model, site, x, steepness=1e5)
    assert taken == {"forward": 0, "backward": 0}
    assert all(of.isfinite().all() for of in found)


@pytest.mark.parametrize("adapter", ["low_rank", "gelu"])
def test_aligned_factors_of_the_largest_norms_stay_finite(
    adapter: str, taken: dict[str, int]
) -> None:
    model, site = grown("tokens", adapter)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[0, 0] = 0.99 * _dense._FAR
        module = site.get_submodule("adapter")
        module.down[:, 0, 0], module.up[:, 0, 0] = 0.7 * _dense._FAR, -0.7 * _dense._FAR
    x = torch.zeros(HOSTS["tokens"][1])
    x[0, 0, 0] = 1
    found = results(model, site, x, steepness=0.99 * _dense._STEEP / (4 * 20 * 32) ** 0.5)
    assert taken == {"forward": 1, "backward": 1}
    assert all(of.isfinite().all() for of in found)


def test_matrices_come_first_where_that_takes_fewer_operations() -> None:
    leaves = {"down": torch.zeros(2, 4, 4), "up": torch.zeros(2, 4, 4)}
    assert _dense._is_merged("none", leaves, torch.zeros(2, 5, 4))
    assert not _dense._is_merged("none", leaves, torch.zeros(2, 4, 4))
    assert not _dense._is_merged("relu", leaves, torch.zeros(2, 5, 4))
    assert not _dense._is_merged("none", {**leaves, "bias": leaves["up"]}, torch.zeros(2, 5, 4))
    narrow = {"down": torch.zeros(2, 4, 2), "up": torch.zeros(2, 2, 4)}
    assert not _dense._is_merged("none", narrow, torch.zeros(2, 500, 4))


@pytest.mark.parametrize(
    ("adapter", "where"),
    [(of, where) for of in ("low_rank", "gelu") for where in ("x", "down", "up")]
    + [("gelu", "bias")],
)
@pytest.mark.parametrize("value", [1e10, 1e30, float("inf"), float("nan")])
def test_large_numbers_go_the_general_way(
    where: str, value: float, adapter: str, taken: dict[str, int]
) -> None:
    model, site = grown("tokens", adapter)
    x = torch.randn(HOSTS["tokens"][1])
    module = site.get_submodule("adapter")
    if where == "x":
        x[1, 2, 3] = value
    else:
        with torch.no_grad():
            getattr(module, where).view(2, -1)[1, 0] = value
    found, wanted = results(model, site, x), by_the_general_way(model, site, x)
    assert taken == {"forward": 0, "backward": 0}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("adapter", ["low_rank", "gelu"])
def test_a_steep_gradient_goes_the_general_way(adapter: str, taken: dict[str, int]) -> None:
    model, site = grown("tokens", adapter)
    x = torch.randn(HOSTS["tokens"][1])
    found = results(model, site, x, steepness=1e25)
    assert taken == {"forward": 1, "backward": 0}
    # Sums of squares overflow by either way; the rest agrees.
    torch.testing.assert_close(found, by_the_general_way(model, site, x, steepness=1e25))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_all_is_finite_up_to_the_norms_that_are_let_through(
    adapter: str, taken: dict[str, int]
) -> None:
    model, site = grown("tokens", adapter)
    x = torch.randn(HOSTS["tokens"][1])
    with torch.no_grad():
        model[0].bias.zero_()
        for name, leaf in site.get_submodule("adapter").named_parameters():
            rows = x.shape[0] * x.shape[1] if name == "bias" else 1
            leaf.mul_(0.99 * _dense._FAR / leaf.norm() / rows**0.5)
        h = torch.nn.functional.linear(x, model[0].weight)
        x *= 0.99 * _dense._FAR / h.norm()
    steepness = 0.99 * _dense._STEEP / h.numel() ** 0.5
    found = results(model, site, x, steepness=steepness)
    assert taken == {"forward": 1, "backward": 1}
    assert all(of.isfinite().all() for of in found)


@pytest.mark.parametrize(("rank", "width"), [(1, 64), (16, 8), (33, 56)])
def test_any_rank_and_number_of_rows(rank: int, width: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 2 * width))
    blueprint = ef.blueprints.low_rank(rank)
    bridge = grow(model, "0", blueprints={"adapter": blueprint}, stacked=True)
    place(bridge, {k: ("adapter", Stage.FINE_TUNING, 0.3 + 0.2 * k) for k in range(2)})
    for num_rows in (1, 63, 64, 129):
        x = torch.randn(num_rows, 6)
        found = results(model, bridge.sites[0], x)
        wanted = by_the_general_way(model, bridge.sites[0], x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_statistics_in_another_dtype_are_not_read() -> None:
    """Hooks on what autograd saves may give anything back."""
    model, site = grown("tokens", "low_rank")
    x = torch.randn(HOSTS["tokens"][1])
    wanted = results(model, site, x)

    def unpack(of: torch.Tensor) -> torch.Tensor:
        return of.double() if of.shape == (32,) else of

    with torch.autograd.graph.saved_tensors_hooks(lambda of: of, unpack):
        found = results(model, site, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-5)


def test_no_default_of_the_process_reaches_what_is_measured() -> None:
    _, site = grown("tokens", "low_rank")
    x = torch.randn(70, 32)
    leaves = dict(site.get_submodule("adapter").named_parameters())
    adapters = {site.plan.banks[0].bank: {name: leaf.detach() for name, leaf in leaves.items()}}
    torch.set_default_dtype(torch.float64)
    try:
        found = _dense.forward(site.plan, adapters, x, torch.empty_like(x), watches=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is not None
    torch.testing.assert_close(found[0][0], x.sum(0))
    torch.testing.assert_close(found[0][1], x.square().sum(0))
