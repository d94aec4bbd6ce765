"""What `unwrap` gives back can be exported: torch.export and ONNX."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import esper_fn as ef  # noqa: E402
import torch_bridge  # noqa: E402
from esper_fn.lifecycle import Stage  # noqa: E402

# Of torch's own exporters.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*symbolic_shapes"),
]


BLUEPRINTS = ["low_rank", "mlp"]
ORDERS = {
    1: Stage.TRAINING,
    6: Stage.GRAFTING,
    12: Stage.STABILIZATION,
    13: Stage.EVALUATING,
    14: Stage.FINE_TUNING,
    17: Stage.FOSSILIZED,
}


class Block(nn.Module):
    """Returns a tuple, as the blocks of a transformer may."""

    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.fc(x)), None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * 36, 10)  # in 4 chunks of unequal width
        self.block = Block(10)
        self.out = nn.Linear(10, 4)

    def forward(self, x):
        h = torch.relu(self.conv(x)).flatten(1)
        return self.out(self.block(torch.relu(self.hidden(h)))[0])


@pytest.fixture(scope="module")
def grown():
    """An unwrapped model with folded and unfolded fossils in all three places."""
    torch.manual_seed(0)
    model = Net()
    bridge = torch_bridge.grow(
        model,
        targets=["conv", "hidden", "block"],
        features={"block": 10},
        chunks=4,
        blueprints={
            "low_rank": ef.blueprints.low_rank(rank=2),
            "mlp": ef.blueprints.bottleneck(width=4),
        },
        capacity=1,
        policy=ef.policies.never(),
        graft=ef.grafting.linear(num_steps=4),
        settings=ef.lifecycle.settings(max_training=6),
        verbose=False,
    )
    seeds = {4 * site + chunk: BLUEPRINTS[chunk] for site in range(3) for chunk in range(2)}
    orders = {0: [ef.commands.germinate(*requests) for requests in seeds.items()]} | {
        step: [ef.commands.transition(seed, stage) for seed in seeds]
        for step, stage in ORDERS.items()
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = torch.randn(16, 1, 6, 6), torch.arange(16) % 4
    for step in range(max(ORDERS) + 1):
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bridge.step(loss, orders.get(step, ()))
    assert (bridge.stages == Stage.FOSSILIZED).sum() == len(seeds), bridge.stages
    model.eval()
    with torch.no_grad():
        wrapped = model(x)
    plain = bridge.unwrap()
    return plain, x, wrapped


def test_unwrapping_changes_no_output(grown):
    plain, x, wrapped = grown
    names = dict(plain.named_modules())
    assert not [name for name in names if name.endswith("seeds")]
    assert [name for name in names if name.endswith("grown")] == [
        "conv.grown",
        "hidden.grown",
        "block.grown",
    ]
    torch.testing.assert_close(plain(x), wrapped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_strict", [False, True], ids=["lax", "strict"])
def test_torch_export(grown, is_strict):
    plain, x, _ = grown
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: batch},), strict=is_strict)
    for count in (16, 3):
        torch.testing.assert_close(
            program.module()(x[:count]), plain(x[:count]), rtol=1e-6, atol=1e-6
        )


def test_an_exported_program_is_saved_and_loaded(grown, tmp_path):
    plain, x, _ = grown
    torch.export.save(torch.export.export(plain, (x,)), tmp_path / "grown.pt2")
    loaded = torch.export.load(tmp_path / "grown.pt2").module()
    torch.testing.assert_close(loaded(x), plain(x), rtol=1e-6, atol=1e-6)


def test_onnx(grown, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    plain, x, _ = grown
    batch = torch.export.Dim("batch", min=1)
    path = tmp_path / "grown.onnx"
    torch.onnx.export(plain, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (16, 5):
        (results,) = session.run(None, {session.get_inputs()[0].name: x[:count].numpy()})
        np.testing.assert_allclose(results, plain(x[:count]).detach(), rtol=1e-4, atol=1e-5)
