"""What the callbacks of all training frameworks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import esper_fn as ef
from esper_fn.commands import Command
from esper_fn.lifecycle import Stage
from torch_bridge._errors import BridgeError


class BridgeCallback:
    """Calls a bridge once for each step of the optimiser, and surveys now and then.

    Args:
      bridge: from `torch_bridge.grow`.
      survey: returns the loss on held-out data, as `bridge.survey` wants it; None for no surveys.
      survey_every: optimiser steps between two surveys.

    Attributes:
      bridge: the bridge.
      last_info: of the last step, an `esper_fn.StepInfo`.
      last_survey: of the last survey, an `esper_fn.SurveyInfo`.
    """

    def __init__(
        self,
        bridge: Any,
        *,
        survey: Callable[[], torch.Tensor] | None = None,
        survey_every: int = 50,
    ) -> None:
        if not all(hasattr(bridge, name) for name in ("step", "survey", "state")):
            raise BridgeError(
                f"bridge is a {type(bridge).__name__}; it must be what torch_bridge.grow returned"
            )
        if survey is not None and not callable(survey):
            raise BridgeError(
                f"survey is a {type(survey).__name__}; it must be None or a function without "
                "arguments that returns the loss on held-out data"
            )
        if survey_every < 1:
            raise BridgeError(f"survey_every is {survey_every}; it must be at least 1")
        self.bridge, self._survey, self._survey_every = bridge, survey, survey_every
        self._losses: list[torch.Tensor] = []
        self._commands: list[Command] = []
        self.last_info: ef.StepInfo | None = None
        self.last_survey: ef.SurveyInfo | None = None

    def send(self, *commands: Command) -> None:
        """Hand commands to the next step.

        Args:
          *commands: from `esper_fn.commands`.
        """
        self._commands += commands

    def _check_part(self, model: torch.nn.Module, remedy: str) -> None:
        if not any(part is self.bridge.model for part in model.modules()):
            raise BridgeError(
                f"the bridge grows a {type(self.bridge.model).__name__} that is no part of the "
                f"{type(model).__name__} being trained; {remedy}"
            )

    def _begin(self, optimizers: list[Any], scaler: Any) -> None:
        """Drops what an interrupted run left behind, and learns what scales the loss."""
        self._losses.clear()
        if scaler is not None:
            for optimizer in optimizers:
                self.bridge.attach(optimizer, scaler)

    def _step(self, number: int) -> None:
        """Advances every seed; `number` counts the optimiser's steps from 1."""
        if not self._losses:
            raise BridgeError(
                f"the optimiser has made step {number} and no loss was seen; return the loss from "
                "the training step"
            )
        losses, self._losses = self._losses, []
        commands, self._commands = self._commands, []
        self.last_info = self.bridge.step(torch.stack(losses).sum(), commands)
        if self._survey is not None and number % self._survey_every == 0:
            self.last_survey = self.bridge.survey(self._survey)

    def _counts(self) -> dict[str, float]:
        """Adapters at work and seeds kept, for a logger."""
        return {
            "growth/live": float(self.bridge.num_live),
            "growth/fossils": float((self.bridge.stages == Stage.FOSSILIZED).sum()),
        }
