"""Grow PyTorch models with Esper-fn's pure functions.

>>> import esper_fn as ef
>>> import torch
>>> import torch_bridge
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
>>> bridge = torch_bridge.grow(
...     model,
...     targets="0",
...     chunks=4,
...     blueprints={"low_rank": ef.blueprints.low_rank(rank=2)},
...     verbose=False,
... )
>>> optimizer = torch.optim.AdamW(model.parameters())
>>> loss = model(torch.ones(8, 4)).square().mean()
>>> loss.backward()
>>> optimizer.step()
>>> optimizer.zero_grad()
>>> info = bridge.step(loss)
"""

try:
    import torch as _torch
except ImportError as _error:
    raise ImportError(
        "torch_bridge needs PyTorch 2.11 or newer, which is not installed: "
        "pip install 'esper-fn[torch]'"
    ) from _error

from torch_bridge._adapters import register_blueprint
from torch_bridge._bridge import Bridge
from torch_bridge._convert._to_torch import TorchFunction, to_torch
from torch_bridge._convert._trees import tree_to_jax, tree_to_torch
from torch_bridge._errors import BridgeError
from torch_bridge._fsdp import replicate_adapters
from torch_bridge._grow import GrowthOptions, grow
from torch_bridge._targets import blocks

__all__ = [
    "Bridge",
    "BridgeError",
    "GrowthOptions",
    "TorchFunction",
    "blocks",
    "grow",
    "register_blueprint",
    "replicate_adapters",
    "to_torch",
    "tree_to_jax",
    "tree_to_torch",
]

del _torch
