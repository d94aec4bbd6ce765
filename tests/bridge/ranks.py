"""What each rank of a group runs: a grown model in DistributedDataParallel, on its share of data.

`python ranks.py RANK WORLD STORE OUT`; a world of 1 runs the whole batch without a group.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from bridges import Mlp, grow
from torch.nn.parallel import DistributedDataParallel

import esper_fn as ef
from esper_fn.lifecycle import Stage

STEPS = 60


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Mlp()
    bridge = grow(
        model,
        ["fc1", "fc2"],
        policy=ef.policies.periodic(every=6, start=5),
        graft=ef.grafting.linear(num_steps=5),
        settings=ef.lifecycle.settings(
            min_steps=dict.fromkeys(
                (
                    Stage.TRAINING,
                    Stage.GRAFTING,
                    Stage.STABILIZATION,
                    Stage.EVALUATING,
                    Stage.FINE_TUNING,
                ),
                3,
            ),
            utility_variation=100.0,
            loss_variation=1.0,
            train_first=True,
        ),
        directed_births=1,
    )
    run = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = torch.optim.AdamW(run.parameters(), 0.01)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 16, 6, generator=source)
    y = x[..., :3].tanh()
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    stages, utility = [], []
    for step in range(STEPS):
        loss = (run(x[step, mine]) - y[step, mine]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        info = bridge.step(loss)
        stages.append(info.stage)
        utility.append(np.asarray(bridge.state.seeds.telemetry.utility))
        if step % 5 == 4:
            bridge.survey(lambda: (model(x[0, mine]) - y[0, mine]).square().mean())
    adapters = torch.cat([p.detach().flatten() for p in bridge.adapter_parameters()]).numpy()
    potential = np.asarray(bridge.state.seeds.potential)
    with torch.no_grad():
        outputs = model(x[0]).numpy()
    results = {"adapters": adapters, "potential": potential, "outputs": outputs}
    np.savez(f"{out}{rank}.npz", stages=stages, utility=utility, **results)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
