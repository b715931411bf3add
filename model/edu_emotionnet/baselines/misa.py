"""MISA (Hazarika et al., ACM MM 2020): modality-invariant and modality-specific representations.

As published: every modality is projected to width 128 and from there into a private and a shared subspace
(sigmoid); a one-layer Transformer with 2 heads lets the six vectors attend to each other; their concatenation
is classified through 6d -> 3d -> K. Three losses keep the subspaces apart and meaningful: orthogonality of
private and shared and of every two private representations (6 pairs), central moment discrepancy of 5 moments
between the shared ones, and reconstruction of the projection from private + shared; weights 0.3, 1.0 and 1.0.

Adaptations: each step is a sample, so the Transformer runs over the six vectors of a step and the model is
causal; the encoders are the full model's at width 128 in place of BERT and LSTMs; the statistics of the first
two losses are taken over the labelled steps of one session instead of a mini-batch and weigh as many steps,
so that the loss does not depend on how sessions are grouped into batches or spread over processes. The
reconstruction takes its target as given: with a gradient of its own the projection learns to be easy to
reconstruct, and at small widths it vanishes before anything else is learnt. With M modalities there are 2M
vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.baselines.layers import ClassifierHead, ModalityEncoders, check_options
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register

MOMENTS = 5
"""Moments compared by the central moment discrepancy."""


@dataclass(frozen=True, kw_only=True)
class MISAConfig(EncoderConfig):
    """Width, heads and loss weights as published; the depth of the encoders is the full model's.

    Options given for all models, as presets do, replace width and heads.
    """

    d_model: int = 128
    """Width of the encoders and of both subspaces."""
    heads: int = 2
    """Attention heads, in the encoders and in the fusion Transformer."""
    difference_weight: float = 0.3
    similarity_weight: float = 1.0
    reconstruction_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)


class Subspaces(nn.Module):
    """One modality: projection, private part, reconstruction. The shared part is common to all modalities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        self.private = nn.Sequential(nn.Linear(width, width), nn.Sigmoid())
        self.reconstruct = nn.Linear(width, width)

    def forward(self, h: Tensor, shared: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, d) -> private (B, T, d), shared (B, T, d), squared error of the reconstruction (B, T)."""
        projected = self.project(h)
        private, common = self.private(projected), shared(projected)
        error = (self.reconstruct(private + common) - projected.detach()).square().mean(-1)
        return private, common, error


def session_mean(x: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted steps of a session: (B, T, d), (B, T) -> (B, 1, d); 0 where there is none."""
    weight = counted[..., None].to(x.dtype)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)


def overlap(x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """Orthogonality of each session, (B,): mean squared entry of X^T Y, steps centred and of unit length."""
    mask = counted[..., None]
    x, y = (F.normalize((part - session_mean(part, counted)) * mask, dim=-1, eps=1e-6) for part in (x, y))
    return (x.transpose(1, 2) @ y).square().mean((1, 2))


def moment_discrepancy(x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """Distance of the first moments of each session, (B,); values lie in [0, 1], so no scale is needed."""
    mean_x, mean_y = session_mean(x, counted), session_mean(y, counted)
    distance = torch.linalg.vector_norm(mean_x - mean_y, dim=-1)
    for order in range(2, MOMENTS + 1):
        moment_x = session_mean((x - mean_x) ** order, counted)
        moment_y = session_mean((y - mean_y) ** order, counted)
        distance = distance + torch.linalg.vector_norm(moment_x - moment_y, dim=-1)
    return distance[:, 0]


class MISA(nn.Module):
    """Encoders -> private and shared parts -> attention over the vectors of a step -> classifier; causal."""

    def __init__(
        self,
        config: MISAConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        self.config = config
        width, vectors = config.d_model, 2 * len(dimensions)
        self.encoders = ModalityEncoders(config, dimensions=dimensions, statistics=statistics)
        self.subspaces = nn.ModuleList(Subspaces(width) for _ in dimensions)
        self.shared = nn.Sequential(nn.Linear(width, width), nn.Sigmoid())
        # 16 d: the published layer has 2048 hidden units at width 128
        self.fusion = nn.TransformerEncoderLayer(
            width, config.heads, dim_feedforward=16 * width, dropout=config.dropout, batch_first=True
        )
        self.classifier = ClassifierHead(vectors * width, vectors * width // 2, classes, config.dropout)

    def forward(self, batch: SessionBatch) -> Predictions:
        parts = [space(h, self.shared) for space, h in zip(self.subspaces, self.encoders(batch), strict=True)]
        private, shared, errors = (list(group) for group in zip(*parts, strict=True))
        vectors = torch.stack([*private, *shared], dim=2)  # (B, T, 2M, d)
        fused = self.fusion(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
        return Predictions(
            log_probabilities=self.classifier(fused.flatten(2)),
            auxiliary_loss=self.subspace_loss(private, shared, errors, batch.labelled),
        )

    def subspace_loss(
        self, private: list[Tensor], shared: list[Tensor], errors: list[Tensor], counted: Tensor
    ) -> Tensor:
        """The three losses, summed over the labelled steps (B, T)."""
        steps = counted.sum(1)
        apart = [*zip(private, shared, strict=True), *combinations(private, 2)]
        alike = list(combinations(shared, 2))
        difference = sum(((overlap(x, y, counted) * steps).sum() for x, y in apart), errors[0].new_zeros(()))
        similarity = sum(((moment_discrepancy(x, y, counted) * steps).sum() for x, y in alike), errors[0].new_zeros(()))
        reconstruction = sum(((error * counted).sum() for error in errors), errors[0].new_zeros(()))
        return (
            self.config.difference_weight * difference
            + self.config.similarity_weight * similarity / max(len(alike), 1)
            + self.config.reconstruction_weight * reconstruction / len(errors)
        )


register("misa", ModelEntry(config=MISAConfig(), build=MISA))
