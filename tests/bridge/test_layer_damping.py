"""Bodies that learn behind the host descend a damped objective."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bridges import grow, place, reading
from torch import Tensor, nn

import esper_fn as ef
from esper_fn.lifecycle import Stage

BLUEPRINTS = {
    "low_rank": ef.blueprints.low_rank(2),
    "bottleneck": ef.blueprints.bottleneck(4, "gelu"),
    "gated": ef.blueprints.gated(4),
    "normalised": ef.blueprints.normalised(4),
}
DAMPING = 2.5


def grown(
    bank: str, gains: list[tuple[float, float, float, float]], features: int = 8
) -> tuple[nn.Sequential, Any]:
    """A linear layer whose chunks all have a body of one bank, with gains of their own."""
    torch.manual_seed(0)
    chunks = len(gains)
    model = nn.Sequential(nn.Linear(6, features))
    options: dict[str, Any] = {"chunks": chunks, "capacity": chunks}
    bridge = grow(model, "0", blueprints={bank: BLUEPRINTS[bank]}, watch_every=1, **options)
    place(bridge, {k: (bank, Stage.TRAINING, 0.0) for k in range(chunks)})
    set_gains(bridge, gains)
    return model, bridge


def set_gains(bridge: Any, gains: list[tuple[float, float, float, float]]) -> None:
    """Plans the next step with these gains, chunk by chunk."""
    from torch_bridge._banks import tell_sites

    owner, of_chunks = bridge._lifecycle.owner(), np.asarray(gains, np.float32)
    of_slots = np.where((owner >= 0)[:, None], of_chunks[np.maximum(owner, 0)], np.float32(0))
    tell_sites(bridge.sites, bridge.banks, of_slots, owner, is_watching=True)


def step(model: nn.Module, bridge: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """All gradients, the output and what was measured."""
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"y": y.detach().clone(), "told": reading(bridge.sites[0]).clone()}


def output_by_hand(bank: str, body: Any, u: Tensor) -> Tensor:
    """`r` in the dtype of `u`."""
    own = {name: p.detach().to(u.dtype).requires_grad_() for name, p in body.named_parameters()}
    output_by_hand.leaves = own  # type: ignore[attr-defined]
    if bank == "normalised":
        mean, var = u.mean(-1, keepdim=True), u.var(-1, keepdim=True, unbiased=False)
        u = (u - mean) / torch.sqrt(var + 1e-6)
        if "scale" in own:
            u = u * own["scale"]
    z = u @ own["down"] + own.get("bias", 0)
    if bank == "gated":
        z = nn.functional.silu(u @ own["gate"]) * z
    elif bank == "bottleneck":
        z = nn.functional.gelu(z, approximate="tanh")
    elif bank == "normalised":
        z = torch.relu(z)
    return z @ own["up"]
