"""Values and functions between torch and JAX.

- `tree_to_jax`, `tree_to_torch`: pytrees, by DLPack.
- `to_torch`: a JAX function as a torch function.
"""

from torch_bridge._convert._to_torch import TorchFunction, to_torch
from torch_bridge._convert._trees import tree_to_jax, tree_to_torch

__all__ = [
    "TorchFunction",
    "to_torch",
    "tree_to_jax",
    "tree_to_torch",
]
