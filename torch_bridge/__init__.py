"""Grow PyTorch models with the same pure functions.

What stands so far: values, functions and modules cross between torch and JAX.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_bridge needs PyTorch 2.11 or newer: pip install 'esper-fn[torch]'"
    ) from error

from torch_bridge._convert import (
    JaxModule,
    TorchFunction,
    from_torch,
    to_torch,
    tree_to_jax,
    tree_to_torch,
)
from torch_bridge._errors import BridgeError

__all__ = [
    "BridgeError",
    "JaxModule",
    "TorchFunction",
    "from_torch",
    "to_torch",
    "tree_to_jax",
    "tree_to_torch",
]
