"""Averages of weights over training steps (Polyak and Juditsky, 1992), which settle long before the weights do.

At a high learning rate weights wander around a good place; their moving average lies near its middle. What would need
a decayed rate and many more epochs is seen at once, so that a score after a few epochs says what a training is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def decay_at(decay: float, updates: int) -> float:
    """Share of the old average that stays after so many updates: 0 before the first, then rising to the decay, or the
    untrained weights would weigh on it for the first epochs."""
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of a model's parameters, to be updated after every optimizer step; its buffers are
    those of the model. None where there is nothing to average."""
    if not decay:
        return None

    @torch.no_grad()
    def move(averages: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor) -> None:
        torch._foreach_lerp_(list(averages), list(current), 1.0 - decay_at(decay, int(updates)))

    return AveragedModel(model, multi_avg_fn=move)  # pyright: ignore[reportArgumentType]  # wider than its lists
