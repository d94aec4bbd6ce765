"""What several tests of the bridge share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import OWNS_ADAPTER, Stage


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, width)
        self.fc2 = nn.Linear(width, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv1(x)))
        return self.out(torch.relu(self.conv2(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + torch.tanh(self.fc(self.ln(x))), "kept"


class Transformer(nn.Module):
    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.h:
            x, _ = block(x)
        return self.head(x)


SCALE = 0.25
DAMPING = 2.5
"""`SCALE` over the default `trust`."""
BLUEPRINTS = {"bottleneck": ef.blueprints.bottleneck(4), "low_rank": ef.blueprints.low_rank(2)}


def grow(model: nn.Module, targets: Any, **options: Any) -> torch_bridge.Bridge:
    """A quiet bridge in which nothing happens by itself."""
    settings_: dict[str, Any] = {
        "chunks": 2,
        "blueprints": BLUEPRINTS,
        "capacity": 2,
        "policy": ef.policies.never(),
        "verbose": False,
    }
    return torch_bridge.grow(model, targets=targets, **{**settings_, **options})


def set_stages(
    bridge: torch_bridge.Bridge,
    rows: Mapping[int, tuple[str, Stage, float]],
    noise: float = 0.3,
) -> None:
    """Puts seeds where a test wants them: seed -> (blueprint, stage, alpha), with random adapters.

    Their chunks' scale is `SCALE`, so those in TRAINING learn damped by `DAMPING`.
    """
    layout, state = bridge.layout, bridge.state
    tables, owner = layout.tables, np.array(state.owner)
    seeds = state.seeds
    stage, alpha = np.array(seeds.stage), np.array(seeds.alpha)
    slot, blueprint = np.array(seeds.slot), np.array(seeds.blueprint)
    scale = np.array(seeds.telemetry.gradient_scale)
    source = torch.Generator().manual_seed(3)
    for seed, (name, to, position) in rows.items():
        owner[owner == seed] = -1
        stage[seed], alpha[seed], slot[seed], blueprint[seed] = to, position, -1, -1
        scale[seed] = SCALE
        if OWNS_ADAPTER[to]:
            group = int(np.searchsorted(tables.group_start, seed, side="right")) - 1
            index = layout.blueprint_index(name)
            is_own = tables.slot_pool_start == tables.pool_start[group, index]
            slot[seed] = np.flatnonzero(is_own & (owner < 0))[0]
            owner[slot[seed]], blueprint[seed] = seed, index
    with torch.no_grad():
        for p in bridge.adapter_parameters():
            p.copy_(noise * torch.randn(p.shape, generator=source))
    bridge._lifecycle.state = state._replace(
        owner=jnp.asarray(owner),
        seeds=seeds._replace(
            stage=jnp.asarray(stage),
            alpha=jnp.asarray(alpha),
            slot=jnp.asarray(slot),
            blueprint=jnp.asarray(blueprint),
            telemetry=seeds.telemetry._replace(gradient_scale=jnp.asarray(scale)),
        ),
    )
    bridge._loaded()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the parameters that get one, which are left without."""
    model.zero_grad()
    loss.backward()
    results = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return results


def reading(site: Any) -> Any:
    """What a site has measured since the last call, [C, 10], or None."""
    return site.take_statistics()


def adapter_of(site: Any, bank: str, slot: int) -> list[torch.Tensor]:
    """A copy of one adapter's parameters."""
    module = site.get_submodule(bank)
    names = site.names_of(bank)
    if site.is_stacked:
        return [getattr(module, name)[slot].detach().clone() for name in names]
    return [getattr(module[slot], name).detach().clone() for name in names]
