"""Growing under FSDP2: the host is sharded, the adapters stay whole on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from torch_bridge._errors import BridgeError

if TYPE_CHECKING:
    from torch_bridge._bridge import Bridge


def replicate_adapters(bridge: Bridge, process_group: Any = None) -> set[nn.Parameter]:
    """Keep the adapters whole on every rank, for a host that `fully_shard` is about to shard.

    `fully_shard` would replace an adapter's parameter by its shards, and a newborn is written
    whole, so the adapters stay out of it: small next to the host, they are held by every rank, and
    their gradients are averaged over the ranks as backward passes make them, as the shards' are.
    Hand the result to every call of `fully_shard`, and give an optimiser the adapters as a group of
    their own, since torch's optimisers do not mix sharded and plain parameters in one:

        ignored = torch_bridge.replicate_adapters(bridge)
        for block in model.blocks:
            fully_shard(block, ignored_params=ignored)
        fully_shard(model, ignored_params=ignored)
        optimizer = torch.optim.AdamW(bridge.parameter_groups())

    What is missing: `unwrap` needs whole weights (load the full state dict into a model grown
    alike in one process and unwrap that one), and clipping needs one call a group.

    Args:
      bridge: from `grow`, made before anything is sharded.
      process_group: the ranks that share the data; the default one if left out.

    Returns:
      The adapters' parameters.

    Raises:
      BridgeError: there is no process group, or adapters are sharded already.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise BridgeError(
            "replicate_adapters needs a process group; call torch.distributed.init_process_group "
            "before it"
        )
    adapters = bridge.adapter_parameters()
    sharded = [p for p in adapters if type(p).__name__ == "DTensor"]
    if sharded:
        raise BridgeError(
            f"{len(sharded)} of {len(adapters)} parameters of adapters are sharded already; call "
            "replicate_adapters before fully_shard and hand its result to ignored_params"
        )
    size = dist.get_world_size(process_group)

    def average(parameter: nn.Parameter) -> None:
        if parameter.grad is not None and size > 1:
            # With several backward passes a step, what earlier ones left is the same on every
            # rank, and the average leaves it as it is.
            dist.all_reduce(parameter.grad, group=process_group)
            parameter.grad /= size

    for parameter in adapters:
        parameter.register_post_accumulate_grad_hook(average)
    return set(adapters)
