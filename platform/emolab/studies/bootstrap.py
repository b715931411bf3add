"""Clustered bootstrap of metrics and mean curves: what a result on *these* sessions says about others.

Predictions enter as confusion counts per session, which are sums over steps: a resample is then a vector of
cluster multiplicities, 10,000 of them a matrix, and all resampled confusion matrices one matrix product. How
clusters are drawn and intervals are read off is in ``resampling``.

Seeds enter as an average. An interval says nothing of runs with other seeds; the tests in ``statistics`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emolab.names import UserError
from emolab.scores import accuracy, class_f1, macro_f1, safe_ratio
from emolab.studies.resampling import (
    FEWEST_CLUSTERS,
    Floats,
    cluster_sums,
    multiplicities,
    percentile_ends,
    two_sided_p,
)

Metric = Literal["accuracy", "macro_f1"]

RESAMPLES = 10_000
"""Enough for a 95 % interval whose ends move by about 1 % of its width from seed to seed."""


METRICS: dict[str, Callable[[ArrayLike], Floats]] = {"accuracy": accuracy, "macro_f1": macro_f1}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its bootstrap confidence interval."""

    value: float
    low: float
    high: float
    level: float
    clusters: int
    """Independent units resampled: sessions, or speakers."""


@dataclass(frozen=True, kw_only=True)
class DifferenceInterval(Interval):
    """First minus second system, paired by session."""

    p: float
    """Two-sided: one minus the largest level whose interval leaves out zero. Never below about 1 / resamples."""


@dataclass(frozen=True, kw_only=True)
class CurveInterval:
    """A mean curve over sessions with a pointwise confidence band."""

    mean: Floats
    """(T, ...) mean over the sessions that have the step; NaN where none has."""
    low: Floats
    """NaN, as ``high``, where fewer than two clusters have the step."""
    high: Floats
    sessions: NDArray[np.int64]
    """(T,) sessions that have the step."""
    level: float


def metric_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    metric: Metric = "macro_f1",
    speakers: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> DifferenceInterval:
    """Bootstrap the difference of a metric between two systems that were tested on the same sessions.

    Args:
        first: confusion counts (sessions, K, K), or (seeds, sessions, K, K); with seeds, the metric is computed
            for each and averaged. The two systems may have different numbers of seeds.
        second: the same for the other system, sessions in the same order.
        metric: `accuracy` or `macro_f1`.
        speakers: speaker of every session, to resample speakers instead of sessions.
        level: of the interval.
        resamples: number of bootstrap resamples.
        seed: equal arguments and seed give equal results.

    Raises:
        UserError: shapes that do not fit, counts that are negative or not finite, fewer than FEWEST_CLUSTERS clusters.
    """
    a, b = _clustered(first, speakers), _clustered(second, speakers)
    if len(a) != len(b) or a.shape[2:] != b.shape[2:]:
        shapes = f"{np.shape(first)} and {np.shape(second)}"
        raise UserError(f"the systems must share sessions and classes, got confusion counts of shape {shapes}")
    score = _metric(metric)
    clusters = len(a)
    drawn = np.concatenate(
        [
            score(_weighted(weights, a)).mean(1) - score(_weighted(weights, b)).mean(1)
            for weights in multiplicities(clusters, resamples, seed)
        ]
    )
    low, high = percentile_ends(drawn, clusters, level)
    return DifferenceInterval(
        value=float(score(a.sum(0)).mean() - score(b.sum(0)).mean()),
        low=float(low), high=float(high), level=level, clusters=clusters, p=two_sided_p(drawn, clusters),
    )  # fmt: skip


def metric_interval(
    confusion: ArrayLike,
    *,
    metric: Metric = "macro_f1",
    speakers: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap one system's metric; arguments and errors as in ``metric_difference``."""
    score = _metric(metric)
    return _intervals(lambda totals: score(totals)[..., None], confusion, speakers, level, resamples, seed)[0]


def class_f1_intervals(
    confusion: ArrayLike,
    *,
    speakers: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """One interval per class (Fig. 4), each at the given level; arguments and errors as in ``metric_difference``."""
    return _intervals(class_f1, confusion, speakers, level, resamples, seed)


def curve_interval(
    values: ArrayLike,
    observed: ArrayLike,
    *,
    speakers: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> CurveInterval:
    """Mean over sessions at every step, with a band (Fig. 3: the weight of each modality over time).

    Args:
        values: (sessions, T, ...), for instance (sessions, T, M) weights averaged over seeds.
        observed: (sessions, T) bool, the steps that exist; the values of others are not read.
        speakers: speaker of every session, to resample speakers instead of sessions.
        level: pointwise level of the band.
        resamples: number of bootstrap resamples; those in which nobody has a step take no part at that step.
        seed: equal arguments and seed give equal results.

    Raises:
        UserError: shapes that do not fit, or fewer than FEWEST_CLUSTERS clusters.
    """
    curves, seen = np.asarray(values, dtype=np.float64), np.asarray(observed, dtype=bool)
    if curves.ndim < 2 or curves.shape[:2] != seen.shape:
        raise UserError(f"curves of shape {curves.shape} do not fit a mask of observed steps of shape {seen.shape}")
    trailing = curves.shape[2:]
    known = seen.reshape(*seen.shape, *[1] * len(trailing))
    steps = seen.shape[1]
    sums = cluster_sums(np.where(known, curves, 0.0).reshape(*seen.shape, -1), speakers)
    counts = cluster_sums(seen.astype(np.float64), speakers)
    drawn = np.concatenate(
        [
            safe_ratio(_weighted(weights, sums), (weights @ counts)[..., None], empty=np.nan)
            for weights in multiplicities(len(counts), resamples, seed)
        ]
    )
    bands = np.full((2, steps, drawn.shape[2]), np.nan)
    for t, clusters in enumerate((counts > 0).sum(0)):
        if clusters >= FEWEST_CLUSTERS:
            usable = drawn[~np.isnan(drawn[:, t, 0]), t]
            bands[:, t] = percentile_ends(usable, int(clusters), level)
    low, high = bands.reshape(2, steps, *trailing)
    mean = safe_ratio(sums.sum(0), counts.sum(0)[:, None], empty=np.nan).reshape(steps, *trailing)
    return CurveInterval(mean=mean, low=low, high=high, sessions=seen.sum(0), level=level)


def _intervals(
    score: Callable[[ArrayLike], Floats],
    confusion: ArrayLike,
    speakers: Sequence[str] | None,
    level: float,
    resamples: int,
    seed: int,
) -> list[Interval]:
    """One interval for each entry of the score's last axis."""
    counts = _clustered(confusion, speakers)
    clusters = len(counts)
    blocks = multiplicities(clusters, resamples, seed)
    drawn = np.concatenate([score(_weighted(weights, counts)).mean(1) for weights in blocks])
    values = score(counts.sum(0)).mean(0)
    lows, highs = percentile_ends(drawn, clusters, level)
    return [
        Interval(value=float(value), low=float(low), high=float(high), level=level, clusters=clusters)
        for value, low, high in zip(values, lows, highs, strict=True)
    ]


def _weighted(weights: Floats, values: Floats) -> Floats:
    """(R, clusters) multiplicities, (clusters, ...) values -> (R, ...) sums of every resample."""
    return (weights @ values.reshape(len(values), -1)).reshape(len(weights), *values.shape[1:])


def _clustered(confusion: ArrayLike, speakers: Sequence[str] | None) -> Floats:
    """Confusion counts per cluster, (clusters, seeds, K, K)."""
    counts = np.asarray(confusion, dtype=np.float64)
    if counts.ndim not in (3, 4) or counts.shape[-1] != counts.shape[-2] or counts.size == 0:
        raise UserError(
            f"confusion counts must have shape (sessions, K, K) or (seeds, sessions, K, K), got {counts.shape}"
        )
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise UserError("confusion counts must be finite and not negative")
    counts = counts if counts.ndim == 4 else counts[None]
    return cluster_sums(counts.transpose(1, 0, 2, 3), speakers)


def _metric(name: str) -> Callable[[ArrayLike], Floats]:
    if name not in METRICS:
        raise UserError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]
