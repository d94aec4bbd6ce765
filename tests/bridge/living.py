"""Adapters that act, by public names alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage


def quiet(model: nn.Module, targets: Any, **options: Any) -> torch_bridge.Bridge:
    """A bridge in which nothing happens by itself; one lifecycle's shape for many tests."""
    chosen: dict[str, Any] = {
        "chunks": 2,
        "blueprints": {"low_rank": ef.blueprints.low_rank(2)},
        "capacity": 2,
        "policy": ef.policies.never(),
        "graft": ef.grafting.linear(num_steps=1),
        "watch_every": 0,
        "verbose": False,
    }
    return torch_bridge.grow(model, targets=targets, **{**chosen, **options})


def enliven(
    bridge: torch_bridge.Bridge, seeds: Any = None, noise: float = 0.3, name: str = "low_rank"
) -> None:
    """Makes seeds act, with random adapters; all seeds if none are named."""
    every = range(bridge.layout.num_seeds) if seeds is None else seeds
    bridge.step(1.0, [ef.commands.germinate(seed, name) for seed in every])
    for stage in (Stage.TRAINING, Stage.GRAFTING):
        bridge.step(1.0, [ef.commands.transition(seed, stage) for seed in every])
    bridge.step(1.0)
    scatter(bridge, noise)
    assert all(bridge.seed(seed).alpha > 0 for seed in every)


def scatter(bridge: torch_bridge.Bridge, noise: float, seed: int = 3) -> None:
    """Random numbers in all adapters."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bridge.adapter_parameters():
            p.copy_(noise * torch.randn(p.shape, generator=source))
