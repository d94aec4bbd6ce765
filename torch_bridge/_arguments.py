"""What `Bridge.step` and `Bridge.survey` are called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from esper_fn.commands import Command
from torch_bridge._errors import BridgeError


def check_step(loss: Any, commands: Any) -> None:
    """Holds `step(loss, commands)` to its types.

    Raises:
      BridgeError: says which argument it is and what to pass.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise BridgeError(
                f"loss must be one number, got a tensor of shape {tuple(loss.shape)}; pass the "
                "mean: bridge.step(loss.mean())"
            )
    elif not hasattr(loss, "__float__") or isinstance(loss, bool):
        raise BridgeError(
            f"loss must be a tensor or a number, got {_name(loss)}; call "
            "bridge.step(loss, [command, ...])"
        )
    if isinstance(commands, Command):
        raise BridgeError("commands must be a list of commands, got one; pass [command]")
    if not isinstance(commands, Sequence) or isinstance(commands, (str, bytes)):
        raise BridgeError(
            f"commands must be a list of commands, got {_name(commands)}; call "
            "bridge.step(loss, [command, ...])"
        )
    for command in commands:
        if not isinstance(command, Command):
            raise BridgeError(
                f"commands must hold what esper_fn.commands makes, got {_name(command)}; say "
                "[ef.commands.germinate(seed, blueprint), ...]"
            )


def check_survey(closure: Any) -> None:
    """Holds `survey(closure)` to a function.

    Raises:
      BridgeError: for anything else.
    """
    if not callable(closure) or isinstance(closure, Tensor):
        raise BridgeError(
            f"closure must be a function without arguments that returns the loss on held-out data, "
            f"got {_name(closure)}; say bridge.survey(lambda: loss_fn(model, held_out))"
        )


def _name(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str) else f"a {type(value).__name__}"
