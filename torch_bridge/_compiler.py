"""How `torch.compile` distinguishes a grown layer from a bare one."""

from __future__ import annotations

from typing import Any

from torch import nn


class GrownParameters(dict[str, Any]):
    """The parameters of a target, in a dict of another type than a bare layer's.

    Compilers do not look at hooks: they would go on running what they compiled of a model before
    it grew, or of a bare one of its class. But they do compare the types of what a program reads.
    """


def mark(module: nn.Module) -> None:
    """Keeps programs for the bare module from serving it."""
    module._parameters = GrownParameters(module._parameters)


def unmark(module: nn.Module) -> None:
    """Undoes `mark`."""
    module._parameters = dict(module._parameters)
