"""What each rank runs: a grown model whose host FSDP2 shards, on its share of the data.

`python sharded_ranks.py RANK WORLD STORE OUT`; a world of 1 runs the whole batch unsharded.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from short_lives import options
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torch_bridge

STEPS = 24


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    bridge = torch_bridge.grow(model, targets="0", **options())
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        ignored = torch_bridge.replicate_adapters(bridge)
        for spot in (0, 2):
            fully_shard(model[spot], mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        assert type(model[0].weight).__name__ == "DTensor"
        assert all(type(p) is nn.Parameter for p in bridge.adapter_parameters())
    optimizer = torch.optim.AdamW(bridge.parameter_groups(), 0.01)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 16, 6, generator=source)
    y = x[..., :3].tanh()
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    stages = []
    for step in range(STEPS):
        settings_ = torch.zeros(())
        for a, b in zip(x[step, mine].chunk(2), y[step, mine].chunk(2), strict=True):
            loss = (model(a) - b).square().mean() / 2
            loss.backward()
            settings_ += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        bridge.step(settings_)
        stages.append(bridge.stages.copy())
        if step % 3 == 2:
            bridge.survey(lambda: (model(x[0, mine]) - y[0, mine]).square().mean())
    adapters = torch.cat([p.detach().flatten() for p in bridge.adapter_parameters()]).numpy()
    weight = model[0].weight.detach()
    whole = weight.full_tensor() if world > 1 else weight
    np.savez(f"{out}{rank}.npz", stages=stages, adapters=adapters, weight=whole.numpy())
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
