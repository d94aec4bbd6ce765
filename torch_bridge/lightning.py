"""Growing inside a Lightning `Trainer`. Needs `lightning`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from esper_fn.commands import Command
from torch_bridge._callback import Pace
from torch_bridge._errors import BridgeError

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "torch_bridge.lightning needs Lightning 2.5 or newer: pip install lightning"
    ) from error


class GrowthCallback(Callback):  # type: ignore[misc]
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

    def __init__(
        self,
        bridge: Any,
        *,
        survey: Callable[[], torch.Tensor] | None = None,
        survey_every: int = 50,
    ) -> None:
        super().__init__()
        self._pace = Pace(bridge, survey, survey_every)
        self._num_steps = 0

    @property
    def bridge(self) -> Any:
        """What `torch_bridge.grow` returned."""
        return self._pace.bridge

    @property
    def last_info(self) -> Any:
        """The `esper_fn.StepInfo` of the last step."""
        return self._pace.last_info

    @property
    def last_survey(self) -> Any:
        """The `esper_fn.SurveyInfo` of the last survey."""
        return self._pace.last_survey

    def send(self, *commands: Command) -> None:
        """Hand commands to the next step; see `esper_fn.commands`."""
        self._pace.send(*commands)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the module holds the model that grows."""
        if not any(part is self.bridge.model for part in pl_module.modules()):
            raise BridgeError(
                f"the bridge grows a {type(self.bridge.model).__name__} that is no part of the "
                f"{type(pl_module).__name__} being fitted; call torch_bridge.grow on it"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin at the step the trainer begins at, and learn what scales the loss."""
        self._pace.forget()
        self._num_steps = trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            for optimizer in trainer.optimizers:
                self.bridge.attach(optimizer, scaler)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss; after an optimiser step, advance the seeds."""
        loss = outputs if isinstance(outputs, torch.Tensor) else (outputs or {}).get("loss")
        if loss is not None:
            # Lightning has divided it by the number of accumulated batches.
            self._pace.add(loss)
        if trainer.global_step == self._num_steps:
            return
        self._num_steps = trainer.global_step
        self._pace.step(self._num_steps)
        if trainer.logger is not None:
            pl_module.log_dict(self._pace.counts())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the losses of a step that was not finished."""
        self._pace.forget()
