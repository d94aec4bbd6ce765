"""Finding targets, and every bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import BLUEPRINTS, Block, Cnn, Mlp, Transformer, grow
from torch import nn

import esper_fn as ef
import torch_bridge
from torch_bridge import BridgeError


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("fc", ["h.0.fc", "h.1.fc"]),
        ("h.1.fc", ["h.1.fc"]),
        (r"h\.\d\.(fc|ln)", ["h.0.ln", "h.0.fc", "h.1.ln", "h.1.fc"]),
        ("all-linear", ["h.0.fc", "h.1.fc"]),
        (nn.LayerNorm, ["h.0.ln", "h.1.ln"]),
        (["embed", "fc"], ["embed", "h.0.fc", "h.1.fc"]),
        (lambda name, module: name.endswith("1.ln"), ["h.1.ln"]),
    ],
)
def test_targets(targets: Any, names: list[str]) -> None:
    bridge = grow(Transformer(), targets)
    assert [site.name for site in bridge.layout.sites] == names


def test_a_block_is_a_target_whose_width_is_told(capsys: Any) -> None:
    model = Transformer()
    name = torch_bridge.blocks("h")
    bridge = grow(model, name, features={name: 8}, chunks={r"h\.0": 4, r"h\.1": 2}, verbose=True)
    assert [(s.name, s.chunks) for s in bridge.layout.sites] == [("h.0", 4), ("h.1", 2)]
    settings_ = capsys.readouterr().out
    assert "6 seeds at 2 sites of Transformer" in settings_
    assert "h.0  8 features in 4 chunks, vector: bottleneck, low_rank" in settings_
    _, rest = model.h[0](torch.randn(2, 3, 8))
    assert rest == "kept"


def test_convolutions_are_images_along_their_channels() -> None:
    bridge = grow(Cnn(), "conv1", blueprints={"d": ef.blueprints.depthwise_conv()})
    (site,) = bridge.layout.sites
    assert (site.features, site.topology) == (8, "image")


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.a(x))


class Once(Twice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Mlp(), {"targets": "fc3"}, "did you mean 'fc"),
        (Mlp(), {"targets": []}, "targets is empty"),
        (Mlp(), {"targets": 3}, "a target must be a name"),
        (Shares(), {"targets": "a"}, "one module under 2 names"),
        (Transformer(), {"targets": "h"}, "is a ModuleList"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2))), {"targets": "0"}, r"its last one \(0\.0\)"),
        (Transformer(), {"targets": torch_bridge.blocks("h")}, "say features="),
        (Mlp(), {"targets": "fc1", "features": {"fc1": 3}}, "whose output has 16"),
        (Mlp(), {"targets": "fc1", "features": {"fc2": 8}}, "matches no target"),
        (Mlp(), {"targets": "fc1", "chunks": {"fc2": 2}}, "matches no target"),
        (Mlp(), {"targets": "fc1", "chunks": 17}, "do not fit 16 features"),
        (Mlp(), {"targets": "fc1", "watch_every": -1}, "watch_every must be"),
        ("model", {"targets": "fc1"}, "must be a torch.nn.Module"),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(
    model: Any, options: dict[str, Any], message: str
) -> None:
    before = list(model.modules()) if isinstance(model, nn.Module) else None
    with pytest.raises(ValueError, match=message):
        torch_bridge.grow(model, **{"blueprints": BLUEPRINTS, "chunks": 2, **options})
    assert before is None or list(model.modules()) == before


def test_a_blueprint_without_a_torch_form_leaves_the_model_as_it_was() -> None:
    model = Mlp()
    own = ef.blueprints.low_rank(2)._replace(name="mine", activation=None)
    with pytest.raises(BridgeError, match="register_blueprint"):
        grow(model, "fc1", blueprints={"mine": own})
    assert not hasattr(model.fc1, "seeds")
    torch_bridge.register_blueprint("mine", _own)
    with pytest.raises(BridgeError, match="has a torch form already"):
        torch_bridge.register_blueprint("mine", lambda *inputs: inputs[1])
    assert grow(model, "fc1", blueprints={"mine": own}).layout.names == ("mine",)


def _own(p: Any, u: torch.Tensor, mask: torch.Tensor, topology: str) -> torch.Tensor:
    return u @ p["down"] @ p["up"]


def test_growing_twice_is_refused_until_unwrapped() -> None:
    model = Mlp()
    bridge = grow(model, "fc1")
    with pytest.raises(BridgeError, match="unwrap"):
        grow(model, "fc1")
    bridge.unwrap()
    grow(model, "fc1")
    with pytest.raises(BridgeError, match="was unwrapped"):
        bridge.step(0.0)


def test_a_module_called_twice_in_one_forward() -> None:
    model = Twice()
    grow(model, "a")
    with pytest.raises(BridgeError, match="called more than once"):
        model(torch.randn(2, 6))
    once = Once()
    grow(once, "a")
    once(torch.randn(2, 6))
    once(torch.randn(2, 6))


class Changes(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.block = Block(8)
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.block(self.change(x))


class Inner(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: {"x": x}, "returns dict; seeds need a tensor"),
        (lambda x: x.sum(-1), "no feature axis of 8"),
        (lambda x: x[..., :4], "no feature axis of 8"),
        (lambda x: x.double(), "is torch.float64; seeds need"),
        (lambda x: x.to("meta"), "is on meta, its seeds are on cpu"),
    ],
)
def test_outputs_that_cannot_grow(make: Any, message: str) -> None:
    model = nn.Sequential(Inner(make))
    grow(model, "0", features={"0": 8})
    with pytest.raises(BridgeError, match=message):
        model(torch.randn(2, 8))
