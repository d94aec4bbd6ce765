"""`unwrap` changes no output, whoever else reads a target's weight, and however it is read."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bridges import set_stages
from living import quiet, scatter
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_bridge
from esper_fn.lifecycle import Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]
X = torch.linspace(-1, 1, 18).reshape(3, 6)
TOKENS = torch.arange(8).reshape(2, 4)


class Net(nn.Module):
    """Its target `fc` makes 8 features."""

    def __init__(self, fc: nn.Module | None = None, **others: nn.Module) -> None:
        super().__init__()
        self.fc = fc or nn.Linear(6, 8)
        for name, item in others.items():
            self.add_module(name, item)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.fc(x)))


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.mid = nn.Linear(8, 8)
        self.how = how
        if how == "module":
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight
        elif how == "view":
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = nn.Parameter(self.embed.weight.data.view(8, 8))
        elif how == "list":
            self.shared = [self.embed.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.mid(self.embed(x)))
        return F.linear(h, self.shared[0]) if self.how == "list" else self.head(h)


class Statistics(nn.Module):
    """Reads the table of its embedding itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.table(x)), self.table.weight)


class Asking(nn.Module):
    """The same, by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 8)

    def numbers(self) -> torch.Tensor:
        return self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.words(x)), self.numbers())


class Layers(nn.Module):
    """Reads its layers' weights in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[0](x)
        for layer in self.layers:
            y = y + 0.5 * F.linear(x, layer.weight)
        return y


class Decoder(nn.Module):
    """Holds the layer it is tied to in something that torch does not register."""

    def __init__(self, kind: Callable[[Any], Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.tied = kind([self.embed])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.embed(x)), self.tied[0].weight)


class Inner(nn.Module):
    """Reads the weight of a layer it is called with."""

    def forward(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        return F.linear(x, layer.weight)


class Held:
    """An object that is called, without a dictionary."""

    __slots__ = ("weight",)

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def beside(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return F.linear(x, layer.weight)


TABLE: dict[str, torch.Tensor] = {}
weight_of_fc = operator.attrgetter("fc.weight")


class Beside(nn.Module):
    """Computes with its layer and, in some way, with the layer's weight once more."""

    def __init__(self, hold: Callable[[Any], Any] = lambda fc: None) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.experts = nn.ModuleDict({"a": nn.Linear(6, 8)})
        self.holder = hold(self.fc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.experts["a"](x) + self.more(x)


def reading(
    read: Callable[[Any, torch.Tensor], Any], hold: Callable[[Any], Any] = lambda fc: None
) -> Callable[[], nn.Module]:
    """One such way: what a model reads, of what it holds."""
    return lambda: type("Beside", (Beside,), {"more": read})(hold)


def keep(fc: nn.Module) -> None:
    TABLE["fc"] = fc.weight


def over_weight(fc: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = fc.weight
    return lambda x: x @ weight.T


def call(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.holder(x)


def hooked_root() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh())

    def hook(module: Any, args: Any, kwargs: Any, y: torch.Tensor) -> torch.Tensor:
        return y + F.linear(args[0], net[0].weight)

    net.register_forward_hook(hook, with_kwargs=True)
    return net


WAYS: dict[str, Callable[[], nn.Module]] = {
    "a closure over a layer": reading(call, lambda fc: lambda x: F.linear(x, fc.weight)),
    "a closure over a weight": reading(call, over_weight),
    "a partial": reading(call, lambda fc: partial(F.linear, weight=fc.weight)),
    "slots": reading(call, lambda fc: Held(fc.weight)),
    "a namespace": reading(
        lambda m, x: F.linear(x, m.holder.weight),
        lambda fc: types.SimpleNamespace(weight=fc.weight),
    ),
    "a deep container": reading(
        lambda m, x: F.linear(x, m.holder[0]["a"][0]["b"]),
        lambda fc: [{"a": [{"b": fc.weight.view(8, 6)}]}],
    ),
    "a table of the file": reading(lambda m, x: F.linear(x, TABLE["fc"]), keep),
    "a function": reading(lambda m, x: beside(x, m.fc)),
    "a sibling": reading(lambda m, x: m.holder(x, m.fc), lambda fc: Inner()),
    "parameters": reading(lambda m, x: F.linear(x, next(iter(m.fc.parameters())))),
    "an attrgetter": reading(lambda m, x: F.linear(x, weight_of_fc(m))),
    "getattr": reading(lambda m, x: F.linear(x, getattr(m.fc, "weight"))),  # noqa: B009
    "its dictionary": reading(lambda m, x: F.linear(x, m._modules["fc"].weight)),
    "a variable": reading(lambda m, x: next(F.linear(x, item.weight) for item in [m.fc])),
}
ASKED = {
    "a dtype": reading(lambda m, x: x.to(m.fc.weight.dtype).sum()),
    "a device": reading(lambda m, x: x.to(next(m.parameters()).device).sum()),
    "a bias": reading(lambda m, x: x.sum() if hasattr(m.fc, "bias") else 0.0),
    "another layer": reading(lambda m, x: F.linear(x, m.experts["a"].weight)),
}


class First(nn.Sequential):
    """Reads the weight of its first layer once more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(x, self[0].weight)


class Scaled(nn.Linear):
    """Reads its weight as another one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.tanh(self.weight), self.bias)


class BufferLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 8)
        weight = self.weight.data
        del self.weight
        self.register_buffer("weight", weight)


class PropertyLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 8)
        self.raw = nn.Parameter(self._parameters.pop("weight").data)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.raw * 2

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("_unused", value)


class Doubled(torch.Tensor):
    """A tensor subclass that a linear layer reads as twice its numbers, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                x, weight, *rest = args
                return F.linear(x, 2 * weight.as_subclass(torch.Tensor), *rest)
        if func in (torch.Tensor.copy_, torch.Tensor.double):
            raise NotImplementedError("a packed weight")
        return super().__torch_function__(func, types, args, kwargs or {})


def subclassed() -> nn.Module:
    net = Net()
    packed = net.fc.weight.data.as_subclass(Doubled)
    net.fc.weight = nn.Parameter(packed, requires_grad=False)
    return net


def two_linears() -> nn.Module:
    net = Net(nn.Linear(8, 8), other=nn.Linear(8, 8))
    net.fc.weight = net.other.weight
    net.forward = lambda x: net.other(torch.tanh(net.fc(F.pad(x, (0, 2)))))  # type: ignore[method-assign]
    return net


def shared_bias() -> nn.Module:
    net = Net(other=nn.Linear(6, 8))
    net.other.bias = net.fc.bias
    net.forward = lambda x: net.other(x) + net.fc(x)  # type: ignore[method-assign]
    return net


def of_one_storage() -> nn.Module:
    net = Net(other=nn.Linear(6, 8))
    flat = torch.randn(2, 8, 6)
    net.fc.weight, net.other.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    net.forward = lambda x: net.other(x) + net.fc(x)  # type: ignore[method-assign]
    return net


def overlapping() -> nn.Module:
    net = Net()
    net.fc.weight = nn.Parameter(torch.randn(8, 1).expand(8, 6))
    return net


def lazy() -> nn.Module:
    net = Net(nn.LazyLinear(8))
    net(X)
    return net


def own_forward() -> nn.Module:
    net = Net()
    fc = net.fc
    fc.forward = lambda x: F.linear(x, fc.weight.abs(), fc.bias)  # type: ignore[method-assign]
    return net


def with_hook(prepend: bool, net: nn.Module) -> nn.Module:
    net.fc.register_forward_hook(lambda m, args, y: torch.relu(y), prepend=prepend)
    return net


def pre_hook(net: nn.Module) -> None:
    """As old libraries change a weight."""
    weight = net.fc.weight.data.clone()
    net.fc.register_forward_pre_hook(lambda m, args: setattr(m.weight, "data", weight.clone()))


def normed(kind: Any, net: nn.Module) -> nn.Module:
    kind(net.fc)
    return net


def pruned(net: nn.Module) -> nn.Module:
    prune.random_unstructured(net.fc, "weight", 0.5)
    return net


def nothing(net: nn.Module) -> None:
    del net


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str, Callable[[Any], Any]]] = {
    "tied head": (partial(Tied, "module"), TOKENS, "head", nothing),
    "tied embedding": (partial(Tied, "module"), TOKENS, "embed", nothing),
    "tied as a view": (partial(Tied, "view"), TOKENS, "head", nothing),
    "tied by a list": (partial(Tied, "list"), TOKENS, "embed", nothing),
    "read by the model": (Statistics, TOKENS, "table", nothing),
    "read by a method": (Asking, TOKENS, "words", nothing),
    "read in a loop": (Layers, X, "layers.0", nothing),
    "read by a list": (lambda: First(nn.Linear(6, 8), nn.Tanh()), X, "0", nothing),
    "in a list": (partial(Decoder, list), TOKENS, "embed", nothing),
    "in a tuple": (partial(Decoder, tuple), TOKENS, "embed", nothing),
    **{f"read by {method}": (make, X, "fc", nothing) for method, make in WAYS.items()},
    "an expert": (ASKED["another layer"], X, "experts.a", nothing),
    "a hook of the root": (hooked_root, X, "0", nothing),
    "two linears": (two_linears, X, "fc", nothing),
    "one bias": (shared_bias, X, "fc", nothing),
    "one storage": (of_one_storage, X, "fc", nothing),
    "expanded": (overlapping, X, "fc", nothing),
    "weight_norm": (lambda: normed(nn.utils.weight_norm, Net()), X, "fc", nothing),
    "spectral_norm": (lambda: normed(nn.utils.spectral_norm, Net()), X, "fc", nothing),
    "weight_norm later": (Net, X, "fc", partial(normed, nn.utils.weight_norm)),
    "spectral_norm later": (Net, X, "fc", partial(normed, nn.utils.spectral_norm)),
    "parametrised": (lambda: normed(parametrizations.weight_norm, Net()), X, "fc", nothing),
    "parametrised later": (Net, X, "fc", partial(normed, parametrizations.spectral_norm)),
    "pruned": (lambda: pruned(Net()), X, "fc", nothing),
    "pruned later": (Net, X, "fc", pruned),
    "max_norm": (lambda: Net(nn.Embedding(8, 8, max_norm=0.5)), TOKENS, "fc", nothing),
    "a hook before": (lambda: with_hook(False, Net()), X, "fc", nothing),
    "a hook after": (Net, X, "fc", partial(with_hook, False)),
    "a hook in front": (Net, X, "fc", partial(with_hook, True)),
    "a pre-hook": (Net, X, "fc", pre_hook),
    "tensor subclass": (subclassed, X, "fc", nothing),
    "buffer": (lambda: Net(BufferLinear()), X, "fc", nothing),
    "property": (lambda: Net(PropertyLinear()), X, "fc", nothing),
    "subclass": (lambda: Net(Scaled(6, 8)), X, "fc", nothing),
    "own forward": (own_forward, X, "fc", nothing),
    "lazy": (lazy, X, "fc", nothing),
}


def enliven(bridge: torch_bridge.Bridge, noise: float = 0.3) -> None:
    """Makes all seeds act for good, with random adapters."""
    fossil = ("low_rank", Stage.FOSSILIZED, 1.0)
    set_stages(bridge, dict.fromkeys(range(bridge.layout.num_seeds), fossil), noise)
    scatter(bridge, noise)


def unwrapped(
    bridge: torch_bridge.Bridge, model: nn.Module, x: torch.Tensor, bare: torch.Tensor
) -> None:
    """The adapters act, and the outputs stay."""
    with torch.no_grad():
        expected = model(x)
        assert (expected - bare).abs().max() > 1e-2
        bridge.unwrap()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(name.endswith("seeds") for name, _ in model.named_modules())


@pytest.mark.parametrize("name", MODELS)
def test_unwrapping_leaves_the_outputs(name: str) -> None:
    make, x, target, later = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    bridge = quiet(model, [target])
    enliven(bridge, noise=0.0)
    later(model)
    with torch.no_grad():
        model(x)
        bare = model(x)
        scatter(bridge, 0.6)
        unwrapped(bridge, model, x, bare)


def test_a_head_outside_of_what_grows_is_seen() -> None:
    embed = nn.Embedding(8, 8)
    outer = nn.Sequential(embed, nn.Tanh())
    head = nn.Linear(8, 8, bias=False)
    head.weight = embed.weight
    whole = nn.Sequential(outer, head)
    bridge = quiet(outer, "0")
    bare = whole(TOKENS)
    enliven(bridge)
    unwrapped(bridge, whole, TOKENS, bare)


def test_a_hook_of_all_modules_is_seen() -> None:
    model = Net()
    bridge = quiet(model, "fc")
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: y.abs() if isinstance(m, nn.Linear) else None
    )
    try:
        bare = model(X)
        enliven(bridge)
        unwrapped(bridge, model, X, bare)
    finally:
        handle.remove()


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.01), (torch.float16, 0.003)])
def test_adapters_below_the_step_of_the_weight_stay(dtype: torch.dtype, noise: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(8, 6))
    bridge = quiet(model, "0")
    enliven(bridge, noise=noise)
    # Features that cancel: their sum is small, and what the adapters add to it is seen.
    x = 100 * torch.eye(6, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        bridge.unwrap()
        assert torch.equal(model(x), expected)
    assert any(name.endswith("grown") for name, _ in model.named_modules())


def test_a_weight_of_16_bits_takes_what_it_can_show() -> None:
    model = nn.Sequential(nn.Linear(6, 8)).to(torch.bfloat16)
    bridge = quiet(model, "0")
    enliven(bridge, noise=0.7)
    x = X.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        bridge.unwrap()
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_an_adapter_that_broke_reaches_nothing_afterwards_either() -> None:
    model = Net()
    bridge = quiet(model, "fc")
    bare = model(X)
    enliven(bridge, noise=0.0)
    with torch.no_grad():
        for p in bridge.adapter_parameters():
            p.fill_(torch.nan)
        assert torch.equal(model(X), bare)
        bridge.unwrap()
        torch.testing.assert_close(model(X), bare)


def test_growing_again_leaves_what_stayed_before() -> None:
    model = Net()
    model.fc.register_forward_hook(lambda m, args, y: torch.relu(y))
    for _ in range(2):
        bridge = quiet(model, "fc")
        bare = model(X)
        enliven(bridge)
        unwrapped(bridge, model, X, bare)
    assert [name for name, _ in model.fc.named_children()] == ["grown", "grown2"]


@pytest.mark.parametrize("make", [Net, *ASKED.values()], ids=["nothing", *ASKED])
def test_a_private_weight_is_still_folded(make: Callable[[], nn.Module]) -> None:
    """What the tests above hold back must not hold back everything."""
    model = make()
    names = list(model.state_dict())
    bridge = quiet(model, ["fc"], chunks=1)
    bare = model(X)
    enliven(bridge)
    unwrapped(bridge, model, X, bare)
    assert list(model.state_dict()) == names


def test_tied_heads_of_transformers() -> None:
    hugging = pytest.importorskip("transformers")
    small = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    bert = hugging.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        **small,
    )
    t5 = hugging.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **small)
    gpt2 = hugging.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, **small)
    two = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    for model, inputs, targets in (
        (hugging.GPT2LMHeadModel(gpt2), {"input_ids": TOKENS}, ["lm_head", "wte", "c_fc"]),
        (hugging.BertForMaskedLM(bert), {"input_ids": TOKENS}, ["predictions.decoder", "query"]),
        (
            hugging.T5ForConditionalGeneration(t5),
            two,
            ["lm_head", "decoder.embed_tokens", "wi", "wo"],
        ),
    ):
        model.eval()
        bridge = quiet(model, targets)
        bare = model(**inputs).logits
        enliven(bridge, noise=0.6)
        with torch.no_grad():
            expected = model(**inputs).logits
            bridge.unwrap()
            results = model(**inputs).logits
        assert (expected - bare).abs().max() > 1e-2
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
        stays = {
            item.rpartition(".")[0] for item, _ in model.named_modules() if item.endswith("grown")
        }
        # What is tied stays apart, and nothing else does.
        assert {item.rpartition(".")[2] for item in stays} <= {
            "lm_head",
            "wte",
            "decoder",
            "embed_tokens",
        }
        assert stays
