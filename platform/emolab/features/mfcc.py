"""Mel-frequency cepstral coefficients as in the paper: 40, windows of 25 ms every 10 ms, normalised per session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from emolab.features.grid import StepMeans
from emolab.features.signals import SAMPLE_RATE, SoundChunk

if TYPE_CHECKING:
    from torchaudio.transforms import MFCC

COEFFICIENTS = 40
WINDOW = SAMPLE_RATE * 25 // 1000
"""Samples of a window."""
HOP = SAMPLE_RATE * 10 // 1000
"""Samples from one window's start to the next one's."""


def transform() -> MFCC:
    """(n,) samples -> (40, windows): window k covers samples [160 k, 160 k + 400) and nothing else.

    The logarithm is taken of the mel energies as they are. Decibels below the loudest moment, torchaudio's other
    scale, would make every window depend on the whole recording.
    """
    from torchaudio.transforms import MFCC  # when it is used: options of a corpus are asked for more often

    return MFCC(
        sample_rate=SAMPLE_RATE,
        n_mfcc=COEFFICIENTS,
        log_mels=True,
        melkwargs={"n_fft": WINDOW, "hop_length": HOP, "n_mels": COEFFICIENTS, "center": False},
    )


class Mfcc:
    """Sound -> per step, the mean of its windows' coefficients; a window belongs to the step of its middle."""

    width = COEFFICIENTS

    def __init__(self) -> None:
        self.transform = transform()

    @torch.inference_mode()
    def __call__(
        self, sound: Iterable[SoundChunk], step_seconds: float
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(T, 40) coefficients and (T,) presence.

        Over all windows of the session, every coefficient gets mean 0 and standard deviation 1 before pooling; one
        that never changes becomes 0.
        """
        means, moments = StepMeans(self.width, step_seconds), _Moments(self.width)
        for start, samples in _windows(sound):
            vectors = self.transform(torch.from_numpy(samples)).T.numpy().astype(np.float64)
            moments.add(vectors)
            means.add(start + (np.arange(len(vectors)) * HOP + WINDOW / 2) / SAMPLE_RATE, vectors)
        return means.result(shift=moments.mean, scale=moments.deviation)


def _windows(sound: Iterable[SoundChunk]) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """The sound again, in overlapping pieces that hold whole windows, each window in exactly one of them."""
    rest, start = np.empty(0, dtype=np.float32), 0.0
    for chunk in sound:
        if not chunk.continues:
            rest, start = np.empty(0, dtype=np.float32), chunk.seconds
        samples = np.concatenate([rest, chunk.samples])
        count = max(0, (len(samples) - WINDOW) // HOP + 1)
        if count:
            yield start, samples[: (count - 1) * HOP + WINDOW]
        rest, start = samples[count * HOP :], start + count * HOP / SAMPLE_RATE


class _Moments:
    """Mean and standard deviation of vectors that come in groups (Chan, Golub and LeVeque 1979)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._squares = np.zeros(width)

    def add(self, vectors: NDArray[np.float64]) -> None:
        mean, total = vectors.mean(axis=0), self.count + len(vectors)
        away = mean - self.mean
        self._squares += np.square(vectors - mean).sum(axis=0) + away**2 * self.count * len(vectors) / total
        self.mean = self.mean + away * len(vectors) / total
        self.count = total

    @property
    def deviation(self) -> NDArray[np.float64]:
        deviation = np.sqrt(self._squares / max(1, self.count))
        return np.where(deviation > 1e-6, deviation, 1.0)
