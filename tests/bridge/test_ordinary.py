"""Ordinary models: what `all-linear` takes, layers of any width, targets that batches miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridges import Cnn, Mlp, Transformer, grow, set_stages
from torch import nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage
from torch_bridge import BridgeError


def default(model: nn.Module, **options: Any) -> torch_bridge.Bridge:
    """With the default targets and chunks."""
    return torch_bridge.grow(
        model, policy=ef.policies.never(), verbose=False, **{"capacity": 1, **options}
    )


# --- which layers ----------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.attention(x, x, x)[0]))


class Experts(nn.Module):
    """One expert a batch; two heads of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head_a = nn.Linear(8, 2)
        self.head_b = nn.Linear(8, 2)
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        share = self.choose(x).softmax(-1)[..., :1]
        return self.head_a(self.experts[self.turn % 2](x) * share)


class Recurrent(nn.Module):
    """As Mamba mixers are made: `out_proj` is read by a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(8))
        self.in_proj = nn.Linear(8, 8)
        self.out_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.in_proj(x) @ self.out_proj.weight.T)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


IMAGES, ROWS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    ("make", "x", "taken"),
    [
        (Classifier, IMAGES, ["classifier.0"]),
        (Attends, ROWS, ["mix"]),
        (encoder, ROWS, [f"layers.{k}.linear{j}" for k in (0, 1) for j in (1, 2)]),
        (Experts, ROWS, [f"experts.{k}" for k in range(3)]),
        (Recurrent, ROWS, ["in_proj"]),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), ROWS, ["0"]),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), IMAGES, ["1"]),
        (Cnn, torch.randn(2, 1, 6, 6), ["out"]),
    ],
)
def test_all_linear_by_default(make: Any, x: torch.Tensor, taken: list[str]) -> None:
    model = make()
    bridge = default(model)
    assert [site.name for site in bridge.layout.sites] == taken
    model(x).square().mean().backward()


def _hugging_face(transformers: Any, kind: str) -> tuple[nn.Module, list[str]]:
    small = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 20, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4,
        "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    left_out = {
        "GPT2LMHeadModel": ["lm_head"],
        "BertForSequenceClassification": ["classifier"],
        "BertForMaskedLM": ["cls.predictions.decoder"],
        "ViTForImageClassification": ["classifier"],
        "MixtralForCausalLM": ["lm_head"],
        "Qwen2MoeForCausalLM": ["lm_head", "model.layers.0.mlp.shared_expert_gate"],
        "MambaForCausalLM": [
            "lm_head",
            *(f"backbone.layers.0.mixer.{n}" for n in ("dt_proj", "out_proj", "x_proj")),
        ],
        "T5ForConditionalGeneration": ["lm_head"],
        "RobertaForSequenceClassification": ["classifier.out_proj"],
        "DistilBertForSequenceClassification": ["classifier"],
    }
    family = kind.partition("For")[0].removesuffix("LMHeadModel")
    config = getattr(transformers, f"{family}Config")(**small)
    return getattr(transformers, kind)(config), left_out[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "GPT2LMHeadModel",
        "BertForSequenceClassification",
        "BertForMaskedLM",
        "ViTForImageClassification",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "MambaForCausalLM",
        "T5ForConditionalGeneration",
        "RobertaForSequenceClassification",
        "DistilBertForSequenceClassification",
    ],
)
def test_all_linear_in_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.set_default_device("meta")  # shapes are enough, and quick
    try:
        model, left_out = _hugging_face(transformers, kind)
    finally:
        torch.set_default_device(None)
    every = {
        name
        for name, item in model.named_modules()
        if isinstance(item, nn.Linear) or type(item).__name__ == "Conv1D"
    }
    bridge = default(model)
    assert every - {site.name for site in bridge.layout.sites} == set(left_out)


class Aliased(nn.Module):
    """A layer that has two names, as has its head on request."""

    def __init__(self, alias: str) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)
        self.alias = getattr(self, alias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc(torch.relu(self.a(x)))))


@pytest.mark.parametrize(
    ("alias", "taken", "head"), [("a", ["fc"], ["out"]), ("out", ["a", "fc"], [])]
)
def test_a_layer_under_two_names_is_left_out(
    alias: str, taken: list[str], head: list[str], capsys: Any
) -> None:
    model = Aliased(alias)
    bridge = torch_bridge.grow(model)
    assert [site.name for site in bridge.layout.sites] == taken
    said = capsys.readouterr().out.splitlines()
    settings_ = {line.partition("'all-linear': ")[2] for line in said if "left out by" in line}
    shared = {f"{name} (one module under several names)" for name in (alias, "alias")}
    assert settings_ == shared | {f"{name} (output head)" for name in head}
    model(ROWS).square().mean().backward()
    for targets in (alias, ["all-linear", "alias"], nn.Linear):
        with pytest.raises(torch_bridge.BridgeError, match=r"under 2 names .*; give each its own"):
            default(Aliased(alias), targets=targets)


def test_what_is_left_out_is_told_and_can_be_named(capsys: Any) -> None:
    torch_bridge.grow(Experts())
    settings_ = capsys.readouterr().out
    assert "left out by 'all-linear': head_a (output head)" in settings_
    assert "left out by 'all-linear': choose (router)" in settings_
    bridge = default(Experts(), targets=["all-linear", "head_a", "choose"])
    names = [site.name for site in bridge.layout.sites]
    assert names == ["choose", "experts.0", "experts.1", "experts.2", "head_a"]
    assert [site.chunks for site in bridge.layout.sites] == [3, 8, 8, 8, 2]


@pytest.mark.parametrize(
    ("exclude", "taken"),
    [
        ("fc", ["h.0.ln", "h.1.ln"]),
        ("h.0", ["h.1.ln", "h.1.fc"]),
        (nn.LayerNorm, ["h.0.fc", "h.1.fc"]),
        (r"h\.0\..*", ["h.1.ln", "h.1.fc"]),
        (["ln", lambda name, module: name == "h.1.fc"], ["h.0.fc"]),
        ("head", ["h.0.ln", "h.0.fc", "h.1.ln", "h.1.fc"]),
    ],
)
def test_exclude(exclude: Any, taken: list[str]) -> None:
    bridge = grow(Transformer(), ["all-linear", "ln"], exclude=exclude)
    assert [site.name for site in bridge.layout.sites] == taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "fcc"}, r"exclude='fcc' matches none .* did you mean 'fc"),
        ({"exclude": [nn.Linear, nn.LayerNorm]}, "leaves nothing to grow"),
        ({"blueprints": {"low_rank": {"rank": 2}}}, r"must be a Blueprint, got .*; call its fac"),
        ({"blueprints": {"low_rank": ef.blueprints.low_rank}}, "must be a Blueprint, got .*; call"),
        ({"blueprints": "low_rank"}, "must be a dict of names and blueprints, got .*low_rank"),
        ({"blueprints": [ef.blueprints.low_rank()]}, "must be a dict .*, got .*list"),
        ({"blueprints": ef.blueprints.low_rank()}, "must be a dict .*, got .*Blueprint"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = Transformer()
    before = list(model.modules())
    with pytest.raises((BridgeError, TypeError), match=message):
        torch_bridge.grow(model, verbose=False, **options)
    assert list(model.modules()) == before


# --- widths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x", "chunks", "topology"),
    [
        (nn.Linear(8, 1), torch.randn(2, 8), 1, "vector"),
        (nn.Linear(8, 10), torch.randn(2, 8), 10, "vector"),
        (nn.Linear(8, 24), torch.randn(2, 8), 16, "vector"),
        (nn.Conv2d(3, 6, 3), IMAGES, 6, "image"),
        (nn.ConvTranspose1d(3, 6, 2), torch.randn(2, 3, 5), 6, "vector"),
        (nn.ConvTranspose2d(3, 6, 2), IMAGES, 6, "image"),
        (nn.ConvTranspose3d(3, 6, 2), torch.randn(1, 3, 3, 3, 3), 6, "vector"),
        (nn.LSTM(8, 5, bidirectional=True), ROWS, 10, "vector"),
        (nn.GRU(8, 5), ROWS, 5, "vector"),
        (nn.TransformerEncoderLayer(8, 2, 12), ROWS, 8, "vector"),
        (nn.InstanceNorm1d(3), torch.randn(2, 3, 5), 3, "vector"),
    ],
)
def test_default_chunks_of_any_layer(
    layer: nn.Module, x: torch.Tensor, chunks: int, topology: str
) -> None:
    model = nn.Sequential(layer)
    bridge = default(model, targets="0")
    (site,) = bridge.layout.sites
    assert (site.chunks, site.topology) == (chunks, topology)
    set_stages(bridge, {0: ("low_rank", Stage.FOSSILIZED, 1.0)})
    model.eval()
    with torch.no_grad():
        grown = model(x)
        plain = bridge.unwrap()(x)
    for a, b in zip(
        *((item if isinstance(item, tuple) else (item,)) for item in (grown, plain)), strict=True
    ):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)


def test_a_number_of_chunks_is_for_all_who_are_wide_enough() -> None:
    bridge = grow(Mlp(), ["fc1", "fc2", "out"], chunks=12)
    assert [site.chunks for site in bridge.layout.sites] == [12, 8, 3]
    with pytest.raises(ValueError, match="12 chunks do not fit 8 features"):
        grow(Mlp(), ["fc1", "fc2"], chunks={"fc1": 2, "fc2": 12})


def test_the_remedy_for_a_wrong_width_reads_as_python() -> None:
    model = nn.Sequential(nn.Identity())
    grow(model, "0", features={"0": 8})
    with pytest.raises(BridgeError, match=r"features=\{'0': WIDTH\} or"):
        model(torch.randn(2, 4))


def test_lazy_layers_are_run_first() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(BridgeError, match="call it once on a batch"):
        default(model)
    model(torch.randn(2, 4))
    assert [site.name for site in default(model).layout.sites] == ["0"]
