"""Adding up over the processes of a group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Group:
    """The processes that train one model, each on its share of the batch.

    Each rank's loss is the mean over its own share and the model's is the mean over ranks, as
    `DistributedDataParallel` has it: of a rank's gradient `dy` one W-th counts.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """W."""
        if not dist.is_available() or not dist.is_initialized():
            return 1
        return int(dist.get_world_size(self._group))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group)
        return values
