"""Growing inside the Hugging Face `Trainer`. Needs `transformers` and `accelerate`."""

from __future__ import annotations

from typing import Any

from torch_bridge._callback import BridgeCallback
from torch_bridge._errors import BridgeError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "torch_bridge.transformers needs transformers 5 or newer: "
        "pip install transformers accelerate"
    ) from error


__all__ = ["GrowthCallback"]


class GrowthCallback(BridgeCallback, TrainerCallback):  # type: ignore[misc]
    """Advances the seeds after every optimiser step of a Hugging Face `Trainer`.

    The `Trainer` shows callbacks no loss, so this one is given to it by `attach`, which also reads
    what `training_step` returns: right under gradient accumulation, label smoothing and a
    `compute_loss` of your own. Checkpoints need nothing more: the lifecycle is part of the model's
    state dict, so `train(resume_from_checkpoint=...)` restores stages, adapters and optimiser
    state. Logs get `growth/live` and `growth/fossils`.

    Args:
      bridge: from `torch_bridge.grow`, on the trainer's model or a part of it, made before the
        optimiser.
      survey: returns the loss on held-out data, as `bridge.survey` wants it; None for no surveys.
        The model is in training mode when it is called.
      survey_every: optimiser steps between two surveys.

    Raises:
      BridgeError: for arguments that do not fit, for a bridge of another model, and in `train` if
        `attach` was not called.

    Example:
      >>> bridge = torch_bridge.grow(model, targets="all-linear", ...)  # doctest: +SKIP
      >>> trainer = Trainer(model, arguments, train_dataset=data)  # doctest: +SKIP
      >>> growth = GrowthCallback(bridge).attach(trainer)  # doctest: +SKIP
      >>> trainer.train()  # doctest: +SKIP
    """

    _trainer: Any = None

    def attach(self, trainer: Any) -> GrowthCallback:
        """Add this callback to a trainer and read its losses; call it once, before `train`.

        Args:
          trainer: a `transformers.Trainer` of the model that grows.

        Returns:
          This callback.

        Raises:
          BridgeError: it is attached already, or the bridge grows another model.
        """
        if self._trainer is not None:
            raise BridgeError(
                "this GrowthCallback is attached to a trainer already; make another one"
            )
        self._check_part(
            trainer.model,
            "call torch_bridge.grow on that one (Trainer(model_init=...) makes a new model each "
            "time: give it model= instead)",
        )
        self._trainer = trainer
        training_step = trainer.training_step

        def reading_step(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self._losses.append(loss.detach())  # divided so that a step's losses add up
            return loss

        trainer.training_step = reading_step
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that losses will be seen, and learn what scales them."""
        if self._trainer is None:
            raise BridgeError(
                "GrowthCallback sees no loss through callbacks=[...] alone; call "
                "growth.attach(trainer) instead, before train()"
            )
        optimizer = kwargs.get("optimizer")
        optimizers = [] if optimizer is None else [getattr(optimizer, "optimizer", optimizer)]
        self._begin(optimizers, getattr(self._trainer.accelerator, "scaler", None))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the seeds."""
        self._step(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the numbers of adapters to what is logged."""
        if logs is not None and "loss" in logs:
            logs.update(self._counts())
            if state.log_history:
                state.log_history[-1].update(self._counts())
