"""Edu-EmotionNet (Rafiuddin, ICMLA 2025), equations 1-9, readable top to bottom.

    audio, visual, text --encoders--> h --CMAA--> g --MIE--> z --TFL--> class probabilities per step

Where the paper leaves a choice, the reading shipped as default and the literal one are both selectable:
alignment span (eq. 4), confidence normalisation (eq. 6), gradient through the previous prediction (eq. 8).
Each of CMAA, MIE and TFL can be removed, for the ablations of Table III.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.encoder import ModalityEncoder, merge_heads, split_heads
from edu_emotionnet.feedback import TemporalFeedbackLoop


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the modality encoders; the defaults are the paper's (section IV)."""

    d_model: int = 256
    """Width d of every representation."""
    layers: int = 4
    """Transformer layers per modality."""
    heads: int = 4
    """Attention heads, in the encoders and in CMAA; d_k = d_model / heads (64 in the paper)."""
    dropout: float = 0.2
    """Dropout probability."""

    def __post_init__(self) -> None:
        for name in ("d_model", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.heads:
            raise ValueError(f"d_model must be a multiple of heads, got {self.d_model} and {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class EduEmotionNetConfig(EncoderConfig):
    """The full model, its ambiguous places and its ablations."""

    cmaa: bool = True
    """Cross-Modality Attention Alignment; without it g = h (ablation -CMAA)."""
    mie: bool = True
    """Modality Importance Estimator; without it every modality weighs the same (ablation -MIE)."""
    tfl: bool = True
    """Temporal Feedback Loop; without it the previous prediction is not fed back (ablation -TFL)."""
    alignment: str = "history"
    """Keys of eq. 4 that the query at t sees: `history` (steps 1..t), `step` (t alone, the literal reading, under
    which the softmax is 1 and g is V_t), or `window:n` (the last n steps)."""
    confidence: str = "sigmoid"
    """Eq. 6: `sigmoid` divided by its sum over modalities, or `softmax` (as the proof of Lemma 1 has it)."""
    detach_feedback: bool = False
    """Stop the gradient at y_{t-1} in eq. 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.confidence not in ("sigmoid", "softmax"):
            raise ValueError(f"confidence must be 'sigmoid' or 'softmax', got {self.confidence!r}")
        if not re.fullmatch(r"history|step|window:[1-9]\d*", self.alignment):
            raise ValueError(f"alignment must be 'history', 'step' or 'window:n', got {self.alignment!r}")


class CrossModalityAlignment(nn.Module):
    """CMAA, equations 4 and 5; W^Q, W^K, W^V carry no modality index in the paper and are shared."""

    def __init__(self, width: int, heads: int, alignment: str, dropout: float) -> None:
        super().__init__()
        # A softmax over one key needs neither query nor key; without a gradient they would also stall DDP.
        attends = alignment != "step"
        self.query = nn.Linear(width, width, bias=False) if attends else nn.Identity()
        self.key = nn.Linear(width, width, bias=False) if attends else nn.Identity()
        self.value = nn.Linear(width, width, bias=False)
        self.heads = heads
        self.alignment = alignment
        self.dropout = dropout

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """g^{i<->j}: projected queries of modality i against keys and values of j, each (B, T, d)."""
        if self.alignment == "step":
            return value  # a softmax over a single key is 1
        q, k, v = (split_heads(part, self.heads) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if self.alignment == "history":
            return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout))
        span = int(self.alignment.removeprefix("window:"))
        steps = torch.arange(q.shape[2], device=q.device)
        age = steps[:, None] - steps[None, :]
        visible = (age >= 0) & (age < span)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout))

    def forward(self, h: list[Tensor]) -> list[Tensor]:
        """h of every modality, (B, T, d) each -> g of every modality, (B, T, d) each."""
        if len(h) == 1:  # nothing to align with: a corpus of one modality
            return [self.attend(self.query(h[0]), self.key(h[0]), self.value(h[0]))]
        queries, keys, values = ([part(x) for x in h] for part in (self.query, self.key, self.value))
        aligned = []
        for i in range(len(h)):
            views = [self.attend(queries[i], keys[j], values[j]) for j in range(len(h)) if j != i]
            aligned.append(sum(views[1:], views[0]) / len(views))
        return aligned


class ModalityImportanceEstimator(nn.Module):
    """MIE, equation 6: one 2-layer MLP scores [h_i, g_i] of every modality; the scores are normalised to weights."""

    def __init__(self, width: int, normalisation: str) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * width, width)
        self.score = nn.Linear(width, 1)
        self.normalisation = normalisation

    def forward(self, h: list[Tensor], g: list[Tensor]) -> Tensor:
        """-> (B, T, M) weights."""
        hidden = [self.hidden(torch.cat(pair, dim=-1)) for pair in zip(h, g, strict=True)]
        return self.weigh(torch.cat([self.score(F.relu(x)) for x in hidden], dim=-1))

    def weigh(self, scores: Tensor) -> Tensor:
        """(..., M) scores -> weights. sigmoid(s) / sum sigmoid(s) is softmax(log sigmoid(s)): it cannot underflow."""
        return F.softmax(F.logsigmoid(scores) if self.normalisation == "sigmoid" else scores, dim=-1)


class EduEmotionNet(nn.Module):
    """The network of the paper's Fig. 2, after the feature extractors."""

    def __init__(
        self,
        config: EduEmotionNetConfig,
        *,
        dimensions: dict[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        self.config = config
        self.modalities = tuple(dimensions)
        self.encoders = nn.ModuleDict(
            {
                name: ModalityEncoder(
                    mean=torch.tensor(statistics.mean[name]),
                    std=torch.tensor(statistics.std[name]),
                    width=config.d_model,
                    layers=config.layers,
                    heads=config.heads,
                    dropout=config.dropout,
                )
                for name in self.modalities
            }
        )
        self.cmaa = (
            CrossModalityAlignment(config.d_model, config.heads, config.alignment, config.dropout)
            if config.cmaa
            else None
        )
        self.mie = ModalityImportanceEstimator(config.d_model, config.confidence) if config.mie else None
        self.dropout = nn.Dropout(config.dropout)
        self.tfl = TemporalFeedbackLoop(config.d_model, classes, feedback=config.tfl, detach=config.detach_feedback)

    def forward(self, batch: SessionBatch) -> Predictions:
        h = [self.encoders[name](batch.features[name], batch.present[name]) for name in self.modalities]
        g = self.cmaa(h) if self.cmaa is not None else h
        weights = self.mie(h, g) if self.mie is not None else h[0].new_full((*h[0].shape[:2], len(h)), 1.0 / len(h))
        z = torch.stack([weights[..., i, None] * g[i] for i in range(len(g))]).sum(0)  # equation 7
        return Predictions(log_probabilities=self.tfl(self.dropout(z)), confidence=weights)
