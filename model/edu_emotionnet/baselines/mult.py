"""MulT, the Multimodal Transformer (Tsai et al., ACL 2019): modalities rewritten by attending to one another.

As published: a bias-free convolution of kernel 1 to width 30; inputs scaled by sqrt(d) with sinusoidal
positions; six crossmodal Transformers of 5 pre-norm layers and 5 heads, whose keys and values are always the
low-level source sequence; per modality, the rewritten sequences are concatenated and pass a self-attention
Transformer of max(layers, 3) layers; a residual MLP over the concatenation of all (180 wide) before the
classifier; causal masks, an option of the published model that is on by default there and always on here.

Adaptations: every step is kept and classified, where the original reads the last step alone; a learned vector
stands for an absent step; with two modalities there are two crossmodal Transformers, and with one it attends
to itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.baselines.layers import MaskedProjection, MultiHeadAttention, check_options
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.encoder import sinusoidal_positions
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register


@dataclass(frozen=True, kw_only=True)
class MulTConfig(EncoderConfig):
    """The published hyperparameters, as defaults: options given for all models, as presets do, replace them."""

    d_model: int = 30
    """Width d of each modality's stream."""
    layers: int = 5
    """Layers of each crossmodal Transformer."""
    heads: int = 5
    """Attention heads of every Transformer."""
    dropout: float = 0.1
    """After attention and feed-forward (residual) and after the ReLU."""
    attention_dropout: float = 0.1
    """On attention weights over text and in the self-attention Transformers; none over audio and visual."""
    embedding_dropout: float = 0.25
    """On inputs after positions are added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)


class CrossmodalBlock(nn.Module):
    """Pre-norm block: the target attends causally to the source, then a feed-forward layer of width 4d."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)  # one norm for target and source
        self.attention = MultiHeadAttention(width, heads, attention_dropout)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, target: Tensor, source: Tensor | None) -> Tensor:
        """(B, T, d), (B, T, d) -> (B, T, d); self-attention where the source is None."""
        query = self.attention_norm(target)
        key = query if source is None else self.attention_norm(source)
        target = target + self.dropout(self.attention(query, key))
        return target + self.dropout(self.feedforward(self.feedforward_norm(target)))


class CrossmodalTransformer(nn.Module):
    """A stack of blocks over scaled inputs with positions."""

    def __init__(self, width: int, layers: int, config: MulTConfig, attention_dropout: float) -> None:
        super().__init__()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(
            CrossmodalBlock(width, config.heads, config.dropout, attention_dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def embed(self, x: Tensor) -> Tensor:
        positions = sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        return self.embedding_dropout(math.sqrt(x.shape[2]) * x + positions)

    def forward(self, target: Tensor, source: Tensor | None = None) -> Tensor:
        """(B, T, d), (B, T, d) -> (B, T, d); self-attention where the source is None."""
        target = self.embed(target)
        if source is not None:
            source = self.embed(source)
        for block in self.blocks:
            target = block(target, source)
        return self.norm(target)


class MulT(nn.Module):
    """Directional pairwise crossmodal attention, then one memory Transformer per modality; causal."""

    def __init__(
        self,
        config: MulTConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        self.modalities = tuple(dimensions)
        self.project = nn.ModuleDict(
            {
                name: MaskedProjection(
                    mean=torch.tensor(statistics.mean[name]),
                    std=torch.tensor(statistics.std[name]),
                    width=config.d_model,
                    bias=False,
                )
                for name in self.modalities
            }
        )
        self.crossmodal = nn.ModuleDict(
            {
                f"{target}_from_{source}": CrossmodalTransformer(
                    config.d_model,
                    config.layers,
                    config,
                    attention_dropout=config.attention_dropout if source == "text" else 0.0,
                )
                for target in self.modalities
                for source in self.sources(target)
            }
        )
        width = len(self.sources(self.modalities[0])) * config.d_model
        self.memory = nn.ModuleDict(
            {
                name: CrossmodalTransformer(width, max(config.layers, 3), config, config.attention_dropout)
                for name in self.modalities
            }
        )
        joined = width * len(self.modalities)
        self.residual = nn.Sequential(nn.Linear(joined, joined), nn.ReLU(), nn.Linear(joined, joined))
        self.classifier = nn.Linear(joined, classes)

    def sources(self, target: str) -> list[str]:
        """Modalities that a target attends to: all others; itself where there is no other."""
        return [name for name in self.modalities if name != target] or [target]

    def forward(self, batch: SessionBatch) -> Predictions:
        x = {name: self.project[name](batch.features[name], batch.present[name]) for name in self.modalities}
        memories = []
        for target in self.modalities:
            rewritten = [
                self.crossmodal[f"{target}_from_{source}"](x[target], x[source]) for source in self.sources(target)
            ]
            memories.append(self.memory[target](torch.cat(rewritten, dim=-1)))
        joined = torch.cat(memories, dim=-1)
        logits = self.classifier(joined + self.residual(joined))
        return Predictions(log_probabilities=F.log_softmax(logits, dim=-1))


register("mult", ModelEntry(config=MulTConfig(), build=MulT))
