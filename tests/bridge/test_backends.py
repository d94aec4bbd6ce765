"""Every backend computes the rule, wherever it serves; the definition is held to float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bridges import grow, reading, set_stages
from torch import Tensor, nn

import esper_fn as ef
from esper_fn.lifecycle import Stage
from torch_bridge import backends
from torch_bridge.backends import BACKENDS, SiteBackend, _passes

ADAPTERS = {
    "low_rank": ef.blueprints.low_rank(4),
    "narrow": ef.blueprints.low_rank(2),
    "odd_rank": ef.blueprints.low_rank(17),
    "relu": ef.blueprints.bottleneck(3, activation="relu"),
    "gelu": ef.blueprints.bottleneck(3, activation="gelu"),
    "silu": ef.blueprints.bottleneck(3, activation="silu"),
    "gated": ef.blueprints.gated(4),
    "normalised": ef.blueprints.normalised(4),
}
HOSTS = {
    "one_row": (nn.Linear(6, 8), (6,)),
    "rows": (nn.Linear(6, 8), (40, 6)),
    "few_rows": (nn.Linear(6, 8), (3, 6)),
    "tokens": (nn.Linear(6, 32), (4, 20, 6)),
    "images": (nn.Conv2d(2, 8, 3), (5, 2, 6, 6)),
    "wide": (nn.Linear(6, 128), (70, 6)),
    "uneven": (nn.Linear(6, 11), (9, 6)),
    "empty": (nn.Linear(6, 8), (0, 6)),
}
NOT_SERVED = {
    "reference": set(),
    "dense_cpu": {"uneven", "empty", "gated", "normalised"},
    "triton": {"empty", "normalised"},
}
ACTING, BEHIND = (Stage.FINE_TUNING, 0.6), (Stage.TRAINING, 0.0)
PAIRS = [
    *[("tokens", adapter) for adapter in ADAPTERS],
    *[(host, "low_rank") for host in HOSTS if host != "tokens"],
    *[("images", "gelu"), ("uneven", "gelu"), ("uneven", "gated"), ("rows", "silu")],
]


def _serves(backend: SiteBackend, *names: str) -> bool:
    return not NOT_SERVED[backend.name] & set(names)


CASES = [(b, host, own) for b in BACKENDS for host, own in PAIRS if _serves(b, host, own)]
IDS = [f"{b.name}-{host}-{adapter}" for b, host, adapter in CASES]


def alone(monkeypatch: pytest.MonkeyPatch, backend: SiteBackend) -> list[str]:
    """Makes a backend the only one; returns where its calls are noted."""
    calls: list[str] = []

    class Noted:
        name = backend.name

        def serves(self, *arguments: Any) -> bool:
            assert backend.serves(*arguments)
            return True

        def forward(self, *arguments: Any, measures: bool) -> Any:
            calls.append("forward")
            return backend.forward(*arguments, measures=measures)

        def backward(self, *arguments: Any) -> Any:
            calls.append("backward")
            return backend.backward(*arguments)

    monkeypatch.setattr(_passes, "BACKENDS", [Noted()])
    return calls


@pytest.fixture(autouse=True)
def _kernels_for_triton(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec is not None else None
    if backend is not None and backend.name == "triton":
        request.getfixturevalue("kernels_on_a_cpu")


def grown(
    host: str, adapter: str, stages: tuple[tuple[Stage, float] | None, ...] = (ACTING, ACTING)
) -> tuple[nn.Module, Any]:
    """A layer with two chunks whose seeds are in these stages."""
    torch.manual_seed(5)
    layer = copy.deepcopy(HOSTS[host][0])
    layer.reset_parameters()
    model = nn.Sequential(layer)
    bridge = grow(model, "0", blueprints={"adapter": ADAPTERS[adapter]}, stacked=True)
    rows = {k: ("adapter", *stage) for k, stage in enumerate(stages) if stage is not None}
    set_stages(bridge, rows)
    return model, bridge.sites[0]


def results(model: nn.Module, site: Any, x: Tensor) -> dict[str, Any]:
    """The output, all gradients, and what was measured."""
    x = x.clone().requires_grad_()
    y = model(x)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    named = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(y, list(named.values()), slope, allow_unused=True)
    return {
        **{name: g for name, g in zip(named, grads, strict=True) if g is not None},
        "y": y.detach(),
        "measured": reading(site),
    }


def truth(model: Any, site: Any, adapter: str, x: Tensor) -> dict[str, Any]:
    """The same by autograd in float64, one adapter after the other."""
    layer = copy.deepcopy(model[0])
    layer._forward_hooks.clear()
    layer = layer.double()
    del layer.seeds
    chunking, axis, plan = site.plan.chunking, site.axis, site.plan
    x = x.double().requires_grad_()
    h = layer(x)
    slope = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view(h.shape)
    y, d_h = h.detach().movedim(axis, -1).clone(), slope.movedim(axis, -1).clone()
    outcome: dict[str, Any] = {}
    parameters = dict(site.get_submodule("adapter").named_parameters())
    stacked = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    measured = torch.zeros(chunking.chunks, 10, dtype=torch.float64)
    for chunk in range(chunking.chunks):
        own = slice(
            int(chunking.starts[chunk]), int(chunking.starts[chunk] + chunking.sizes[chunk])
        )
        u = h.detach().movedim(axis, -1)[..., own].clone().requires_grad_()
        dy = slope.movedim(axis, -1)[..., own]
        rows = u.detach().reshape(-1, u.shape[-1])
        num_dead = (rows == 0).all(0).sum() if len(rows) else 0
        sums = [rows.numel(), rows.sum(), rows.square().sum(), rows.shape[1] * bool(len(rows))]
        measured[chunk, :6] = torch.tensor([*sums, num_dead, dy.square().sum()])
        slot = int(site.slot[chunk])
        if slot < 0:
            continue
        leaves = {n: p.detach()[slot].double().requires_grad_() for n, p in parameters.items()}
        scale, learn, feel, damping = plan.gains[chunk].double()
        r = _apply(adapter, leaves, u, chunking.widest)
        y[..., own] += scale * r.detach()
        d_u, *_ = torch.autograd.grad(r, u, dy, retain_graph=True)
        d_h[..., own] += feel * d_u
        pulled = dy + (damping if feel == 0 else 0) * r.detach()
        for name, g in zip(
            leaves, torch.autograd.grad(r, list(leaves.values()), pulled), strict=True
        ):
            stacked[name][slot] = learn * g
        r = r.detach()
        measured[chunk, 6:9] = torch.tensor([1, r.square().sum(), -(dy * r).sum()])
    grads = torch.autograd.grad(h, [x, *layer.parameters()], d_h.movedim(-1, axis))
    outcome |= {f"0.seeds.adapter.{name}": g for name, g in stacked.items()}
    names = ["x", *(f"0.{name}" for name, _ in layer.named_parameters())]
    outcome |= dict(zip(names, grads, strict=True))
    return {**outcome, "y": y.movedim(-1, axis), "measured": measured if len(x) else 0 * measured}


def _apply(adapter: str, p: dict[str, Tensor], u: Tensor, widest: int) -> Tensor:
    width = u.shape[-1]
    assert width in (widest, widest - 1)
    if adapter == "normalised":
        u = nn.functional.layer_norm(u, (width,))
    h = u @ p["down"][:width]
    if "bias" in p:
        h = h + p["bias"]
    if "gate" in p:
        a = nn.functional.silu(u @ p["gate"][:width]) * h
    elif adapter in {"gelu", "normalised"}:
        a = nn.functional.gelu(h, approximate="tanh")
    elif adapter in {"relu", "silu"}:
        a = getattr(nn.functional, adapter)(h)
    else:
        a = h
    return a @ p["up"][:, :width]


def assert_alike(outcome: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    for name, expected in right.items():
        if expected is None or name not in outcome:
            continue
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            outcome[name].double(),
            expected.double(),
            rtol=tolerance,
            atol=tolerance * (scale + 1e-2),
            msg=lambda text, name=name: f"{name}: {text}",
        )


class TestEveryBackend:
    @pytest.mark.parametrize(("backend", "host", "adapter"), CASES, ids=IDS)
    def test_values_gradients_and_measurements(
        self, monkeypatch: pytest.MonkeyPatch, backend: SiteBackend, host: str, adapter: str
    ) -> None:
        model, site = grown(host, adapter)
        calls = alone(monkeypatch, backend)
        x = torch.randn(HOSTS[host][1])
        outcome = results(model, site, x)
        assert calls == ["forward", "backward"]
        assert_alike(outcome, truth(model, site, adapter, x), 3e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(x), outcome["y"])

    @pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
    @pytest.mark.parametrize(
        "stages", [(BEHIND, ACTING), (None, ACTING), (BEHIND, None), (BEHIND, BEHIND)]
    )
    @pytest.mark.parametrize(("host", "adapter"), [("tokens", "gelu"), ("uneven", "low_rank")])
    def test_any_stage(
        self,
        monkeypatch: pytest.MonkeyPatch,
        backend: SiteBackend,
        host: str,
        adapter: str,
        stages: Any,
    ) -> None:
        if backend.name == "dense_cpu":
            plan = grown(host, adapter, stages)[1].plan
            assert not backend.serves(plan, {}, torch.randn(3, plan.chunking.features))
            return
        model, site = grown(host, adapter, stages)
        alone(monkeypatch, backend)
        x = torch.randn(HOSTS[host][1])
        assert_alike(results(model, site, x), truth(model, site, adapter, x), 3e-5)

    @pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(
        self, monkeypatch: pytest.MonkeyPatch, backend: SiteBackend, dtype: torch.dtype
    ) -> None:
        model, site = grown("tokens", "gelu")
        model.to(dtype)
        x = torch.randn(HOSTS["tokens"][1]).to(dtype)
        if backend.name == "dense_cpu" or (backend.name == "triton" and dtype == torch.float16):
            adapters = {"adapter": dict(site.get_submodule("adapter").named_parameters())}
            assert not backend.serves(site.plan, adapters, torch.randn(3, 32).to(dtype))
            return
        alone(monkeypatch, backend)
        outcome = results(model, site, x)
        assert {outcome[name].dtype for name in outcome if name != "measured"} == {dtype}
        assert_alike(outcome, truth(model, site, "gelu", x), 0.05)

    @pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
    @pytest.mark.parametrize(
        ("leaf", "value"), [("down", torch.nan), ("up", torch.inf), ("bias", torch.inf)]
    )
    def test_an_adapter_that_is_not_finite_reaches_nothing(
        self, monkeypatch: pytest.MonkeyPatch, backend: SiteBackend, leaf: str, value: float
    ) -> None:
        model, site = grown("tokens", "gelu")
        alone(monkeypatch, backend)
        module = site.get_submodule("adapter")
        slot, x = int(site.slot[1]), torch.randn(HOSTS["tokens"][1])
        with torch.no_grad():
            getattr(module, leaf)[slot] = value
        outcome = results(model, site, x)
        h = nn.functional.linear(x, model[0].weight, model[0].bias)
        assert torch.equal(outcome["y"][..., 16:], h[..., 16:])
        assert all(part.isfinite().all() for part in outcome.values())
        for name in ("down", "up", "bias"):
            gradient = outcome[f"0.seeds.adapter.{name}"]
            assert not gradient[slot].any()
            assert gradient[1 - slot].any()
        assert outcome["measured"][:, -1].tolist() == [0, 1]
        assert outcome["measured"][1, 7:9].tolist() == [0, 0]

    @pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
    def test_one_entry_that_is_not_finite_keeps_the_others(
        self, monkeypatch: pytest.MonkeyPatch, backend: SiteBackend
    ) -> None:
        model, site = grown("tokens", "low_rank")
        alone(monkeypatch, backend)
        slot, x = int(site.slot[0]), torch.randn(HOSTS["tokens"][1])
        usual = results(model, site, x)
        with torch.no_grad():
            site.get_submodule("adapter").up[slot, :, 3] = torch.inf
        outcome = results(model, site, x)
        others = [k for k in range(32) if k != 3]
        h = nn.functional.linear(x, model[0].weight, model[0].bias)
        torch.testing.assert_close(outcome["y"][..., others], usual["y"][..., others])
        assert torch.equal(outcome["y"][..., 3], h[..., 3])
        assert not outcome["0.seeds.adapter.down"][slot].any()

    @pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
    def test_a_broken_input_is_no_adapters_error(
        self, monkeypatch: pytest.MonkeyPatch, backend: SiteBackend
    ) -> None:
        model, site = grown("tokens", "gelu")
        alone(monkeypatch, backend)
        x = torch.randn(HOSTS["tokens"][1])
        x[1, 2, 3] = torch.inf
        outcome = results(model, site, x)
        assert outcome["measured"][:, -1].tolist() == [0, 0]
        assert not outcome["0.seeds.adapter.down"].any()


def test_the_order_of_preference() -> None:
    assert [backend.name for backend in BACKENDS] == ["triton", "dense_cpu", "reference"]
    _, site = grown("tokens", "gelu")
    adapters = {"adapter": dict(site.get_submodule("adapter").named_parameters())}
    assert backends.select(site.plan, adapters, torch.randn(3, 32)).name == "dense_cpu"
    assert backends.select(site.plan, adapters, torch.randn(3, 32).half()).name == "reference"
