"""What the callbacks of all training frameworks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import esper_fn as ef
from esper_fn.commands import Command
from esper_fn.lifecycle import Stage
from torch_bridge._errors import BridgeError


class Pace:
    """Calls a bridge once for each step of the optimiser, and surveys now and then.

    Args:
      bridge: from `torch_bridge.grow`.
      survey: returns the loss on held-out data, as `bridge.survey` wants it; None for no surveys.
      survey_every: optimiser steps between two surveys.
    """

    def __init__(
        self, bridge: Any, survey: Callable[[], torch.Tensor] | None, survey_every: int
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
        """Hand commands to the next step; see `esper_fn.commands`."""
        self._commands += commands

    def add(self, loss: torch.Tensor) -> None:
        """Take the share of one micro-batch in the step's loss."""
        self._losses.append(loss.detach())

    def step(self, number: int) -> None:
        """Advance every seed; `number` counts the optimiser's steps from 1."""
        if not self._losses:
            raise BridgeError(
                f"the optimiser has made step {number} and no loss was seen; return the loss from "
                "the training step"
            )
        loss = torch.stack(self._losses).sum()
        commands = tuple(self._commands)
        self._losses.clear()
        self._commands.clear()
        self.last_info = self.bridge.step(loss, commands)
        if self._survey is not None and number % self._survey_every == 0:
            self.last_survey = self.bridge.survey(self._survey)

    def forget(self) -> None:
        """Drop what an interrupted step left behind."""
        self._losses.clear()

    def counts(self) -> dict[str, float]:
        """Adapters at work and seeds kept, for a logger."""
        stages = self.bridge.stages
        return {
            "growth/live": float(self.bridge.num_live),
            "growth/fossils": float((stages == Stage.FOSSILIZED).sum()),
        }
