"""`unwrap` changes no output, whoever else reads a target's weight, and however it is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from living import enliven, quiet
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_bridge

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
        for name, of in others.items():
            self.add_module(name, of)
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


class Reading(nn.Module):
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
    "read by the model": (Reading, TOKENS, "table", nothing),
    "read by a method": (Asking, TOKENS, "words", nothing),
    "read in a loop": (Layers, X, "layers.0", nothing),
    "read by a list": (lambda: First(nn.Linear(6, 8), nn.Tanh()), X, "0", nothing),
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


def unwrapped(
    bridge: torch_bridge.Bridge, model: nn.Module, x: torch.Tensor, bare: torch.Tensor
) -> None:
    """The bodies act, and the outputs stay."""
    with torch.no_grad():
        wanted = model(x)
        assert (wanted - bare).abs().max() > 1e-2
        bridge.unwrap()
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert not any(name.endswith("seeds") for name, _ in model.named_modules())


class Zoo(nn.Module):
    """Many models as one, as a bridge takes longer to make than a model."""

    def __init__(self, models: dict[str, nn.Module], inputs: dict[str, Any]) -> None:
        super().__init__()
        self.models, self.inputs = nn.ModuleDict(models), inputs

    def forward(self) -> dict[str, torch.Tensor]:
        found = {name: self.models[name](**of) for name, of in self.inputs.items()}
        return {name: getattr(of, "logits", of) for name, of in found.items()}


Outputs = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def outputs(zoo: Zoo, targets: list[str], later: Callable[[], None]) -> Outputs:
    """Of each model: as the host has it, grown, and unwrapped."""
    bridge = quiet(zoo.eval(), targets)
    enliven(bridge, noise=0.0)
    later()
    with torch.no_grad():
        zoo()
        bare = zoo()
        enliven(bridge, noise=0.6)
        wanted = zoo()
        bridge.unwrap()
        found = zoo()
    return {name: (bare[name], wanted[name], found[name]) for name in bare}


@pytest.fixture(scope="module")
def of_all() -> Outputs:
    torch.manual_seed(0)
    models = {name: make() for name, (make, _, _, _) in MODELS.items()}
    # Each forward's argument is called `x`, but for that of `nn.Sequential` and of lambdas.
    zoo = Zoo(models, {name: {_argument(models[name]): x} for name, (_, x, _, _) in MODELS.items()})
    targets = [f"models.{name}.{target}" for name, (_, _, target, _) in MODELS.items()]
    laters = [(later, models[name]) for name, (_, _, _, later) in MODELS.items()]
    return outputs(zoo, targets, lambda: [later(of) for later, of in laters] and None)


def _argument(model: nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters))


@pytest.mark.parametrize("name", MODELS)
def test_unwrapping_leaves_the_outputs(of_all: Outputs, name: str) -> None:
    bare, wanted, found = of_all[name]
    assert (wanted - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


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
def test_bodies_below_the_step_of_the_weight_stay(dtype: torch.dtype, noise: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(8, 6))
    bridge = quiet(model, "0")
    enliven(bridge, noise=noise)
    # Features that cancel: their sum is small, and what the bodies add to it is seen.
    x = 100 * torch.eye(6, dtype=dtype)
    with torch.no_grad():
        wanted = model(x)
        bridge.unwrap()
        assert torch.equal(model(x), wanted)
    assert any(name.endswith("grown") for name, _ in model.named_modules())


def test_a_weight_of_16_bits_takes_what_it_can_show() -> None:
    model = nn.Sequential(nn.Linear(6, 8)).to(torch.bfloat16)
    bridge = quiet(model, "0")
    enliven(bridge, noise=0.7)
    x = X.to(torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        bridge.unwrap()
        torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_a_body_that_broke_reaches_nothing_afterwards_either() -> None:
    model = Net()
    bridge = quiet(model, "fc")
    bare = model(X)
    enliven(bridge, noise=0.0)
    with torch.no_grad():
        for p in bridge.body_parameters():
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


def test_a_private_weight_is_still_folded() -> None:
    """What the tests above hold back must not hold back everything."""
    model = Net()
    names = list(model.state_dict())
    bridge = quiet(model, ["fc", "out"], chunks=1)
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
    models = {
        "gpt2": hugging.GPT2LMHeadModel(gpt2),
        "bert": hugging.BertForMaskedLM(bert),
        "t5": hugging.T5ForConditionalGeneration(t5),
    }
    one = {"input_ids": TOKENS}
    zoo = Zoo(models, {"gpt2": one, "bert": one, "t5": {**one, "decoder_input_ids": TOKENS}})
    targets = ["gpt2.lm_head", "wte", "predictions.decoder", "t5.lm_head", "decoder.embed_tokens"]
    for name, (bare, wanted, found) in outputs(zoo, targets, lambda: None).items():
        assert (wanted - bare).abs().max() > 1e-2, name
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
