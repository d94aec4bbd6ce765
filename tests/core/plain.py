"""What bodies compute, written again in plain NumPy: the definition that the code is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Params = Mapping[str, Any]


def relu(x: Any) -> Any:
    return x * (x > 0)


def silu(x: Any, xp: Any = np) -> Any:
    return x / (1 + xp.exp(-x))


def gelu(x: Any, xp: Any = np) -> Any:
    return x * (1 + xp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x))) / 2


def noop(p: Params, x: Any, xp: Any = np) -> Any:
    return 0 * x


def scale_shift(p: Params, x: Any, xp: Any = np) -> Any:
    return x * p["scale"] + p["shift"]


def low_rank(p: Params, x: Any, xp: Any = np) -> Any:
    return (x @ p["down"]) @ p["up"]


def bottleneck_relu(p: Params, x: Any, xp: Any = np) -> Any:
    return relu(x @ p["down"] + p["bias"]) @ p["up"]


def bottleneck_gelu(p: Params, x: Any, xp: Any = np) -> Any:
    return gelu(x @ p["down"] + p["bias"], xp) @ p["up"]


def bottleneck_silu(p: Params, x: Any, xp: Any = np) -> Any:
    return silu(x @ p["down"] + p["bias"], xp) @ p["up"]


def gated(p: Params, x: Any, xp: Any = np) -> Any:
    return (silu(x @ p["gate"], xp) * (x @ p["value"])) @ p["up"]


def normalised(p: Params, x: Any, xp: Any = np) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    normal = (x - mean) / xp.sqrt(variance + 1e-5)
    return gelu(normal @ p["down"] + p["bias"], xp) @ p["up"]


DENSE: dict[str, Callable[..., Any]] = {
    "noop": noop,
    "scale_shift": scale_shift,
    "low_rank": low_rank,
    "relu": bottleneck_relu,
    "gelu": bottleneck_gelu,
    "silu": bottleneck_silu,
    "gated": gated,
    "normalised": normalised,
}
"""Body by the name that `dense_blueprints` gives its blueprint."""


def cut(params: Params, inputs: int, outputs: int) -> dict[str, Any]:
    """The parameters of a body as those of a narrower chunk: rows and columns of padding left out.

    Only for the dense bodies above, whose parameter names tell which axis is which.
    """
    sliced = {}
    for name, value in params.items():
        if name in ("down", "gate", "value"):
            value = value[:inputs]  # noqa: PLW2901
        elif name in ("up", "scale", "shift"):
            value = value[..., :outputs]  # noqa: PLW2901
        sliced[name] = value
    return sliced
