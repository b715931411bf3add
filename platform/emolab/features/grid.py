"""The step grid: where seconds become steps, and what happens in a step becomes one feature vector or one label."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import IGNORED_LABEL

_ROUNDING = 1e-6
"""Seconds by which a time may miss a step boundary and still count as on it: containers store rounded times."""


class Word(NamedTuple):
    """A spoken word and its interval in seconds of the session."""

    start: float
    end: float
    text: str


class LabelledSpan(NamedTuple):
    """An annotation and its interval in seconds of the session."""

    start: float
    end: float
    label: str


def steps_of(seconds: NDArray[np.floating] | Sequence[float], step_seconds: float) -> NDArray[np.int64]:
    """The step in which each time lies. Step t covers [t, t + 1) * step_seconds."""
    return np.floor((np.asarray(seconds, dtype=np.float64) + _ROUNDING) / step_seconds).astype(np.int64)


def steps_covering(seconds: float, step_seconds: float) -> int:
    """The number of steps that a recording of this length needs."""
    return max(0, math.ceil((seconds - _ROUNDING) / step_seconds))


class StepMeans:
    """Running means per step: feature vectors come in with their times, a (T, D) matrix and its mask go out.

    Memory grows with the number of steps, not with what comes in.
    """

    def __init__(self, width: int, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self._sums = np.zeros((64, width), dtype=np.float64)
        self._counts = np.zeros(64, dtype=np.int64)
        self._steps = 0

    def add(self, seconds: NDArray[np.floating] | Sequence[float], vectors: NDArray[np.floating]) -> None:
        """Count each of the (n, D) vectors in the step of its time; what lies before 0 s is left out."""
        steps = steps_of(seconds, self.step_seconds)
        kept = steps >= 0
        self.add_to_steps(steps[kept], vectors[kept])

    def add_to_steps(self, steps: NDArray[np.int64], vectors: NDArray[np.floating]) -> None:
        """The same for vectors whose steps are known."""
        if len(steps) == 0:
            return
        self._grow(int(steps.max()) + 1)
        np.add.at(self._sums, steps, vectors)
        np.add.at(self._counts, steps, 1)

    def result(
        self, *, shift: NDArray[np.float64] | float = 0.0, scale: NDArray[np.float64] | float = 1.0
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(T, D) means of (vector - shift) / scale and (T,) presence; a step without a vector is absent and zero."""
        present = self._counts[: self._steps] > 0
        means = self._sums[: self._steps] / np.maximum(self._counts[: self._steps, None], 1)
        return np.where(present[:, None], (means - shift) / scale, 0.0).astype(np.float32), present

    def _grow(self, steps: int) -> None:
        self._steps = max(self._steps, steps)
        if steps > len(self._counts):
            size = max(steps, 2 * len(self._counts))
            sums, counts = self._sums, self._counts
            self._sums, self._counts = np.zeros((size, sums.shape[1])), np.zeros(size, dtype=np.int64)
            self._sums[: len(sums)], self._counts[: len(counts)] = sums, counts


def fitted(features: NDArray[Any], present: NDArray[Any], steps: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features and mask on exactly ``steps`` steps: the end is cut, or filled up as absent."""
    matrix = np.zeros((steps, features.shape[1]), dtype=np.float32)
    mask = np.zeros(steps, dtype=np.bool_)
    kept = min(steps, len(features))
    matrix[:kept], mask[:kept] = features[:kept], present[:kept]
    matrix[~mask] = 0
    return matrix, mask


def step_labels(
    spans: Iterable[tuple[float, float, int]], *, steps: int, seconds: float, step_seconds: float
) -> NDArray[np.int64]:
    """(T,) class of each step: the one that covers most of it, of equals the lower index.

    A class must cover at least half of the step's time inside the recording; otherwise the step is unlabelled.

    Args:
        spans: (start, end, class) in seconds; a class below 0 is no label, and time that several spans of one class
            cover counts once.
        seconds: length of the recording, which may end inside its last step.
    """
    covered: dict[tuple[int, int], float] = {}
    for start, end, index in _united(spans):
        first, last = max(0, int(start // step_seconds)), min(steps, steps_covering(end, step_seconds))
        for step in range(first, last if index >= 0 else first):
            overlap = min(end, seconds, (step + 1) * step_seconds) - max(start, step * step_seconds)
            covered[step, index] = covered.get((step, index), 0.0) + max(0.0, overlap)
    labels = np.full(steps, IGNORED_LABEL, dtype=np.int64)
    best = np.zeros(steps)
    for (step, index), overlap in sorted(covered.items()):
        inside = min(seconds, (step + 1) * step_seconds) - step * step_seconds
        if overlap > best[step] + _ROUNDING and overlap >= inside / 2 - _ROUNDING:
            best[step], labels[step] = overlap, index
    return labels


def _united(spans: Iterable[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Spans that overlap and have one class as one span."""
    united: list[tuple[float, float, int]] = []
    for start, end, index in sorted(spans, key=lambda span: (span[2], span[0])):
        if united and united[-1][2] == index and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end), index)
        else:
            united.append((start, end, index))
    return united
