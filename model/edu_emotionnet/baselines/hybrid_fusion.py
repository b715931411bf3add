"""HybridFusion: re-implementation from the description, text stream added.

Follows the Hybrid Multi-Attention Network of Moorthy & Moon (Mathematics 13(7):1100, 2025), for which no code
is public: single-modal attention and parallel cross-modal attention side by side, a cross-modal relation
attention over both, then feature fusion. The relation attention is written as joint cross-attention, the
family that the description belongs to: C = tanh(X W J / sqrt(d)) with J the concatenation of all modalities,
H = ReLU(W_x X + W_c C), X' = W_h H + X.

Adaptations: the paper is audio-visual and predicts valence and arousal, here each modality attends to every
other one and K classes are predicted per step; every attention is masked to be causal; the original W_c ties
C to a fixed number of steps, here C weighs the projected steps and is averaged over those visible, so that
sessions may have any length; the encoders are the full model's. A single modality attends to itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.baselines.layers import ClassifierHead, ModalityEncoders, MultiHeadAttention
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register


@dataclass(frozen=True, kw_only=True)
class HybridFusionConfig(EncoderConfig):
    """Width of every representation and shape of the encoders; the defaults are the full model's."""


class HybridAttention(nn.Module):
    """Single-modal and parallel cross-modal attention of one modality, joined to width d."""

    def __init__(self, width: int, heads: int, dropout: float, sources: int) -> None:
        super().__init__()
        self.single = MultiHeadAttention(width, heads, dropout)
        self.single_norm = nn.LayerNorm(width)
        self.cross = nn.ModuleList(MultiHeadAttention(width, heads, dropout) for _ in range(sources))
        self.cross_norm = nn.LayerNorm(width)
        self.join = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sources: list[Tensor]) -> Tensor:
        """(B, T, d) and the other modalities -> (B, T, d)."""
        within = self.single_norm(x + self.dropout(self.single(x, x)))
        views = [attend(x, source) for attend, source in zip(self.cross, sources, strict=True)]
        across = self.cross_norm(x + self.dropout(sum(views[1:], views[0]) / len(views)))
        return self.join(torch.cat([within, across], dim=-1))


class RelationAttention(nn.Module):
    """Joint cross-attention of one modality with all of them, over the steps up to each step."""

    def __init__(self, width: int, modalities: int) -> None:
        super().__init__()
        self.correlation = nn.Linear(width, modalities * width, bias=False)
        self.own = nn.Linear(width, width)
        self.related = nn.Linear(modalities * width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, joint: Tensor) -> Tensor:
        """X (B, T, d) and J (B, T, M d) -> X' (B, T, d)."""
        scores = self.correlation(x) @ joint.transpose(1, 2) / math.sqrt(joint.shape[-1])
        correlation = torch.tanh(scores).tril()  # step t sees steps 1..t
        visible = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        related = correlation @ self.related(joint) / visible
        return x + self.output(F.relu(self.own(x) + related))


class HybridFusion(nn.Module):
    """Encoders -> hybrid attention -> relation attention -> concatenation and classifier; causal."""

    def __init__(
        self,
        config: HybridFusionConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        count, width = len(dimensions), config.d_model
        self.encoders = ModalityEncoders(config, dimensions=dimensions, statistics=statistics)
        self.hybrid = nn.ModuleList(
            HybridAttention(width, config.heads, config.dropout, sources=max(count - 1, 1)) for _ in dimensions
        )
        self.relation = nn.ModuleList(RelationAttention(width, count) for _ in dimensions)
        self.classifier = ClassifierHead(count * width, width, classes, config.dropout)

    def forward(self, batch: SessionBatch) -> Predictions:
        h = self.encoders(batch)
        x = []
        for i, attention in enumerate(self.hybrid):
            others = [h[j] for j in range(len(h)) if j != i] or [h[i]]
            x.append(attention(h[i], others))
        joint = torch.cat(x, dim=-1)
        related = [relation(part, joint) for relation, part in zip(self.relation, x, strict=True)]
        return Predictions(log_probabilities=self.classifier(torch.cat(related, dim=-1)))


register("hybrid_fusion", ModelEntry(config=HybridFusionConfig(), build=HybridFusion))
