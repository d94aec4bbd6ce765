"""Growing inside a real Lightning `Trainer`."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from short_lives import GROWN, differences, one_thread, options  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import esper_fn as ef  # noqa: E402
import torch_bridge  # noqa: E402
from torch_bridge.lightning import GrowthCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*mid-epoch checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data():
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    return torch.utils.data.TensorDataset(x, y)


def survey_of(module, data):
    x, y = data.tensors
    return lambda: cross_entropy(module.net(x), y)


def fit(data, folder, max_steps, ckpt_path=None, **settings_):
    module = Classifier()
    bridge = torch_bridge.grow(module, targets="net.0", **options())
    growth = GrowthCallback(bridge, survey=survey_of(module, data), survey_every=3)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        callbacks=[
            ModelCheckpoint(
                dirpath=folder / "saved", filename="{step}", every_n_train_steps=12, save_top_k=-1
            ),
            growth,
        ],
        **settings_,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=ckpt_path)
    return module, bridge, growth, trainer


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit(data, folder, 24)


def test_it_grows_once_for_each_step_of_the_optimiser(whole):
    _, _, bridge, growth, trainer = whole
    assert int(bridge.state.step) == trainer.global_step == 24
    assert GROWN & {ef.Stage(stage) for stage in bridge.stages}
    assert growth.last_info is not None
    assert growth.last_survey is not None
    assert trainer.logged_metrics["growth/live"] == bridge.num_live > 0


def test_it_does_what_a_plain_loop_does(whole, data):
    _, module, *_ = whole
    plain = Classifier()
    bridge = torch_bridge.grow(plain, targets="net.0", **options())
    survey, optimizer = survey_of(plain, data), plain.configure_optimizers()
    batches = list(torch.utils.data.DataLoader(data, batch_size=16))
    for step in range(24):
        losses = []
        for batch in (batches[(2 * step) % 8], batches[(2 * step + 1) % 8]):
            loss = plain.training_step(batch, 0) / 2
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        bridge.step(torch.stack(losses).sum())
        if (step + 1) % 3 == 0:
            bridge.survey(survey)
    assert not differences(module.state_dict(), plain.state_dict())


def test_a_resumed_run_ends_like_a_whole_one(whole, data, tmp_path):
    folder, module, bridge, _, trainer = whole
    (middle,) = (folder / "saved").glob("*step=12*.ckpt")
    again, resumed, _, other = fit(data, tmp_path, 24, ckpt_path=middle)
    assert not differences(module.state_dict(), again.state_dict())
    assert resumed.stages.tolist() == bridge.stages.tolist()
    ours, theirs = (t.optimizers[0].state_dict()["state"] for t in (trainer, other))
    assert ours.keys() == theirs.keys()
    for key, moments in ours.items():
        assert not differences(moments, theirs[key])


def test_it_grows_in_mixed_precision(whole, data, tmp_path):
    _, _, wide, *_ = whole
    module, bridge, *_ = fit(data, tmp_path, 24, precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert int(bridge.state.step) == 24
    assert GROWN & {ef.Stage(stage) for stage in bridge.stages}
    ours, theirs = (item.state.seeds.telemetry.gradient_norm.tolist() for item in (bridge, wide))
    assert ours == pytest.approx(theirs, rel=0.3, abs=1e-3)


def test_commands_reach_the_next_step(data, tmp_path):
    module = Classifier()
    bridge = torch_bridge.grow(
        module, targets="net.0", **{**options(), "policy": ef.policies.never()}
    )
    growth = GrowthCallback(bridge)
    growth.send(ef.commands.germinate(2, "low_rank"))
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[growth],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    assert [stage != ef.Stage.DORMANT for stage in bridge.stages] == [False, False, True, False]

    other = GrowthCallback(bridge)
    trainer.callbacks.append(other)
    with pytest.raises(torch_bridge.BridgeError, match="no part of the Classifier"):
        other.on_fit_start(trainer, Classifier())


def test_bad_arguments_are_named():
    with pytest.raises(torch_bridge.BridgeError, match=r"what torch_bridge\.grow returned"):
        GrowthCallback(nn.Linear(2, 2))
    bridge = torch_bridge.grow(Classifier(), targets="net.0", **options())
    with pytest.raises(torch_bridge.BridgeError, match="survey is a int"):
        GrowthCallback(bridge, survey=3)
    with pytest.raises(torch_bridge.BridgeError, match="survey_every is 0"):
        GrowthCallback(bridge, survey_every=0)
