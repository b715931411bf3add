"""Wav2Vec2 (Baevski et al. 2020): one vector for about 20 ms of sound, from windows that fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from emolab.features.grid import StepMeans
from emolab.features.signals import SAMPLE_RATE, SoundChunk
from emolab.features.weights import Weights, device, load_transformer, said
from emolab.names import UserError


class Wav2Vec2:
    """Sound -> per step, the mean of the last hidden states whose middle lies in it.

    A recording is cut into windows. Each is read together with some sound before and after it, which only serves as
    context, so that no vector stands at an edge. A recording no longer than a window is read as one, which is exactly
    what the library does with it; loudness is normalised per reading, as the model's own preprocessor says.
    """

    def __init__(self, weights: Weights, *, window_seconds: float, context_seconds: float) -> None:
        """Load the model.

        Raises:
            UserError: the files do not hold a Wav2Vec2 model with its preprocessor.
        """
        from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

        self.model = load_transformer(Wav2Vec2Model, weights)
        try:
            self.normalise = Wav2Vec2FeatureExtractor.from_pretrained(weights.folder, local_files_only=True)
        except Exception as error:  # a missing or damaged one fails in many ways
            raise UserError(
                f"options.{weights.option}: {weights.folder} lacks a usable preprocessor_config.json ({said(error)}): "
                "download it with the model"
            ) from None
        if self.normalise.sampling_rate != SAMPLE_RATE:
            raise UserError(
                f"options.{weights.option}: {weights.folder} hears {str(self.normalise.sampling_rate)[:20]} samples a "
                f"second by its preprocessor_config.json, sound is read at {SAMPLE_RATE}: take another model"
            )
        self.width: int = self.model.config.hidden_size
        self.stride = int(np.prod(self.model.config.conv_stride))
        self.field = _receptive_field(self.model.config.conv_kernel, self.model.config.conv_stride)
        self.window, self.context = (
            max(1, round(seconds * SAMPLE_RATE / self.stride)) * self.stride
            for seconds in (window_seconds, context_seconds)
        )

    @torch.inference_mode()
    def __call__(
        self, sound: Iterable[SoundChunk], step_seconds: float
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(T, D) hidden states and (T,) presence."""
        means = StepMeans(self.width, step_seconds)
        for start, samples, first, last in readings(sound, self.window, self.context):
            if len(samples) < self.field:
                continue
            vectors = self.encode(samples)
            middle = np.arange(len(vectors)) * self.stride + self.field / 2
            kept = (middle >= first) & (middle < last)
            means.add(start + middle[kept] / SAMPLE_RATE, vectors[kept])
        return means.result()

    def encode(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) samples -> (frames, D) last hidden states of one reading."""
        inputs = self.normalise(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        return self.model(inputs.to(device())).last_hidden_state[0].float().cpu().numpy()


def readings(
    sound: Iterable[SoundChunk], window: int, context: int
) -> Iterator[tuple[float, NDArray[np.float32], int, int]]:
    """Windows with their context: (start in seconds, samples, first and last sample that belong to the window)."""
    held, start, done = np.empty(0, dtype=np.float32), 0.0, 0

    def rest() -> Iterator[tuple[float, NDArray[np.float32], int, int]]:
        if len(held) > done:
            yield start, held, done, len(held)

    for chunk in sound:
        if not chunk.continues:
            yield from rest()
            held, start, done = np.empty(0, dtype=np.float32), chunk.seconds, 0
        held = np.concatenate([held, chunk.samples])
        while len(held) >= done + window + context:
            yield start, held[: done + window + context], done, done + window
            kept = min(context, done + window)
            start += (done + window - kept) / SAMPLE_RATE
            held, done = held[done + window - kept :], kept
    yield from rest()


def _receptive_field(kernels: Iterable[int], strides: Iterable[int]) -> int:
    """Samples that one vector of the convolutional encoder sees."""
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field, step = field + (kernel - 1) * step, step * stride
    return field
