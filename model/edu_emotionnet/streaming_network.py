"""Edu-EmotionNet one step at a time: key/value caches for encoders and eq. 4, the previous prediction carried.

At one step the arithmetic is nothing and reading the weights is everything, so the work is laid out for few and
long reads: the encoders of all modalities are one batched product per linear layer; what a LayerNorm scales and
shifts, and the 1 / sqrt(d_k) of the attention, is folded into the weights that follow; keys and values of a step
are written to their place in a cache that is never moved. The numbers are those of ``network.EduEmotionNet`` up to
the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.encoder import CausalBlock, ModalityEncoder, sinusoidal_positions
from edu_emotionnet.network import EduEmotionNet

FIRST_CAPACITY = 64
"""Steps that a cache without a limit has room for at first."""
POSITIONS = 64
"""Rows of the position table that a session computes at a time."""


class Cache(Protocol):
    """Keys and values of the steps so far, for R rows: one per modality and head."""

    def attend(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Take in the keys and values of a step, (2, M, H, d_k), and attend: (R, Q, d_k) queries -> (R, Q, d_k)."""
        ...


class KeyValueCache:
    """Memory for the last ``limit`` steps, or for all of them where it is None; then it doubles when full.

    Attention does not ask for the order of its keys, so a full memory overwrites its oldest step in place.
    """

    def __init__(self, *, modalities: int, heads: int, head_width: int, limit: int | None, like: Tensor) -> None:
        self.limit = limit
        self.steps = 0
        capacity = min(limit or FIRST_CAPACITY, FIRST_CAPACITY)
        self._store(like.new_zeros(2, modalities, heads, capacity, head_width))

    def _store(self, memory: Tensor) -> None:
        self.memory = memory
        self.keys, self.values = memory.flatten(1, 2).unbind(0)

    def attend(self, query: Tensor, key_value: Tensor) -> Tensor:
        capacity = self.memory.shape[3]
        if self.steps == capacity and capacity != self.limit:
            self._grow(capacity)
            capacity = self.memory.shape[3]
        self.memory.select(3, self.steps % capacity).copy_(key_value)
        self.steps += 1
        count = min(self.steps, capacity)
        scores = product(query, self.keys.narrow(1, 0, count).transpose(1, 2))
        return product(torch.softmax(scores, -1), self.values.narrow(1, 0, count))

    def _grow(self, capacity: int) -> None:
        larger = capacity * 2 if self.limit is None else min(capacity * 2, self.limit)
        shape = list(self.memory.shape)
        shape[3] = larger
        memory = self.memory.new_zeros(shape)
        memory[:, :, :, :capacity] = self.memory
        self._store(memory)


class StreamingNetwork(nn.Module):
    """The weights of an Edu-EmotionNet, stacked over its M modalities."""

    frequencies: Tensor
    mix: Tensor
    zeros: Tensor

    def __init__(self, model: EduEmotionNet) -> None:
        super().__init__()
        encoders = [cast(ModalityEncoder, model.encoders[name]) for name in model.modalities]
        self.config = model.config
        self.modalities = model.modalities
        self.width, self.heads = model.config.d_model, model.config.heads
        self.standardise = nn.ModuleList([encoder.standardise for encoder in encoders])
        self.project = nn.ModuleList([encoder.project for encoder in encoders])
        self.absent = nn.Parameter(torch.stack([encoder.absent for encoder in encoders]).detach())
        blocks = zip(*(cast(Iterable[CausalBlock], encoder.blocks) for encoder in encoders), strict=True)
        self.layers = nn.ModuleList([StackedBlock(layer) for layer in blocks])
        self.norm_scale = nn.Parameter(torch.stack([encoder.norm.weight for encoder in encoders]).detach())
        self.norm_shift = nn.Parameter(torch.stack([encoder.norm.bias for encoder in encoders]).detach())
        self.cmaa, self.mie, self.tfl = model.cmaa, model.mie, model.tfl
        if model.cmaa is not None:
            parts = [model.cmaa.value.weight]
            if model.config.alignment != "step":
                query, key = cast(nn.Linear, model.cmaa.query), cast(nn.Linear, model.cmaa.key)
                parts = [query.weight / math.sqrt(self.width // self.heads), key.weight, *parts]
            self.align = nn.Parameter(torch.cat(parts).detach().t().contiguous())
        count = len(encoders)
        others = torch.ones(count, count) - torch.eye(count) if count > 1 else torch.ones(1, 1)
        self.register_buffer("mix", (others / max(1, count - 1)).to(self.absent), persistent=False)
        self.register_buffer("zeros", torch.zeros_like(self.absent).flatten(), persistent=False)
        self.requires_grad_(False)

    def embed(self, features: Mapping[str, Tensor | None], position: Tensor) -> Tensor:
        """Raw features of a step and its (d,) position -> what enters the encoders, (M, 1, d)."""
        rows = []
        for index, name in enumerate(self.modalities):
            value = features.get(name)
            if value is None:
                rows.append(self.absent[index])
            else:
                rows.append(self.project[index](self.standardise[index](value.to(self.absent))))
        return (torch.stack(rows) + position).unsqueeze(1)

    def is_finite(self, h: Tensor) -> bool:
        """Whether no entry is NaN or infinite: only those do not vanish when multiplied by zero."""
        return math.isfinite(torch.dot(h.flatten(), self.zeros))

    def advance(self, h: Tensor, caches: Sequence[Cache], belief: Tensor) -> tuple[Tensor, Tensor]:
        """Everything after the embedding.

        Args:
            h: (M, 1, d) from ``embed``.
            caches: one per encoder layer, then one for eq. 4 where it has a history.
            belief: (1, K), y_{t-1}.

        Returns:
            (1, K) log-probabilities and the (M,) weights of the modalities.
        """
        for layer, cache in zip(self.layers, caches, strict=False):
            h = layer(h, cache, self.heads)
        h = F.layer_norm(h.squeeze(1), (self.width,))
        h = torch.addcmul(self.norm_shift, h, self.norm_scale)
        g = self._align(h, caches[-1]) if self.cmaa is not None else h
        if self.mie is not None:
            hidden = F.relu(self.mie.hidden(torch.cat([h, g], -1)))
            weights = self.mie.weigh(self.mie.score(hidden).squeeze(-1))
        else:
            weights = h.new_full((len(h),), 1.0 / len(h))
        z = torch.mm(weights[None], g)  # equation 7
        return self.tfl.step(self.tfl.fused(z), belief), weights

    def _align(self, h: Tensor, cache: Cache) -> Tensor:
        """Equations 4 and 5 at one step: (M, d) -> (M, d)."""
        projected = torch.mm(h, self.align)
        if self.config.alignment == "step":
            return torch.mm(self.mix, projected)
        count = len(h)
        query, key_value = _split(projected, count, self.heads)
        # Every modality's keys are read once for the queries of all; a modality's view of itself is left out by mix.
        views = cache.attend(query.transpose(0, 1).repeat(count, 1, 1), key_value)
        views = views.view(count, self.heads, count, -1) * self.mix[:, None, :, None]
        return views.sum(0).transpose(0, 1).reshape(count, -1)


class StackedBlock(nn.Module):
    """One Transformer layer of all modalities: weights (M, in, out), biases (M, 1, out)."""

    def __init__(self, blocks: Sequence[CausalBlock]) -> None:
        super().__init__()
        like = blocks[0].output.weight
        width = blocks[0].output.in_features
        scale = torch.ones(3 * width, dtype=torch.float64)
        scale[:width] = 1.0 / math.sqrt(width // blocks[0].heads)
        self.attend_weight, self.attend_bias = _stacked(
            [_folded(block.attention_norm, block.query_key_value, scale) for block in blocks], like
        )
        self.output_weight, self.output_bias = _stacked([_plain(block.output) for block in blocks], like)
        up, down = ([cast(nn.Linear, block.feedforward[place]) for block in blocks] for place in (0, -1))
        norms = [block.feedforward_norm for block in blocks]
        folded = [_folded(norm, linear) for norm, linear in zip(norms, up, strict=True)]
        self.up_weight, self.up_bias = _stacked(folded, like)
        self.down_weight, self.down_bias = _stacked([_plain(linear) for linear in down], like)

    def forward(self, h: Tensor, cache: Cache, heads: int) -> Tensor:
        """(M, 1, d) -> (M, 1, d)."""
        count, _, width = h.shape
        projected = product(F.layer_norm(h, (width,)), self.attend_weight).add_(self.attend_bias)
        query, key_value = _split(projected, count, heads)
        attended = cache.attend(query.reshape(count * heads, 1, -1), key_value).view(count, 1, width)
        h = product(attended, self.output_weight).add_(self.output_bias).add_(h)
        hidden = F.gelu(product(F.layer_norm(h, (width,)), self.up_weight).add_(self.up_bias))
        return product(hidden, self.down_weight).add_(self.down_bias).add_(h)


class SessionMemory:
    """What one session carries from step to step; its size is constant with a window."""

    def __init__(self, network: StreamingNetwork, *, window: int | None) -> None:
        config, like = network.config, network.absent
        limits = cache_limits(network, window)
        shape = {"modalities": len(network.modalities), "heads": config.heads}
        self.caches = [
            KeyValueCache(**shape, head_width=config.d_model // config.heads, limit=limit, like=like)
            for limit in limits
        ]
        classes = network.tfl.classifier.out_features
        self.belief = like.new_full((1, classes), 1.0 / classes)
        self.steps = 0
        self._width = config.d_model
        self._table = like.new_zeros(0)

    def position(self) -> Tensor:
        """(d,) position of the step to come."""
        row = self.steps % POSITIONS
        if row == 0:
            table = sinusoidal_positions(POSITIONS, self._width, self.belief.device, first=self.steps)
            self._table = table.to(self.belief.dtype)
        return self._table[row]

    def moved_on(self, probabilities: Tensor) -> None:
        """The step is done."""
        self.belief = probabilities
        self.steps += 1


def cache_limits(network: StreamingNetwork, window: int | None) -> list[int | None]:
    """How many steps each cache keeps: encoder layers first, then eq. 4 where it has a history; None is all."""
    limits: list[int | None] = [window] * network.config.layers
    alignment = network.config.alignment
    if network.cmaa is not None and alignment != "step":
        span = int(alignment.removeprefix("window:")) if alignment != "history" else None
        limits.append(min((value for value in (span, window) if value is not None), default=None))
    return limits


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight for one or a few rows of x, over leading axes that agree.

    On a CPU numpy's BLAS does it: torch's takes another, slower path for a single row on some processors.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return torch.matmul(x, weight)
    return torch.from_numpy(np.matmul(x.numpy(), weight.numpy()))


def _split(projected: Tensor, count: int, heads: int) -> tuple[Tensor, Tensor]:
    """Queries, keys and values side by side -> (M, H, d_k) queries and (2, M, H, d_k) keys and values."""
    parts = projected.view(count, 3, heads, -1)
    return parts[:, 0], parts[:, 1:].transpose(0, 1)


def _folded(norm: nn.LayerNorm, linear: nn.Linear, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """linear(norm(x)) * scale = (x - mean) / std @ weight + bias: weight (in, out) and bias (out,), in float64."""
    weight = linear.weight.double() * (scale[:, None] if scale is not None else 1.0)
    bias = weight @ norm.bias.double()
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    return (weight * norm.weight.double()).t(), bias


def _plain(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.t(), linear.bias


def _stacked(parts: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    weight = torch.stack([weight for weight, _ in parts]).to(like).detach()
    bias = torch.stack([bias[None] for _, bias in parts]).to(like).detach()
    return nn.Parameter(weight.contiguous()), nn.Parameter(bias)
