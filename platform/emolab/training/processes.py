"""The workers that train one model: alone, or a torch.distributed group that Ray Train has started."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the workers; every worker must call it equally often."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def spread(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Element-wise smallest and largest over the workers; every worker must call it equally often."""
        ends = torch.stack([-values, values])
        if self.count > 1:
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        return -ends[0], ends[1]
