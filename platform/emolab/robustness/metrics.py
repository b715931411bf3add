"""Metrics of protocols section 4, from confusion counts and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emolab.scores import class_f1

CALIBRATION_BINS = 15
TOLERATED_LOSS = 0.05
"""Five points of macro-F1."""


def macro_f1_of_occurring_classes(confusion: ArrayLike) -> NDArray[np.float64]:
    """(..., K, K) counts, true class by predicted class -> (...), the mean F1 over the classes that were there or were
    predicted; NaN where nothing was counted.

    For the few sessions of a speaker, whose score must not depend on which classes they happen to show. Whatever is
    compared with a score of training is ``scores.macro_f1``, over all classes.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    occurring = counts.sum(axis=-1) + counts.sum(axis=-2) > 0
    return _ratio(class_f1(counts).sum(axis=-1), occurring.sum(axis=-1))


def area_under_curve(rates: ArrayLike, scores: ArrayLike) -> float:
    """Trapezoid area of a score over rates (increasing), divided by their span: a mean score, "relative robustness".

    Raises:
        ValueError: fewer than two points, or rates that do not increase.
    """
    x, y = _curve(rates, scores)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def effective_robustness(scores: ArrayLike, reference: ArrayLike) -> float:
    """sum_i f_i - (LF_i + f_0 - LF_0): what a model keeps beyond a reference (late fusion) of equal clean score.

    Args:
        scores: of the model at increasing rates, the first one clean.
        reference: of late fusion at the same rates.

    Raises:
        ValueError: different lengths, or nothing.
    """
    f, late = np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if f.shape != late.shape or f.ndim != 1 or not len(f):
        raise ValueError(f"expected two curves of equal length, got shapes {f.shape} and {late.shape}")
    return float(((f - f[0]) - (late - late[0])).sum())  # in this order it is 0 where both are one curve


def largest_tolerated_rate(rates: ArrayLike, scores: ArrayLike, *, loss: float = TOLERATED_LOSS) -> float:
    """The largest rate up to which, at every rate measured, at most ``loss`` of the first score is lost.

    Raises:
        ValueError: fewer than two points, or rates that do not increase.
    """
    x, y = _curve(rates, scores)
    tolerated = y >= y[0] - loss - 1e-12  # a loss of exactly five points is tolerated in spite of rounding
    return float(x[np.argmin(tolerated) - 1] if not tolerated.all() else x[-1])


def mean_corruption_error(errors: ArrayLike, reference: ArrayLike) -> float:
    """mCE (ImageNet-C): the mean over corruptions of summed error over the reference's summed error.

    Args:
        errors: (corruptions, severities) error rates, 1 - score.
        reference: of late fusion, the same shape.

    Raises:
        ValueError: different shapes.
    """
    ours, theirs = _errors(errors, reference)
    return float(_ratio(ours.sum(axis=1), theirs.sum(axis=1)).mean())


def relative_mean_corruption_error(
    errors: ArrayLike, reference: ArrayLike, *, clean: float, reference_clean: float
) -> float:
    """Relative mCE: as mCE, of the errors that corruption adds to the clean ones. NaN where late fusion loses nothing.

    Raises:
        ValueError: different shapes.
    """
    ours, theirs = _errors(errors, reference)
    return float(_ratio((ours - clean).sum(axis=1), (theirs - reference_clean).sum(axis=1)).mean())


def worst(scores: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the lowest score (of a corruption, a speaker); ties go to the first name.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("there is no score to find the worst of")
    name = min(sorted(scores), key=lambda key: scores[key])
    return name, scores[name]


def scores_by_group(confusion: ArrayLike, groups: Sequence[str]) -> dict[str, float]:
    """Macro-F1 of every group (speaker) over the classes that occur in it, from the counts of its sessions, (N, K, K);
    groups without a label left out."""
    counts, names = np.asarray(confusion), np.asarray(groups)
    summed = {str(name): counts[names == name].sum(axis=0) for name in np.unique(names)}
    return {name: float(macro_f1_of_occurring_classes(total)) for name, total in summed.items() if total.any()}


def expected_calibration_error(table: ArrayLike) -> float:
    """ECE over 15 equal bins of the top probability, from (bins, 3) counts, summed over sessions beforehand."""
    count, right, top = np.asarray(table, dtype=np.float64).T
    return float(_ratio(np.abs(right - top).sum(), count.sum()))


def weight_quality_correlation(weights: ArrayLike, quality: ArrayLike) -> float:
    """Spearman correlation of a modality's MIE weight with its true quality over steps; NaN where either is constant.

    Raises:
        ValueError: different shapes.
    """
    w, q = np.asarray(weights, dtype=np.float64).ravel(), np.asarray(quality, dtype=np.float64).ravel()
    if w.shape != q.shape:
        raise ValueError(f"expected as many weights as qualities, got {len(w)} and {len(q)}")
    if len(w) < 2 or np.ptp(w) == 0 or np.ptp(q) == 0:
        return float("nan")
    from scipy.stats import spearmanr  # nearly a second to import, and a search needs only the areas above

    return float(np.asarray(spearmanr(w, q))[0])


def _ratio(above: ArrayLike, below: ArrayLike) -> NDArray[np.float64]:
    above, below = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


def _curve(rates: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(rates, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2 or not (np.diff(x) > 0).all():
        raise ValueError(f"expected at least two scores at increasing rates, got rates {x.tolist()}")
    return x, y


def _errors(errors: ArrayLike, reference: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ours, theirs = np.asarray(errors, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2:
        raise ValueError(f"expected two tables corruption x severity, got shapes {ours.shape} and {theirs.shape}")
    return ours, theirs
