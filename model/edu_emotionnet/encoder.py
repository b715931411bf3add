"""Modality encoders, equations 1-3: standardise, project to the model's width, causal Transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardise(nn.Module):
    """(x - mean) / std with the training split's statistics, kept in the checkpoint so that a model is whole."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float().clamp_min(1e-6))  # a constant feature stays finite

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def sinusoidal_positions(steps: int, width: int, device: torch.device, *, first: int = 0) -> Tensor:
    """(steps, width) fixed positions of Vaswani et al. (2017), from ``first`` on: for a session of any length."""
    position = torch.arange(first, first + steps, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(1e4) / width))
    table = torch.zeros(steps, width, device=device)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: width // 2])
    return table


class CausalBlock(nn.Module):
    """Pre-norm Transformer block in which step t attends to steps 1..t only."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        # No bias: a key's bias cancels in the softmax, so its gradient would be rounding noise, which Adam enlarges.
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        attended = self.attend(self.query_key_value(self.attention_norm(h)))
        h = h + self.residual_dropout(self.output(attended))
        return h + self.residual_dropout(self.feedforward(self.feedforward_norm(h)))

    def attend(self, query_key_value: Tensor) -> Tensor:
        """(B, T, 3 width) query, key and value of every step -> (B, T, width), before the output projection."""
        q, k, v = (split_heads(part, self.heads) for part in query_key_value.chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d_k) -> (B, heads, T, d_k)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, d_k) -> (B, T, heads * d_k)."""
    return x.transpose(1, 2).flatten(-2)


class ModalityEncoder(nn.Module):
    """Raw features of one modality -> h, (B, T, width).

    Steps at which the modality is absent enter as one learned vector (zero at the start), whatever the feature
    tensor holds there. Padding needs no mask: it lies after every real step, where causal attention cannot look.
    """

    def __init__(self, *, mean: Tensor, std: Tensor, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.standardise = Standardise(mean, std)
        self.project = nn.Linear(mean.numel(), width)
        self.absent = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, width)."""
        return self.contextualise(self.embed(features, present))

    def embed(self, features: Tensor, present: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, width): what the first block sees, every step on its own."""
        mask = present[..., None]
        # Masked before the projection too: garbage may be NaN, and NaN * 0 is NaN in the backward pass.
        projected = self.project(self.standardise(features).masked_fill(~mask, 0.0))
        return self.place(torch.where(mask, projected, self.absent))

    def place(self, tokens: Tensor) -> Tensor:
        """(B, T, width) projected or absent steps -> the same at their positions."""
        _, steps, width = tokens.shape
        return self.dropout(tokens + sinusoidal_positions(steps, width, tokens.device).to(tokens.dtype))

    def contextualise(self, h: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width): every step with what came before it."""
        for block in self.blocks:
            h = block(h)
        return self.norm(h)
