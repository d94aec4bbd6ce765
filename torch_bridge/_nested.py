"""Nested tensors, as `nn.TransformerEncoder` makes of padded batches when it evaluates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def split(
    x: Tensor, *, is_pointwise: bool
) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """The ordinary tensors inside a nested one, and how such ones become a nested one again.

    Args:
      x: a nested tensor.
      is_pointwise: whether its sequences may be taken together, as no position sees another.
    """
    if x.layout is not torch.jagged:
        return list(x.unbind()), torch.nested.as_nested_tensor
    offsets = x.offsets()
    parts = [x.values()] if is_pointwise else list(x.unbind())

    def join(grown: list[Tensor]) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(torch.cat(grown), offsets)

    return parts, join
