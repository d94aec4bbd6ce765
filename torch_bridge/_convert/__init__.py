"""Values, functions and modules between torch and JAX.

- `tree_to_jax`, `tree_to_torch`: pytrees, by DLPack.
- `to_torch`: a JAX function as a torch function.
- `from_torch`: a torch module or function as a JAX function.
"""

from torch_bridge._convert._from_torch import JaxModule, from_torch
from torch_bridge._convert._to_torch import TorchFunction, to_torch
from torch_bridge._convert._trees import tree_to_jax, tree_to_torch

__all__ = [
    "JaxModule",
    "TorchFunction",
    "from_torch",
    "to_torch",
    "tree_to_jax",
    "tree_to_torch",
]
