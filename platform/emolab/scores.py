"""Accuracy and F1 from confusion counts; the one definition that training, searches, sweeps and statistics share.

Only the macro-F1 of a single speaker has another, which bears another name (``emolab.robustness.metrics``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def accuracy(confusion: ArrayLike) -> Floats:
    """(..., K, K) counts, true class by row and predicted by column -> (...) share of steps that are right."""
    counts = np.asarray(confusion, dtype=np.float64)
    return safe_ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def class_f1(confusion: ArrayLike) -> Floats:
    """(..., K, K) counts -> (..., K) F1 of every class; 0 for a class neither present nor predicted."""
    counts = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return safe_ratio(2 * hits, counts.sum(-1) + counts.sum(-2))


def class_recall(confusion: ArrayLike) -> Floats:
    """(..., K, K) counts -> (..., K) share of every class's steps that are recognised; NaN for a class without any."""
    counts = np.asarray(confusion, dtype=np.float64)
    return safe_ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), empty=np.nan)


def class_precision(confusion: ArrayLike) -> Floats:
    """(..., K, K) counts -> (..., K) share of every class's predictions that are right; NaN where never predicted."""
    counts = np.asarray(confusion, dtype=np.float64)
    return safe_ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-2), empty=np.nan)


def macro_f1(confusion: ArrayLike) -> Floats:
    """(..., K, K) counts -> (...) mean F1 over all K classes."""
    return class_f1(confusion).mean(-1)


def safe_ratio(numerator: ArrayLike, denominator: ArrayLike, *, empty: float = 0.0) -> Floats:
    """numerator / denominator, and ``empty`` where the denominator is zero."""
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(above, below, out=np.full(below.shape, empty), where=below != 0)
