"""Early fusion (Table II): representations are joined before one classifier decides.

The paper does not say what it joins. Raw features joined before a single encoder would change the encoder
along with the fusion; here the full model's encoders are kept and their outputs concatenated at every step,
so that only the fusion differs. It has no alignment, no confidence and no feedback.
"""

from __future__ import annotations

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
class EarlyFusionConfig(EncoderConfig):
    """Shape of the encoders; the defaults are the full model's."""


class EarlyFusion(nn.Module):
    """[h^A, h^V, h^T] -> MLP -> class probabilities per step; causal."""

    def __init__(
        self,
        config: EarlyFusionConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        self.encoders = ModalityEncoders(config, dimensions=dimensions, statistics=statistics)
        joined = len(dimensions) * config.d_model
        self.classifier = ClassifierHead(joined, config.d_model, classes, config.dropout)

    def forward(self, batch: SessionBatch) -> Predictions:
        return Predictions(log_probabilities=self.classifier(torch.cat(self.encoders(batch), dim=-1)))


register("early_fusion", ModelEntry(config=EarlyFusionConfig(), build=EarlyFusion))
