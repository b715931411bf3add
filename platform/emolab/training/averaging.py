"""Averages of weights over training steps (Polyak and Juditsky, 1992).

At a high learning rate weights wander around a good place, near the middle of which their moving average lies.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Weights = tuple[Tensor, ...] | list[Tensor]


def decay_at(decay: float, updates: int) -> float:
    """Share of the old average that stays after so many updates: 0 before the first, then rising to the decay, or the
    untrained weights would weigh on it for the first epochs."""
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of a model's parameters, to be updated after every optimizer step; its buffers are
    those of the model. None where there is nothing to average."""
    if not decay:
        return None

    def move(averages: Weights, current: Weights, updates: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay_at(decay, int(updates)))(averages, current, updates)

    return AveragedModel(model, multi_avg_fn=move)
