"""Audio-only, visual-only and text-only (Table II): one encoder of the full model and a classifier.

The paper gives no details. The encoder is that of the full model, at the same width and depth, so that a
difference in the scores is a difference between having one modality and having several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from edu_emotionnet.baselines.layers import ClassifierHead
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import MODALITIES, FeatureStatistics
from edu_emotionnet.encoder import ModalityEncoder
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register


@dataclass(frozen=True, kw_only=True)
class UnimodalConfig(EncoderConfig):
    """Shape of the one encoder; the defaults are the full model's."""


class Unimodal(nn.Module):
    """Causal encoder of one modality -> class probabilities per step; the other modalities are not read."""

    def __init__(
        self,
        config: UnimodalConfig,
        *,
        modality: str,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        """Raises ValueError where the corpus lacks the modality."""
        super().__init__()
        if modality not in dimensions:
            raise ValueError(
                f"model '{modality}_only' needs {modality} features, but the corpus has "
                f"{', '.join(dimensions)}: leave this model out or prepare the corpus with that modality"
            )
        self.modality = modality
        self.encoder = ModalityEncoder(
            mean=torch.tensor(statistics.mean[modality]),
            std=torch.tensor(statistics.std[modality]),
            width=config.d_model,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
        )
        self.classifier = ClassifierHead(config.d_model, config.d_model, classes, config.dropout)

    def forward(self, batch: SessionBatch) -> Predictions:
        h = self.encoder(batch.features[self.modality], batch.present[self.modality])
        return Predictions(log_probabilities=self.classifier(h))


for _modality in MODALITIES:
    register(
        f"{_modality}_only",
        ModelEntry(config=UnimodalConfig(), build=partial(Unimodal, modality=_modality)),
    )
