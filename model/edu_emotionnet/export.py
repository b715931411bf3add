"""Edu-EmotionNet for a device: one streaming step as an ONNX graph, its memory handed in and out.

The graph has a window, so every shape is fixed and no step costs more than another. Inputs and outputs are those
of ``StreamingStep``; the caller keeps the memory between steps and begins with ``first_state``. What the step
computes is ``streaming.streaming(..., window=window)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from edu_emotionnet.network import EduEmotionNet
from edu_emotionnet.streaming_network import StreamingNetwork, cache_limits

OPSET = 20
"""The ONNX operator set that is written; GELU is an operator of its own from here on."""


class TracedLinear(nn.Module):
    """A linear layer in operations that a graph knows, its weight as one matrix: what quantisation looks for."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class MaskedCache:
    """Keys and values as a value: (2, M, H, n, d_k), of which the entries of steps not taken yet are masked."""

    def __init__(self, memory: Tensor, step: Tensor) -> None:
        self.memory = memory
        places = torch.arange(memory.shape[3])
        self.here = (places == step % memory.shape[3])[:, None]
        self.bias = torch.zeros(memory.shape[3]).masked_fill(places > step, -math.inf)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.memory = torch.where(self.here, torch.stack([key, value]).unsqueeze(3), self.memory)
        keys, values = self.memory.flatten(1, 2).unbind(0)
        scores = torch.matmul(query, keys.transpose(1, 2)) + self.bias
        return torch.matmul(torch.softmax(scores, -1), values)


class StreamingStep(nn.Module):
    """(step, belief, presence, features, memory) -> (probabilities, confidence, memory).

    - step: () int64, counted from 0;
    - belief: (1, K), the probabilities of the step before, uniform at first;
    - present: (M,) bool, in the order of the modalities;
    - features: per modality (D_m,) raw features, anything finite where not present;
    - memory: per encoder layer, then for equation 4 where it has a history, (2, M, H, n, d_k) keys and values,
      zeros at first.
    """

    frequencies: Tensor

    def __init__(self, model: EduEmotionNet, *, window: int) -> None:
        super().__init__()
        self.network = StreamingNetwork(model, TracedLinear)
        self.limits = [limit or window for limit in cache_limits(self.network, window)]
        width = model.config.d_model
        self.register_buffer("frequencies", torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width)))

    def forward(
        self, step: Tensor, belief: Tensor, present: Tensor, features: list[Tensor], memory: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        network = self.network
        angle = step.to(self.frequencies) * self.frequencies
        position = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten()[: network.width]
        rows = []
        for index, value in enumerate(features):
            rows.append(torch.where(present[index], network.project_step(index, value), network.absent[index]))
        h = (torch.stack(rows) + position).unsqueeze(1)
        caches = [MaskedCache(part, step) for part in memory]
        log_probabilities, weights = network.advance(h, caches, belief)
        return log_probabilities.exp(), weights, [cache.memory for cache in caches]

    def first_state(self) -> tuple[Tensor, list[Tensor]]:
        """Belief and memory before the first step."""
        config, count = self.network.config, len(self.network.modalities)
        classes = self.network.tfl.classifier.out_features
        head_width = config.d_model // config.heads
        memory = [torch.zeros(2, count, config.heads, limit, head_width) for limit in self.limits]
        return torch.full((1, classes), 1.0 / classes), memory


def export_step(model: EduEmotionNet, path: Path, *, dimensions: Mapping[str, int], window: int) -> StreamingStep:
    """Write the streaming step as an ONNX file.

    Args:
        model: in float32.
        path: of the file.
        dimensions: modality -> number of features, those the model was built with.
        window: steps that attention sees.

    Returns:
        The step that was written, for comparison.

    Raises:
        ValueError: a window below 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 step, got {window}")
    step = StreamingStep(model.eval(), window=window).eval()
    belief, memory = step.first_state()
    arguments = (
        torch.tensor(0),
        belief,
        torch.ones(len(dimensions), dtype=torch.bool),
        [torch.zeros(size) for size in dimensions.values()],
        memory,
    )
    inputs, outputs = graph_names(step, tuple(dimensions))
    torch.onnx.export(
        step, arguments, path, input_names=inputs, output_names=outputs,
        opset_version=OPSET, dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    return step


def graph_names(step: StreamingStep, modalities: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs, in order."""
    parts = [f"memory.{index}" for index in range(len(step.limits))]
    inputs = ["step", "belief", "present", *modalities, *parts]
    return inputs, ["probabilities", "confidence", *(f"next_{part}" for part in parts)]
