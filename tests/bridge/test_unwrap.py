"""The plain model again: the same outputs, linear fossils inside its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import Cnn, Mlp, Transformer, grow, set_stages
from living import enliven, quiet
from torch import nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage

FOSSIL = Stage.FOSSILIZED


@pytest.mark.parametrize(
    ("make", "targets", "blueprint", "x", "options"),
    [
        (Mlp, ["fc1", "fc2"], "low_rank", torch.randn(5, 6), {}),
        (Mlp, ["fc1", "fc2"], "scale_shift", torch.randn(5, 6), {"chunks": 3}),
        (Cnn, ["conv1", "conv2"], "low_rank", torch.randn(2, 1, 6, 6), {}),
        (Cnn, ["norm"], "scale_shift", torch.randn(2, 1, 6, 6), {}),
        (Transformer, ["embed"], "low_rank", torch.randint(11, (2, 4)), {}),
        (Transformer, ["ln"], "scale_shift", torch.randint(11, (2, 4)), {}),
    ],
)
def test_linear_fossils_fold_into_the_weights(
    make: Any, targets: Any, blueprint: str, x: torch.Tensor, options: dict[str, Any]
) -> None:
    model = make()
    bare = set(model.state_dict())
    kinds = {"low_rank": ef.blueprints.low_rank(2), "scale_shift": ef.blueprints.scale_shift()}
    bridge = grow(model, targets, blueprints=kinds, **options)
    set_stages(bridge, {0: (blueprint, FOSSIL, 1.0), 1: (blueprint, FOSSIL, 0.5)})
    model.eval()
    with torch.no_grad():
        expected = model(x)
        plain = bridge.unwrap()
        results = plain(x)
    assert plain is model
    assert set(model.state_dict()) == bare
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(results, expected)
    assert all(not hasattr(m, "seeds") for m in model.modules())


def test_what_cannot_fold_stays_as_a_submodule() -> None:
    name = torch_bridge.blocks("h")
    model = Transformer()
    bridge = grow(model, [name, "embed", "fc"], features={name: 8}, chunks={r"h\.0": 3, ".*": 2})
    set_stages(
        bridge,
        {
            0: ("bottleneck", FOSSIL, 1.0),
            1: ("low_rank", FOSSIL, 1.0),
            2: ("low_rank", FOSSIL, 1.0),
            4: ("bottleneck", Stage.GRAFTING, 0.25),
            5: ("low_rank", Stage.TRAINING, 0.0),
        },
    )
    x = torch.randint(11, (2, 4))
    with torch.no_grad():
        expected = model(x)
        bridge.unwrap()
        torch.testing.assert_close(model(x), expected)
    saved = [n for n, _ in model.named_modules() if n.endswith("grown")]
    assert saved == ["embed.grown", "h.0.grown"]
    assert not any(".seeds" in n for n in model.state_dict())
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)


def test_a_dormant_model_unwraps_to_its_own_bits() -> None:
    model = Mlp()
    x = torch.randn(5, 6)
    expected = model(x)
    bridge = grow(model, "all-linear", chunks=2)
    bridge.unwrap()
    assert torch.equal(model(x), expected)
    assert list(dict(model.named_modules())) == ["", "fc1", "fc2", "out"]


KINDS = {
    "vector": {"tanh": ef.blueprints.bottleneck(4)},
    "sequence": {"tanh": ef.blueprints.self_attention(4, is_causal=False)},
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("target", ["linear1", "linear2", "norm2"])
@pytest.mark.parametrize("topology", KINDS)
def test_an_unwrapped_encoder_evaluates_padded_batches(target: str, topology: Any) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    bridge = quiet(model, target, topology=topology, blueprints=KINDS[topology])
    enliven(bridge, name="tanh")
    model.eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        bridge.unwrap()
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("topology", KINDS)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_an_unwrapped_model_takes_ragged_batches(topology: Any, layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(4, 8))
    bridge = quiet(model, "0", topology=topology, blueprints=KINDS[topology])
    enliven(bridge, name="tanh")
    rows = [torch.randn(3, 4), torch.randn(5, 4)]
    model.eval()
    with torch.no_grad():
        expected = [model(row[None])[0] for row in rows]
        bridge.unwrap()
        results = model(torch.nested.nested_tensor(rows, layout=layout))
        torch.testing.assert_close(list(results.unbind()), expected)
