"""The two values that every model of the zoo exchanges with its caller: a ragged batch in, predictions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edu_emotionnet.conventions import IGNORED_LABEL, MODALITIES


@dataclass(frozen=True, kw_only=True)
class SessionBatch:
    """B sessions of different lengths, padded at the end to the longest, T steps.

    Values under a false presence mask are never read by a model, so they may hold anything.
    """

    features: Mapping[str, Tensor]
    """Modality -> (B, T, D_m) float32, raw features as stored in the shards."""
    present: Mapping[str, Tensor]
    """Modality -> (B, T) bool, true where the modality was observed."""
    lengths: Tensor
    """(B,) int64, number of real steps."""
    labels: Tensor
    """(B, T) int64 class indices, IGNORED_LABEL where unlabelled or padded."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name in MODALITIES if name in self.features)

    @property
    def real(self) -> Tensor:
        """(B, T) bool, true on the steps that exist, false on padding."""
        steps = torch.arange(self.labels.shape[1], device=self.lengths.device)
        return steps[None, :] < self.lengths[:, None]

    @property
    def labelled(self) -> Tensor:
        """(B, T) bool, true on the steps that carry a label."""
        return self.labels != IGNORED_LABEL

    def to(self, device: torch.device | str) -> SessionBatch:
        return SessionBatch(
            features={name: value.to(device, non_blocking=True) for name, value in self.features.items()},
            present={name: value.to(device, non_blocking=True) for name, value in self.present.items()},
            lengths=self.lengths.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of a batch."""

    log_probabilities: Tensor
    """(B, T, K) log of the class probabilities; rows of padding are meaningless."""
    confidence: Tensor | None = None
    """(B, T, M) weight of each modality (MIE), non-negative and summing to one; None where a model has none."""
    auxiliary_loss: Tensor | None = None
    """Scalar: the model's own loss terms *summed* over labelled steps, so that every loss shares one divisor."""
