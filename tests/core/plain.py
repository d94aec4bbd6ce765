"""What adapters compute, written again in plain NumPy: the definition that the code is held to.

Every operation rounds to the dtype of `x`: float64 gives the truth, `ml_dtypes.bfloat16` a plain
implementation in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Params = Mapping[str, np.ndarray]
Adapter = Callable[[Params, np.ndarray], np.ndarray]


def dot(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (x @ weights).astype(x.dtype)


def relu(x: np.ndarray) -> np.ndarray:
    return x * (x > 0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    number = x.dtype.type
    inner = number((2 / np.pi) ** 0.5) * (x + number(0.044715) * x * x * x)
    return x * (number(1) + np.tanh(inner)) / number(2)


def noop(p: Params, x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x)


def scale_shift(p: Params, x: np.ndarray) -> np.ndarray:
    return x * p["scale"] + p["shift"]


def low_rank(p: Params, x: np.ndarray) -> np.ndarray:
    return dot(dot(x, p["down"]), p["up"])


def bottleneck(phi: Callable[[np.ndarray], np.ndarray]) -> Adapter:
    def adapter(p: Params, x: np.ndarray) -> np.ndarray:
        return dot(phi(dot(x, p["down"]) + p["bias"]), p["up"])

    return adapter


def gated(p: Params, x: np.ndarray) -> np.ndarray:
    return dot(silu(dot(x, p["gate"])) * dot(x, p["down"]), p["up"])


def normalised(p: Params, x: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    normal = (x - mean) / np.sqrt(variance + x.dtype.type(1e-5))
    return dot(gelu(dot(normal, p["down"]) + p["bias"]), p["up"])


DENSE: dict[str, Adapter] = {
    "noop": noop,
    "scale_shift": scale_shift,
    "low_rank": low_rank,
    "relu": bottleneck(relu),
    "gelu": bottleneck(gelu),
    "silu": bottleneck(silu),
    "gated": gated,
    "normalised": normalised,
}


def cut(params: Params, inputs: int, outputs: int) -> dict[str, Any]:
    """The parameters of a dense adapter as those of a narrower chunk, the padding left out."""
    rows, columns = ("down", "gate"), ("up", "scale", "shift")
    return {
        name: value[:inputs] if name in rows else value[..., :outputs] if name in columns else value
        for name, value in params.items()
    }
