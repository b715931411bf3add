"""CFN-ESA (Li et al., IEEE TAFFC 2024): text-centred cross-modal fusion with a task on shifts of emotion.

As published: two layers of a recurrent unimodal encoder (RUME: bidirectional GRU and feed-forward layer, each
with a residual and a LayerNorm), one set of weights for all modalities; five layers of a cross-modal encoder
with 8 heads (ACME: self-attention; text attends to visual and to audio and joins the two views, visual and
audio attend to text; feed-forward); a head that says of a pair of utterances whether the emotion differs (2d
-> 128 -> 2), whose loss is added with a weight. The backward GRU reads the future: the model is not causal.

Adaptations: a step stands for an utterance; a learned vector stands for an absent one; padding is excluded
from attention by a boolean mask and from the GRU by packing; pairs are unordered and at most `shift_span`
steps apart (all pairs of a session that is no longer), since their number grows with the square of a
session's length; the pair loss is a mean over the partners of a step, so that it adds up over steps like
every other loss; in a corpus without text the first modality takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from edu_emotionnet.baselines.layers import MaskedProjection, MultiHeadAttention, check_options
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL, FeatureStatistics
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register


@dataclass(frozen=True, kw_only=True)
class CFNESAConfig(EncoderConfig):
    """Depths and heads as published; the width is the full model's, the loss weight and the span are ours.

    Options given for all models, as presets do, replace the depth of ACME and its heads.
    """

    layers: int = 5
    """Cross-modal layers (ACME)."""
    heads: int = 8
    """Attention heads of ACME."""
    recurrent_layers: int = 2
    """Recurrent layers (RUME)."""
    shift_weight: float = 1.0
    """Weight of the emotion-shift loss."""
    shift_width: int = 128
    """Hidden width of the emotion-shift head."""
    shift_span: int = 32
    """Largest distance of a pair, in steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, at_least_one=("recurrent_layers", "shift_width", "shift_span"))
        if self.d_model % 2:
            raise ValueError(f"d_model must be even (half for each direction of the GRU), got {self.d_model}")


class FeedForward(nn.Module):
    """x -> LayerNorm(x + MLP(x))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layers(x))


class RecurrentUnimodalLayer(nn.Module):
    """RUME: context of the whole session in both directions."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, d), lengths (B,) on the CPU -> (B, T, d)."""
        # Packed: over a padded batch the backward direction would start in the padding.
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        context, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.feedforward(self.norm(x + self.dropout(context)))


class CrossmodalLayer(nn.Module):
    """ACME: self-attention, attention between the hub (text) and each other modality, feed-forward."""

    def __init__(self, modalities: int, config: CFNESAConfig) -> None:
        super().__init__()
        width = config.d_model
        others = modalities - 1

        def attentions(count: int) -> nn.ModuleList:
            return nn.ModuleList(MultiHeadAttention(width, config.heads, config.dropout) for _ in range(count))

        self.within = attentions(modalities)
        self.within_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(modalities))
        self.hub_from_other = attentions(others)
        self.other_from_hub = attentions(others)
        self.join = nn.Linear(others * width, width) if others else None
        self.between_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(modalities if others else 0))
        self.feedforward = nn.ModuleList(FeedForward(width, config.dropout) for _ in range(modalities))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: list[Tensor], real: Tensor) -> list[Tensor]:
        """The hub first, (B, T, d) each; keys outside `real` (B, T) are never seen."""
        attended = [attention(part, part, real) for attention, part in zip(self.within, x, strict=True)]
        x = self.add(x, attended, self.within_norms)
        if self.join is not None:
            hub, others = x[0], x[1:]
            views = [attend(hub, other, real) for attend, other in zip(self.hub_from_other, others, strict=True)]
            back = [attend(other, hub, real) for attend, other in zip(self.other_from_hub, others, strict=True)]
            x = self.add(x, [self.join(torch.cat(views, dim=-1)), *back], self.between_norms)
        return [feedforward(part) for feedforward, part in zip(self.feedforward, x, strict=True)]

    def add(self, x: list[Tensor], change: list[Tensor], norms: nn.ModuleList) -> list[Tensor]:
        return [norm(a + self.dropout(b)) for norm, a, b in zip(norms, x, change, strict=True)]


class EmotionShift(nn.Module):
    """Whether the class differs between a step and an earlier one: 2d -> 128 -> 2 on every pair."""

    def __init__(self, width: int, hidden: int, span: int) -> None:
        super().__init__()
        # W [h_t, h_s] = W_later h_t + W_earlier h_s: the product is per step, not per pair.
        self.later = nn.Linear(width, hidden)
        self.earlier = nn.Linear(width, hidden, bias=False)
        self.output = nn.Linear(hidden, 2)
        self.span = span

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        """(B, T, d), (B, T) -> scalar: sum over labelled steps of the mean loss over earlier partners."""
        steps = h.shape[1]
        span = max(min(self.span, steps - 1), 1)
        partners = F.pad(self.earlier(h), (0, 0, span, 0)).unfold(1, span, 1)[:, :steps]  # (B, T, hidden, span)
        partner_labels = F.pad(labels, (span, 0), value=IGNORED_LABEL).unfold(1, span, 1)[:, :steps]
        logits = self.output(F.relu(self.later(h)[:, :, None] + partners.transpose(2, 3)))  # (B, T, span, 2)
        valid = (labels[..., None] != IGNORED_LABEL) & (partner_labels != IGNORED_LABEL)
        target = (labels[..., None] != partner_labels).long()
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(target)
        return ((loss * valid).sum(-1) / valid.sum(-1).clamp_min(1)).sum()


class CFNESA(nn.Module):
    """RUME -> ACME -> classifier, with the emotion-shift task beside it; not causal."""

    def __init__(
        self,
        config: CFNESAConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        hub = "text" if "text" in dimensions else next(iter(dimensions))
        self.modalities = (hub, *(name for name in dimensions if name != hub))
        self.project = nn.ModuleDict(
            {
                name: MaskedProjection(
                    mean=torch.tensor(statistics.mean[name]),
                    std=torch.tensor(statistics.std[name]),
                    width=config.d_model,
                    bias=True,
                )
                for name in self.modalities
            }
        )
        self.recurrent = nn.ModuleList(
            RecurrentUnimodalLayer(config.d_model, config.dropout) for _ in range(config.recurrent_layers)
        )
        self.crossmodal = nn.ModuleList(CrossmodalLayer(len(self.modalities), config) for _ in range(config.layers))
        self.fuse = nn.Linear(len(self.modalities) * config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, classes)
        self.shift = EmotionShift(config.d_model, config.shift_width, config.shift_span)
        self.shift_weight = config.shift_weight

    def forward(self, batch: SessionBatch) -> Predictions:
        lengths = batch.lengths.cpu()
        x = [self.project[name](batch.features[name], batch.present[name]) for name in self.modalities]
        for layer in self.recurrent:
            x = [layer(part, lengths) for part in x]
        for layer in self.crossmodal:
            x = layer(x, batch.real)
        fused = self.dropout(F.relu(self.fuse(torch.cat(x, dim=-1))))
        return Predictions(
            log_probabilities=F.log_softmax(self.classifier(fused), dim=-1),
            auxiliary_loss=self.shift_weight * self.shift(fused, batch.labels),
        )


register("cfn_esa", ModelEntry(config=CFNESAConfig(), build=CFNESA, causal=False))
