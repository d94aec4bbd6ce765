"""Growing inside a Lightning `Trainer`. Needs `lightning`."""

from __future__ import annotations

from typing import Any

import torch

from torch_bridge._callback import BridgeCallback

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "torch_bridge.lightning needs Lightning 2.5 or newer: pip install lightning"
    ) from error


__all__ = ["GrowthCallback"]


class GrowthCallback(BridgeCallback, Callback):  # type: ignore[misc]
    """Advances the seeds after every optimiser step of a Lightning `Trainer`.

    Works with gradient accumulation, clipping and precision plugins; the loss it passes to the
    bridge is the mean over the accumulated batches. Checkpoints need nothing more: the lifecycle is
    part of the module's state dict, so `fit(..., ckpt_path=...)` restores stages, adapters and
    optimiser state. It logs `growth/live` and `growth/fossils` where the trainer logs.

    With manual optimisation, return the step's loss from `training_step` as `{"loss": loss}`, and
    let the adapters' optimiser step at most once a batch.

    Args:
      bridge: from `torch_bridge.grow`, on the `LightningModule` or on a model inside it, made
        before `configure_optimizers` runs.
      survey: returns the loss on held-out data, as `bridge.survey` wants it; None for no surveys.
        The module is in training mode when it is called.
      survey_every: optimiser steps between two surveys.

    Attributes:
      last_info: of the last step, an `esper_fn.StepInfo`.
      last_survey: of the last survey.

    Raises:
      BridgeError: for arguments that do not fit, for a bridge of another model, and when a step
        returned no loss.

    Example:
      >>> bridge = torch_bridge.grow(module, targets="all-linear", ...)  # doctest: +SKIP
      >>> trainer = Trainer(callbacks=[GrowthCallback(bridge)])  # doctest: +SKIP
      >>> trainer.fit(module, batches)  # doctest: +SKIP
    """

    _num_steps = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the module holds the model that grows."""
        self._check_part(pl_module, "call torch_bridge.grow on it")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin at the step the trainer begins at, and learn what scales the loss."""
        self._num_steps = trainer.global_step
        self._begin(trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss; after an optimiser step, advance the seeds."""
        loss = outputs if isinstance(outputs, torch.Tensor) else (outputs or {}).get("loss")
        if loss is not None:
            # Lightning has divided it by the number of accumulated batches.
            self._losses.append(loss.detach())
        if trainer.global_step == self._num_steps:
            return
        self._num_steps = trainer.global_step
        self._step(self._num_steps)
        if trainer.logger is not None:
            pl_module.log_dict(self._counts())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the losses of a step that was not finished."""
        self._losses.clear()
