"""Layers that several baselines share. No model is registered here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.encoder import ModalityEncoder, Standardise, merge_heads, split_heads
from edu_emotionnet.network import EncoderConfig


def check_options(config: Any, *, at_least_one: tuple[str, ...] = ()) -> None:
    """Every option named `...dropout` is a probability below 1, every option listed is a positive count.

    Raises:
        ValueError: naming the option and the value it has.
    """
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name.endswith("dropout") and not 0.0 <= value < 1.0:
            raise ValueError(f"{option.name} must lie in [0, 1), got {value}")
        if option.name in at_least_one and value < 1:
            raise ValueError(f"{option.name} must be at least 1, got {value}")
        if option.name.endswith("_weight") and value < 0.0:
            raise ValueError(f"{option.name} must not be negative, got {value}")


class ModalityEncoders(nn.ModuleDict):
    """The full model's encoders (equations 1-3), one per modality."""

    def __init__(self, config: EncoderConfig, *, dimensions: Mapping[str, int], statistics: FeatureStatistics) -> None:
        super().__init__(
            {
                name: ModalityEncoder(
                    mean=torch.tensor(statistics.mean[name]),
                    std=torch.tensor(statistics.std[name]),
                    width=config.d_model,
                    layers=config.layers,
                    heads=config.heads,
                    dropout=config.dropout,
                )
                for name in dimensions
            }
        )

    def forward(self, batch: SessionBatch) -> list[Tensor]:
        """h of every modality, (B, T, d_model) each."""
        return [encoder(batch.features[name], batch.present[name]) for name, encoder in self.items()]


class MaskedProjection(nn.Module):
    """Standardise and project features step by step; an absent step enters as one learned vector."""

    def __init__(self, *, mean: Tensor, std: Tensor, width: int, bias: bool) -> None:
        super().__init__()
        self.standardise = Standardise(mean, std)
        self.project = nn.Linear(mean.numel(), width, bias=bias)
        self.absent = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, width)."""
        mask = present[..., None]
        # Masked before the product: NaN * 0 is NaN in the backward pass.
        projected = self.project(self.standardise(features).masked_fill(~mask, 0.0))
        return torch.where(mask, projected, self.absent)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of one sequence to another of the same length."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, target: Tensor, source: Tensor, visible: Tensor | None = None) -> Tensor:
        """Queries (B, T, d), keys and values (B, T, d) -> (B, T, d).

        Step t sees steps 1..t; or, where `visible` (B, T) is given, every step that is true there.
        """
        q = split_heads(self.query(target), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.key_value(source).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        if visible is None:
            return self.output(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)))
        mask = visible[:, None, None, :]
        return self.output(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)))


class ClassifierHead(nn.Sequential):
    """Representation -> log-probabilities; the shape of the full model's head without the feedback."""

    def __init__(self, inputs: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__(
            nn.Dropout(dropout),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
            nn.LogSoftmax(dim=-1),
        )
