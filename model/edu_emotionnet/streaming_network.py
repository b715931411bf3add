"""Edu-EmotionNet one step at a time: key/value caches for encoders and eq. 4, the previous prediction carried.

At one step the arithmetic is nothing and reading the weights is everything, so the work is laid out for few and
long reads: the encoders of all modalities are one batched product per linear layer, whose weights lie in the order
in which they are read; what a LayerNorm scales and shifts, and the 1 / sqrt(d_k) of the attention, is folded into
the weights that follow; keys and values of a step are written to their place in a cache; all weights are one piece
of memory, and so are all caches of a session. The numbers are those of ``network.EduEmotionNet`` up to the rounding
of float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu_emotionnet.encoder import CausalBlock, ModalityEncoder, sinusoidal_positions
from edu_emotionnet.network import EduEmotionNet

FIRST_CAPACITY = 64
"""Steps that a cache without a limit has room for at first."""
POSITIONS = 64
"""Rows of the position table that a session computes at a time."""
PANEL = 16
"""Columns of a weight that lie together; a step is as fast with 32 and slower with 64."""

Array = npt.NDArray[Any]


class MakeLinear(Protocol):
    """A module that computes x @ weight + bias for S stacked layers: (S, R, in) -> (S, R, out)."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """From (S, in, out) and (S, 1, out), or no bias."""
        ...


class PanelledLinear(nn.Module):
    """A linear layer for one or a few rows on a CPU, by numpy's BLAS.

    BLAS takes a row-major matrix some rows at a time, hopping between them, and the hardware does not read ahead of
    hops. So the columns are cut into panels, each whole in memory: the weight then is read front to back.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        columns = weight.shape[2]
        width = PANEL if columns % PANEL == 0 else columns
        panels = weight.unflatten(2, (columns // width, width)).transpose(1, 2)
        self.panels: Array = panels.contiguous().numpy()
        """(S, P, in, out / P)"""
        self.bias: Array | None = None if bias is None else bias.numpy()

    def forward(self, x: Tensor) -> Tensor:
        products = np.matmul(x.numpy()[:, None], self.panels)  # (S, P, R, out / P)
        y = products.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        if self.bias is not None:
            y += self.bias
        return torch.from_numpy(y)


def pieces(shapes: Sequence[Sequence[int]], dtype: npt.DTypeLike) -> list[Array]:
    """Zeros of these shapes, one behind the other in one piece of memory.

    For large pieces of memory numpy asks for huge pages (on Linux), in which hardware reads ahead further.
    """
    sizes = [math.prod(shape) for shape in shapes]
    parts = np.split(np.zeros(sum(sizes), dtype), np.cumsum(sizes))
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=False)]  # the last part is empty


class Cache(Protocol):
    """Keys and values of the steps so far, for R rows: one per modality and head."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The key and value of a step, (M, H, d_k) each, beside those so far: (R, Q, d_k) queries -> (R, Q, d_k)."""
        ...


class KeyValueCache:
    """Keys and values of a session in a part of its memory: of the last ``limit`` steps, or of all.

    Attention does not ask for the order of its keys, so a full memory overwrites its oldest step in place. A step
    counts once ``steps`` says so: until then another try at it writes to the same place, whose old content no later
    step would see.
    """

    def __init__(self, *, rows: int, width: int, limit: int | None, like: Tensor) -> None:
        self.limit = limit
        self.steps = 0
        self.memory: Array = like.new_zeros(2, rows, 0, width).numpy()
        """(2, R, steps, d_k) keys and values."""

    def shape(self, capacity: int) -> tuple[int, ...]:
        """Of a memory for so many steps, of those that the cache keeps."""
        _, rows, _, width = self.memory.shape
        return 2, rows, min(capacity, self.limit or capacity), width

    def move(self, memory: Array) -> None:
        """Move into a larger memory."""
        memory[:, :, : self.memory.shape[2]] = self.memory
        self.memory = memory

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.memory[0], self.memory[1]
        rows, capacity, width = keys.shape
        place = self.steps % capacity
        keys[:, place] = key.numpy().reshape(rows, width)
        values[:, place] = value.numpy().reshape(rows, width)
        count = min(self.steps + 1, capacity)
        scores = np.matmul(query.numpy(), keys[:, :count].swapaxes(1, 2))
        weights = torch.softmax(torch.from_numpy(scores), -1)
        return torch.from_numpy(np.matmul(weights.numpy(), values[:, :count]))


class StreamingNetwork(nn.Module):
    """Copies of the weights of an Edu-EmotionNet, stacked over its M modalities, on the CPU."""

    mix: Tensor

    def __init__(self, model: EduEmotionNet, linear: MakeLinear = PanelledLinear) -> None:
        super().__init__()
        model = copy.deepcopy(model).requires_grad_(False).cpu()
        encoders = [cast(ModalityEncoder, model.encoders[name]) for name in model.modalities]
        self.config = model.config
        self.modalities = model.modalities
        self.width, self.heads = model.config.d_model, model.config.heads
        self.standardise = nn.ModuleList([encoder.standardise for encoder in encoders])
        self.project = nn.ModuleList([linear(*_stacked([_plain(encoder.project)])) for encoder in encoders])
        self.absent = _constant(torch.stack([encoder.absent for encoder in encoders]))
        blocks = zip(*(cast(Iterable[CausalBlock], encoder.blocks) for encoder in encoders), strict=True)
        self.layers = nn.ModuleList([StackedBlock(layer, linear) for layer in blocks])
        self.norm_scale = _constant(torch.stack([encoder.norm.weight for encoder in encoders]))
        self.norm_shift = _constant(torch.stack([encoder.norm.bias for encoder in encoders]))
        self.align: nn.Module | None = None
        if model.cmaa is not None:
            parts = [model.cmaa.value.weight]
            if model.config.alignment != "step":
                query, key = cast(nn.Linear, model.cmaa.query), cast(nn.Linear, model.cmaa.key)
                parts = [query.weight / math.sqrt(self.width // self.heads), key.weight, *parts]
            self.align = linear(torch.cat(parts).t()[None], None)
        self.mie, self.tfl = model.mie, model.tfl
        if self.mie is not None:
            self.hidden = linear(*_stacked([_plain(self.mie.hidden)]))
        self.fused = linear(*_stacked([_plain(self.tfl.fused)]))
        count = len(encoders)
        others = torch.ones(count, count) - torch.eye(count) if count > 1 else torch.ones(1, 1)
        self.register_buffer("mix", (others / max(1, count - 1)).to(self.absent), persistent=False)
        panelled = [layer for layer in self.modules() if isinstance(layer, PanelledLinear)]
        places = pieces([layer.panels.shape for layer in panelled], self.absent.numpy().dtype)
        for layer, place in zip(panelled, places, strict=True):
            place[...] = layer.panels
            layer.panels = place

    def embed(self, features: Mapping[str, Tensor | None], position: Tensor) -> Tensor:
        """Raw features of a step and its (d,) position -> what enters the encoders, (M, 1, d)."""
        rows = []
        for index, name in enumerate(self.modalities):
            value = features.get(name)
            if value is None:
                rows.append(self.absent[index])
            else:
                rows.append(self.project_step(index, value.to(self.absent)))
        return (torch.stack(rows) + position).unsqueeze(1)

    def project_step(self, index: int, value: Tensor) -> Tensor:
        """(D_m,) raw features of the modality -> (d,)."""
        return self.project[index](self.standardise[index](value)[None, None])[0, 0]

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
        g = h if self.align is None else self._aligned(self.align(h[None])[0], caches[-1])
        if self.mie is not None:
            hidden = F.relu(self.hidden(torch.cat([h, g], -1)[None])[0])
            weights = self.mie.weigh(self.mie.score(hidden).squeeze(-1))
        else:
            weights = h.new_full((len(h),), 1.0 / len(h))
        z = torch.mm(weights[None], g)  # equation 7
        return self.tfl.step(self.fused(z[None])[0], belief), weights

    def _aligned(self, projected: Tensor, cache: Cache) -> Tensor:
        """Equations 4 and 5 at one step: (M, 3 d) queries, keys and values, or (M, d) values alone -> (M, d)."""
        if self.config.alignment == "step":
            return torch.mm(self.mix, projected)
        count = len(projected)
        query, key, value = _split(projected, count, self.heads)
        # Every modality's keys are read once for the queries of all; a modality's view of itself is left out by mix.
        views = cache.attend(query.transpose(0, 1).repeat(count, 1, 1), key, value)
        views = views.view(count, self.heads, count, -1) * self.mix[:, None, :, None]
        return views.sum(0).transpose(0, 1).reshape(count, -1)


class StackedBlock(nn.Module):
    """One Transformer layer of all modalities."""

    def __init__(self, blocks: Sequence[CausalBlock], linear: MakeLinear) -> None:
        super().__init__()
        width = blocks[0].output.in_features
        scale = torch.ones(3 * width, dtype=torch.float64)
        scale[:width] = 1.0 / math.sqrt(width // blocks[0].heads)
        self.attend = linear(
            *_stacked([_folded(block.attention_norm, block.query_key_value, scale) for block in blocks])
        )
        self.output = linear(*_stacked([_plain(block.output) for block in blocks]))
        up, down = ([cast(nn.Linear, block.feedforward[place]) for block in blocks] for place in (0, -1))
        norms = [block.feedforward_norm for block in blocks]
        self.up = linear(*_stacked([_folded(norm, layer) for norm, layer in zip(norms, up, strict=True)]))
        self.down = linear(*_stacked([_plain(layer) for layer in down]))

    def forward(self, h: Tensor, cache: Cache, heads: int) -> Tensor:
        """(M, 1, d) -> (M, 1, d)."""
        count, _, width = h.shape
        query, key, value = _split(self.attend(F.layer_norm(h, (width,))), count, heads)
        attended = cache.attend(query.reshape(count * heads, 1, -1), key, value).view(count, 1, width)
        h = h + self.output(attended)
        return h + self.down(F.gelu(self.up(F.layer_norm(h, (width,)))))


class SessionMemory:
    """What one session carries from step to step; its size is constant with a window."""

    def __init__(self, network: StreamingNetwork, *, window: int | None) -> None:
        config, like = network.config, network.absent
        rows, width = len(network.modalities) * config.heads, config.d_model // config.heads
        limits = cache_limits(network, window)
        self.caches = [KeyValueCache(rows=rows, width=width, limit=limit, like=like) for limit in limits]
        classes = network.tfl.classifier.out_features
        self.belief = like.new_full((1, classes), 1.0 / classes)
        self.steps = 0
        self._capacity = 0
        self._longest = None if None in limits else max(limit for limit in limits if limit is not None)
        self._width = config.d_model
        self._table = like.new_zeros(0)

    def begin_step(self) -> Tensor:
        """Make room for a step; its position, (d,)."""
        if self.steps == self._capacity and (self._longest is None or self._capacity < self._longest):
            self._grow(max(FIRST_CAPACITY, 2 * self._capacity))
        row = self.steps % POSITIONS
        if row == 0:
            table = sinusoidal_positions(POSITIONS, self._width, self.belief.device, first=self.steps)
            self._table = table.to(self.belief.dtype)
        return self._table[row]

    def _grow(self, capacity: int) -> None:
        shapes = [cache.shape(capacity) for cache in self.caches]
        for cache, memory in zip(self.caches, pieces(shapes, self.belief.numpy().dtype), strict=True):
            cache.move(memory)
        self._capacity = capacity

    def end_step(self, probabilities: Tensor) -> None:
        """The step is done; one that is not leaves the session as it was."""
        self.belief = probabilities
        self.steps += 1
        for cache in self.caches:
            cache.steps = self.steps


def cache_limits(network: StreamingNetwork, window: int | None) -> list[int | None]:
    """How many steps each cache keeps: encoder layers first, then eq. 4 where it has a history; None is all."""
    limits: list[int | None] = [window] * network.config.layers
    alignment = network.config.alignment
    if network.align is not None and alignment != "step":
        span = int(alignment.removeprefix("window:")) if alignment != "history" else None
        limits.append(min((value for value in (span, window) if value is not None), default=None))
    return limits


def _split(projected: Tensor, count: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values side by side -> (M, H, d_k) of each."""
    query, key, value = projected.view(count, 3, heads, -1).unbind(1)
    return query, key, value


def _folded(norm: nn.LayerNorm, linear: nn.Linear, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """linear(norm(x)) * scale = (x - mean) / std @ weight + bias: weight (in, out) and bias (out,), by float64."""
    weight = linear.weight.double() * (scale[:, None] if scale is not None else 1.0)
    bias = weight @ norm.bias.double()
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    return (weight * norm.weight.double()).t().to(linear.weight), bias.to(linear.weight)


def _plain(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.t(), linear.bias


def _stacked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weights (in, out) and biases (out,) of S layers -> (S, in, out) and (S, 1, out)."""
    return torch.stack([weight for weight, _ in parts]), torch.stack([bias[None] for _, bias in parts])


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
