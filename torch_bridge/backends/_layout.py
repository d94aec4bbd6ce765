"""Activations as the chunks of a bank's live adapters, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from esper_kernels import Chunking
from torch_bridge._plan import BankPlan


def gather(chunking: Chunking, bank: BankPlan, x: Tensor) -> Tensor:
    """[..., D] as [n, ..., F], zero where padded; a view where every chunk is served."""
    if bank.columns is not None:
        padded = torch.nn.functional.pad(x, (0, 1))
        chunks = padded.index_select(-1, bank.columns).unflatten(-1, (-1, chunking.widest))
        return chunks.movedim(-2, 0)
    split = x.unflatten(-1, (chunking.chunks, chunking.widest))
    if not bank.is_all:
        split = split.index_select(-2, bank.chunk)
    return split.movedim(-2, 0)


def scatter_(chunking: Chunking, bank: BankPlan, y: Tensor, values: Tensor) -> None:
    """Writes [n, ..., F] into the chunks of `y`."""
    rows = values.movedim(0, -2)
    if bank.columns is not None:
        is_real = bank.columns < chunking.features
        y.index_copy_(-1, bank.columns[is_real], rows.flatten(-2)[..., is_real])
        return
    split = y.unflatten(-1, (chunking.chunks, chunking.widest))
    if bank.is_all:
        split.copy_(rows)
    else:
        split.index_copy_(-2, bank.chunk, rows)


def scatter(chunking: Chunking, bank: BankPlan, values: Tensor, like: Tensor) -> Tensor:
    """[n, ..., F] at the features of its chunks and zero elsewhere, for code that is traced."""
    rows = values.movedim(0, -2)
    if bank.columns is not None:
        wide = torch.zeros_like(like[..., :1]).expand(*like.shape[:-1], chunking.features + 1)
        return wide.index_add(-1, bank.columns, rows.flatten(-2))[..., :-1]
    if bank.is_all:
        return rows.flatten(-2)
    wide = torch.zeros_like(like).unflatten(-1, (chunking.chunks, chunking.widest))
    return wide.index_copy(-2, bank.chunk, rows).flatten(-2)
