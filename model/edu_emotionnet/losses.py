"""The combined loss of equation 10, as sums that several processes can add up before they divide."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Terms of the loss summed over a batch; each a scalar tensor. All are divided by ``steps``."""

    cross_entropy: Tensor
    smoothness: Tensor
    """KL(y_{t-1} || y_t), t >= 2, over every pair of real steps: where one step in n has a label, it weighs n times as
    much per label as where all have one."""
    auxiliary: Tensor
    steps: Tensor
    """Number of labelled steps: the one divisor, summed over all workers before it is used."""

    def total(self, kl_weight: float) -> Tensor:
        return self.cross_entropy + kl_weight * self.smoothness + self.auxiliary


def combined_loss(predictions: Predictions, batch: SessionBatch) -> LossSums:
    """Equation 10. The KL term is undefined at t = 1 and starts at t = 2; padded steps take no part.

    Cross-entropy counts labelled steps. The KL term needs no label and counts every pair of real steps. Where every
    real step is labelled, both sums over ``steps`` are the equation's means over T; where few are, choose lambda anew.
    """
    log_p = predictions.log_probabilities
    cross_entropy = F.nll_loss(log_p.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    earlier, later = log_p[:, :-1], log_p[:, 1:]
    divergence = (earlier.exp() * (earlier - later)).sum(-1)
    smoothness = divergence.masked_fill(~batch.real[:, 1:], 0.0).sum()
    auxiliary = predictions.auxiliary_loss
    return LossSums(
        cross_entropy=cross_entropy,
        smoothness=smoothness,
        auxiliary=auxiliary if auxiliary is not None else cross_entropy.new_zeros(()),
        steps=batch.labelled.sum(),
    )
