"""What each rank of a group runs: a grown model under a trainer of another package.

`python callback_ranks.py lightning|transformers FOLDER`, with the environment that `torchrun` sets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from short_lives import options

import torch_bridge

STEPS = 20


def lightning(folder: Path, note: Callable[[Any], None]) -> torch_bridge.Bridge:
    """A classifier under Lightning's `Trainer`."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from torch_bridge.lightning import GrowthCallback

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
            )

        def training_step(self, batch: Any, _: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    class Noting(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            note(bridge)

    module = Classifier()
    bridge = torch_bridge.grow(module, targets="net.0", **options())
    x = torch.randn(128, 8)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 2] > 0).long()

    def survey() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module.net(x), y)

    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GrowthCallback(bridge, survey=survey, survey_every=3), Noting()],
    )
    data = torch.utils.data.TensorDataset(x, y)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    return bridge


def transformers(folder: Path, note: Callable[[Any], None]) -> torch_bridge.Bridge:
    """A decoder under the Hugging Face `Trainer`."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    from transformers import TrainerCallback as Callback

    from torch_bridge.transformers import GrowthCallback

    class Noting(Callback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            note(bridge)

    config = GPT2Config(
        vocab_size=17,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    block = "transformer.h.1"
    bridge = torch_bridge.grow(model, targets=block, features={block: 32}, **options())
    rows = torch.arange(64)[:, None] % 7 + torch.arange(16)[None]
    data = [{"input_ids": row % 17, "labels": row % 17} for row in rows]
    batch = {name: torch.stack([row[name] for row in data[:8]]) for name in data[0]}
    settings_ = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, settings_, train_dataset=data)
    growth = GrowthCallback(bridge, survey=lambda: model(**batch).loss, survey_every=3)
    growth.attach(trainer)
    trainer.add_callback(Noting())
    trainer.train()
    return bridge


def main(framework: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stages: list[Any] = []
    run = {"lightning": lightning, "transformers": transformers}[framework]
    bridge = run(folder, lambda bridge: stages.append(bridge.stages))
    assert torch.distributed.get_world_size() == 2
    adapters = torch.cat([p.detach().flatten() for p in bridge.adapter_parameters()]).numpy()
    np.savez(folder / f"{os.environ['RANK']}.npz", stages=stages, adapters=adapters)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
