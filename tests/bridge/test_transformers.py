"""Growing inside a real Hugging Face `Trainer`, without a network."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from short_lives import GROWN, differences, one_thread, options  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

import esper_fn as ef  # noqa: E402
import torch_bridge  # noqa: E402
from torch_bridge.transformers import GrowthCallback  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _offline_in_one_thread():
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


ROWS = torch.arange(64)[:, None] % 7 + torch.arange(16)[None]
DATA = [{"input_ids": row % 17, "labels": row % 17} for row in ROWS]


def model_of(**settings_):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **settings_,
    )
    return GPT2LMHeadModel(config)


def arguments(folder, **settings_):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        save_steps=12,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings_,
    )


def prepare(folder, **settings_):
    model = model_of()
    block = "transformer.h.1"
    bridge = torch_bridge.grow(model, targets=block, features={block: 32}, **options())
    batch = {name: torch.stack([row[name] for row in DATA[:8]]) for name in DATA[0]}
    trainer = Trainer(model, arguments(folder, max_steps=24, **settings_), train_dataset=DATA)
    growth = GrowthCallback(bridge, survey=lambda: model(**batch).loss, survey_every=3)
    return bridge, growth, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    bridge, growth, trainer = prepare(folder)
    settings_ = []
    step = bridge.step
    bridge.step = lambda loss, commands=(): (settings_.append(float(loss)), step(loss, commands))[1]
    growth.attach(trainer)
    trainer.train()
    return folder, bridge, growth, trainer, settings_


def test_it_grows_once_for_each_step_of_the_optimiser(whole):
    _, bridge, growth, trainer, _ = whole
    assert int(bridge.state.step) == trainer.state.global_step == 24
    assert GROWN & {ef.Stage(stage) for stage in bridge.stages}
    assert growth.last_info is not None
    assert growth.last_survey is not None


def test_it_tells_the_loss_that_the_trainer_logs(whole):
    _, bridge, _, trainer, settings_ = whole
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(settings_) == 24
    assert len(logs) == 6
    for number, log in enumerate(logs):
        mean = sum(settings_[4 * number : 4 * number + 4]) / 4
        assert log["loss"] == pytest.approx(mean, rel=1e-5)
    assert logs[-1]["growth/live"] == bridge.num_live > 0


def test_a_resumed_run_ends_like_a_whole_one(whole):
    folder, bridge, _, trainer, _ = whole
    resumed, growth, again = prepare(folder, save_strategy="no")
    growth.attach(again)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    assert not differences(trainer.model.state_dict(), again.model.state_dict())
    assert resumed.stages.tolist() == bridge.stages.tolist()
    assert int(resumed.state.step) == 24


def test_it_grows_in_mixed_precision(whole, tmp_path):
    _, _, _, trainer, _ = whole
    bridge, growth, narrow = prepare(tmp_path, bf16=True, save_strategy="no")
    growth.attach(narrow)
    narrow.train()
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}
    assert int(bridge.state.step) == 24
    assert GROWN & {ef.Stage(stage) for stage in bridge.stages}
    ours, theirs = (
        [log["loss"] for log in item.state.log_history if "loss" in log]
        for item in (narrow, trainer)
    )
    assert ours == pytest.approx(theirs, rel=0.05)


def test_a_saved_model_loads_into_a_freshly_grown_one(whole):
    folder, bridge, _, trainer, _ = whole
    files = list((folder / "checkpoint-24").glob("*.safetensors"))
    assert files, "the checkpoint is not in safetensors"
    fresh, _, _ = prepare(folder)
    from safetensors.torch import load_file

    missing, unexpected = fresh.model.load_state_dict(load_file(files[0]), strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"]  # tied to the embedding
    assert fresh.stages.tolist() == bridge.stages.tolist()
    assert not differences(fresh.model.state_dict(), trainer.model.state_dict())


def test_a_callback_that_cannot_see_losses_says_so(tmp_path):
    _, growth, trainer = prepare(tmp_path)
    trainer.add_callback(growth)
    with pytest.raises(torch_bridge.BridgeError, match=r"attach\(trainer\)"):
        trainer.train()
    other = Trainer(model_of(), arguments(tmp_path, max_steps=1), train_dataset=DATA)
    with pytest.raises(torch_bridge.BridgeError, match="no part of the GPT2"):
        growth.attach(other)
    growth.attach(trainer)
    with pytest.raises(torch_bridge.BridgeError, match="attached to a trainer already"):
        growth.attach(trainer)
    assert trainer.callback_handler.callbacks.count(growth) == 1
