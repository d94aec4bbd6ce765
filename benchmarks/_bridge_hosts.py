"""Torch hosts of the bridge's benchmark, and their grown and adapted forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage

TARGETS = ("ln1", "proj", "ln2", "out")
"""Of each block: four activations as wide as the model."""
LINEAR = ("qkv", "proj", "fc", "out")


class Cnn(nn.Module):  # type: ignore[misc] # torch is untyped here
    """3 x 3 convolutions with relu and pooling, for 28 x 28 images, as `hosts.conv` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 49, 128)
        self.logits = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(torch.relu(conv(x)), 2)
        return self.logits(torch.relu(self.hidden(x.flatten(1))))


class Block(nn.Module):  # type: ignore[misc]
    """Attention and a perceptron, each behind a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = self.qkv(self.ln1(x)).chunk(3, -1)
        q, k, v = (of.unflatten(-1, (self.heads, -1)).transpose(1, 2) for of in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class Gpt(nn.Module):  # type: ignore[misc]
    """A decoder; its forward returns the loss of the next tokens."""

    def __init__(self, *, layers: int, width: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss on [B, T + 1] tokens."""
        seen, wanted = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(seen) + self.places(torch.arange(seen.shape[1], device=seen.device))
        for block in self.h:
            x = block(x)
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())


def light_up(bridge: torch_bridge.Bridge) -> None:
    """Puts every seed into FINE_TUNING for good, with a random adapter of the first blueprint."""
    layout, state = bridge.layout, bridge.state
    tables, seeds = layout.tables, state.seeds
    groups = np.repeat(np.arange(len(tables.group_size)), tables.group_size)
    within = np.arange(layout.num_seeds) - tables.group_start[groups]
    slot = (tables.pool_start[groups, 0] + within).astype(np.int32)
    owner = np.full((layout.num_slots,), -1, np.int32)
    owner[slot] = np.arange(layout.num_seeds)
    every = seeds.stage.shape
    bridge._lifecycle.state = state._replace(
        owner=jnp.asarray(owner),
        seeds=seeds._replace(
            stage=jnp.full(every, Stage.FINE_TUNING, jnp.int8),
            alpha=jnp.full(every, 0.5, jnp.float32),
            slot=jnp.asarray(slot),
            blueprint=jnp.zeros(every, jnp.int8),
            is_paused=jnp.ones(every, bool),
        ),
    )
    with torch.no_grad():
        for p in bridge.adapter_parameters():
            p.normal_(std=0.02)
    bridge._loaded()


def grown(
    model: nn.Module, chunks: int, rank: int, targets: Any = TARGETS, *, is_live: bool, lag: int
) -> torch_bridge.Bridge:
    """A model with low-rank adapters at `targets`, all dormant or all live."""
    bridge = torch_bridge.grow(
        model,
        targets=list(targets),
        chunks=chunks,
        blueprints={"low_rank": ef.blueprints.low_rank(rank)},
        capacity=chunks,
        policy=ef.policies.never(),
        stacked=True,
        lag=lag,
        verbose=False,
    )
    if is_live:
        light_up(bridge)
    return bridge


def adapted(model: nn.Module, parameters: int) -> tuple[Any, int]:
    """The model under PEFT's LoRA on every linear of a block, base training too.

    Args:
      model: a `Gpt`.
      parameters: to add; the rank is the one that comes nearest.

    Returns:
      The model and the parameters really added.
    """
    from peft import LoraConfig, get_peft_model

    per_rank = sum(
        of.in_features + of.out_features
        for name, of in model.named_modules()
        if name.rsplit(".", 1)[-1] in LINEAR
    )
    rank = max(1, round(parameters / per_rank))
    told = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LINEAR), lora_dropout=0.0)
    wrapped = get_peft_model(copy.deepcopy(model), told, autocast_adapter_dtype=False)
    wrapped.requires_grad_(True)
    return wrapped.base_model.model, rank * per_rank


def stepper(
    model: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    loss_of: Callable[..., Tensor],
    bridge: torch_bridge.Bridge | None = None,
    *,
    steps: int = 1,
) -> Callable[[], object]:
    """`steps` training steps on batches in turn; returns when the device is done."""
    at = [0]

    def run() -> object:
        for _ in range(steps):
            at[0] += 1
            loss = loss_of(model, batches[at[0] % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if bridge is not None:
                bridge.step(loss)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return None

    return run
