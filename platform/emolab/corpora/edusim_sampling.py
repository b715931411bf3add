"""Sampling from EduSim's process. Every value is a function of (seed, stream, index) alone.

Plain sums stand where matrix products would do: BLAS may round differently with another number of threads,
and the bytes of a shard must not depend on that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.corpus import Split
from emolab.corpora.edusim_process import (
    GAIN_DEVIATION,
    LACKING_PROBABILITY,
    LENGTH_RANGE,
    OFFSET_DEVIATION,
    PROCESSES,
    SIGNAL_WIDTH,
    class_start,
    class_steps,
)

_SESSION_STREAM, _SPEAKER_STREAM, _PROJECTION_STREAM, _SPLIT_STREAM = range(4)


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenSession:
    """What a session's observations are drawn from."""

    classes: NDArray[np.int64]
    """(T,) class indices."""
    conditions: Mapping[str, NDArray[np.int64]]
    """Modality -> (T,), 0 clean."""
    present: Mapping[str, NDArray[np.bool_]]
    """Modality -> (T,)."""


def session_generator(seed: int, index: int) -> np.random.Generator:
    """Random numbers of one session: ``sample_hidden`` takes the first, ``sample_features`` those after."""
    return np.random.default_rng([seed, _SESSION_STREAM, index])


def sample_hidden(generator: np.random.Generator, *, dominant: int, mean_steps: int) -> HiddenSession:
    """Length, classes, conditions and presence of one session."""
    shortest, longest = (max(1, round(factor * mean_steps)) for factor in LENGTH_RANGE)
    steps = int(generator.integers(shortest, longest + 1))
    lacking = generator.random() < LACKING_PROBABILITY
    lacked = MODALITIES[int(generator.integers(len(MODALITIES)))] if lacking else None
    start, step = _class_tables()[dominant]
    draws = generator.random(steps).tolist()
    classes = [bisect_right(start, draws[0])]
    for draw in draws[1:]:
        classes.append(bisect_right(step[classes[-1]], draw))
    conditions, present = {}, {}
    for modality in MODALITIES:
        conditions[modality] = _sample_conditions(generator, modality, classes)
        observed = PROCESSES[modality].observed[conditions[modality]]
        present[modality] = (generator.random(steps) < observed) & (modality != lacked)
    return HiddenSession(classes=np.array(classes, dtype=np.int64), conditions=conditions, present=present)


def sample_features(
    generator: np.random.Generator, modality: str, hidden: HiddenSession, means: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(T, D) observations of one modality, zero where absent. means: (C, K, D) from ``speaker_means``."""
    process, present = PROCESSES[modality], hidden.present[modality]
    conditions = hidden.conditions[modality]
    noise = generator.standard_normal((len(present), means.shape[-1]))
    fresh = np.sqrt(1 - process.correlation**2)
    for step in range(1, len(present)):
        if present[step] and present[step - 1]:
            noise[step] = process.correlation * noise[step - 1] + fresh * noise[step]
    shown = means[hidden.classes, conditions] + process.scales[conditions][:, None] * noise
    return np.where(present[:, None], shown, 0.0).astype(np.float32)


@lru_cache(maxsize=4096)
def speaker_means(seed: int, speaker: int, modality: str, width: int) -> NDArray[np.float64]:
    """(C, K, width) what a speaker shows without noise in every class and condition of a modality."""
    generator = np.random.default_rng([seed, _SPEAKER_STREAM, speaker, MODALITIES.index(modality)])
    gain = np.exp(GAIN_DEVIATION * generator.standard_normal())
    offset = OFFSET_DEVIATION * generator.standard_normal(width)
    signal = PROCESSES[modality].means[..., None] * _projection(seed, modality, width)  # (C, K, SIGNAL_WIDTH, D)
    means = offset + gain * signal.sum(axis=2)
    means.setflags(write=False)  # shared by every caller
    return means


def speaker_splits(seed: int, speakers: int) -> list[Split]:
    """The split of every speaker: 10 % validation, 20 % test, at least one each, the rest train."""
    validation, test = max(1, round(0.1 * speakers)), max(1, round(0.2 * speakers))
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(speakers)
    splits: list[Split] = ["train"] * speakers
    for speaker in order[:validation]:
        splits[speaker] = "validation"
    for speaker in order[validation : validation + test]:
        splits[speaker] = "test"
    return splits


@lru_cache(maxsize=64)
def _projection(seed: int, modality: str, width: int) -> NDArray[np.float64]:
    """(SIGNAL_WIDTH, width) orthonormal rows in random directions, by Gram-Schmidt."""
    generator = np.random.default_rng([seed, _PROJECTION_STREAM, MODALITIES.index(modality)])
    rows: list[NDArray[np.float64]] = []
    for row in generator.standard_normal((SIGNAL_WIDTH, width)):
        for earlier in rows:
            row = row - (row * earlier).sum() * earlier
        rows.append(row / np.sqrt((row * row).sum()))
    return np.array(rows)


def _sample_conditions(generator: np.random.Generator, modality: str, classes: list[int]) -> NDArray[np.int64]:
    start, step = _condition_tables()[modality]
    draws = generator.random(len(classes)).tolist()
    conditions = [bisect_right(start[classes[0]], draws[0])]
    for entered, draw in zip(classes[1:], draws[1:], strict=True):
        conditions.append(bisect_right(step[entered][conditions[-1]], draw))
    return np.array(conditions, dtype=np.int64)


def _cumulative(probabilities: NDArray[np.float64]) -> list:
    """Nested lists of cut points: ``bisect_right(row, uniform draw)`` has those probabilities."""
    return np.cumsum(probabilities, axis=-1)[..., :-1].tolist()


@lru_cache(maxsize=1)
def _class_tables() -> list[tuple[list[float], list[list[float]]]]:
    """Per dominant class, cut points of the first class and, per class left, of the next one."""
    return list(zip(_cumulative(class_start()), _cumulative(class_steps()), strict=True))


@lru_cache(maxsize=1)
def _condition_tables() -> dict[str, tuple[list[list[float]], list[list[list[float]]]]]:
    """Per modality, cut points of the first condition by class, of the next by class entered."""
    return {name: (_cumulative(process.start), _cumulative(process.step)) for name, process in PROCESSES.items()}
