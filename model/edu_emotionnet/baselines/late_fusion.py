"""Late fusion (Table II): every modality decides alone, the decisions are averaged.

The paper does not say how it combines them; this is the plain rule, the mean of the class probabilities with
equal weights at every step, whether or not a modality is present there. It is also the reference of effective
robustness and of relative corruption errors, which is a reason to keep it plain. Encoders are the full
model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edu_emotionnet.baselines.layers import ClassifierHead, ModalityEncoders
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register


@dataclass(frozen=True, kw_only=True)
class LateFusionConfig(EncoderConfig):
    """Shape of the encoders; the defaults are the full model's."""


class LateFusion(nn.Module):
    """Mean over modalities of softmax(MLP_m(h^m)); causal."""

    def __init__(
        self,
        config: LateFusionConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        self.encoders = ModalityEncoders(config, dimensions=dimensions, statistics=statistics)
        self.classifiers = nn.ModuleList(
            ClassifierHead(config.d_model, config.d_model, classes, config.dropout) for _ in dimensions
        )

    def forward(self, batch: SessionBatch) -> Predictions:
        votes = torch.stack(
            [classifier(h) for classifier, h in zip(self.classifiers, self.encoders(batch), strict=True)]
        )
        # log of a mean of probabilities, without leaving log space
        return Predictions(log_probabilities=torch.logsumexp(votes, dim=0) - math.log(len(votes)))


register("late_fusion", ModelEntry(config=LateFusionConfig(), build=LateFusion))
