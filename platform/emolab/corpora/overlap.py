"""Features that a corpus gives for intervals of time, averaged over the steps of a session."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def finite_mean(
    values: NDArray[np.floating], weights: NDArray[np.floating] | None = None
) -> tuple[NDArray[np.float32], bool]:
    """Weighted mean of (n, D) rows, each feature over its own finite values.

    Extractors leave NaN and minus infinity where they fail (a logarithm of silence); such a value does not count. A
    feature without any finite value is 0.

    Returns:
        (D,) and whether there was any finite value at all.
    """
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32))
    counted = finite * (np.ones(len(values)) if weights is None else weights)[:, None]
    total = counted.sum(axis=0)
    sums = (np.where(finite, values, 0.0).astype(np.float64) * counted).sum(axis=0)
    means = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    return means.astype(np.float32), bool((total > 0).any())


def overlap_means(
    values: NDArray[np.floating], intervals: NDArray[np.floating], steps: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mean of the intervals' features in each step, weighted by the seconds that an interval lies in the step.

    Intervals may come in any order, overlap, and leave gaps. One without length counts only in a step that nothing
    with length reaches into.

    Args:
        values: (n, D).
        intervals: (n, 2) start and end in seconds.
        steps: (T, 2) start and end in seconds.

    Returns:
        (T, D), zero where nothing was found, and (T,) whether something was.
    """
    means = np.zeros((len(steps), values.shape[1]), dtype=np.float32)
    present = np.zeros(len(steps), dtype=np.bool_)
    starts, ends = intervals[:, 0], intervals[:, 1]
    for place, (start, end) in enumerate(steps):
        weights = np.minimum(ends, end) - np.maximum(starts, start)
        touched = np.flatnonzero(weights > 0)
        if not len(touched):
            touched = np.flatnonzero((starts == ends) & (starts >= start) & (starts < end))
            weights = np.ones(len(values))
        if len(touched):
            means[place], present[place] = finite_mean(values[touched], weights[touched])
    return means, present
