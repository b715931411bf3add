"""Statistics over seeds: what a handful of training runs can and cannot show.

Three seeds, as in the paper, leave a paired t-test two degrees of freedom (|t| > 4.30 at the 5 % level). So it says
beside its p-value what it could have found: power and minimum detectable difference. Resampling of sessions is in
``bootstrap``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from emolab.names import UserError

ROUNDING = 1e-12
"""Scores lie between 0 and 1: differences of them that are no further apart are equal."""
CERTAIN = 1_000.0
"""Times the critical value: a shift beyond is always found, whatever the number of seeds."""


@dataclass(frozen=True, kw_only=True)
class MeanAndDeviation:
    """Mean and sample standard deviation (divisor n - 1) over seeds, as the paper's tables print them."""

    mean: float
    deviation: float
    """NaN for a single value: one run says nothing about spread."""
    count: int


def mean_and_deviation(values: ArrayLike) -> MeanAndDeviation:
    """Summary of one score per seed.

    Raises:
        UserError: no value, or a value that is not finite.
    """
    scores = _scores(values, what="values")
    deviation = float(scores.std(ddof=1)) if len(scores) > 1 else math.nan
    return MeanAndDeviation(mean=float(scores.mean()), deviation=deviation, count=len(scores))


@dataclass(frozen=True, kw_only=True)
class PairedTTest:
    """Two-sided paired t-test over seeds, with what it was able to detect."""

    difference: float
    """Mean of first - second."""
    low: float
    high: float
    """Confidence interval of the difference, level 1 - alpha."""
    t: float
    """NaN where every difference is zero."""
    p: float
    observed_power: float
    """Chance that a repetition is significant if the true effect is the observed one. A function of p alone
    (Hoenig and Heisey, "The Abuse of Power", 2001): it tells how repeatable a finding is, not why one is absent."""
    detectable_difference: float
    """True difference found with the wanted power, at this number of seeds and this spread between them."""
    seeds: int
    alpha: float
    wanted_power: float


def paired_t_test(
    first: ArrayLike, second: ArrayLike, *, alpha: float = 0.05, wanted_power: float = 0.8
) -> PairedTTest:
    """Compare two systems by one score per seed, paired by position.

    If all differences are equal, but for rounding, the spread is zero: t is infinite and p is 0, or NaN and 1 if they
    are zero.

    Raises:
        UserError: fewer than two pairs, unequal lengths, values that are not finite.
    """
    differences = _differences(first, second)
    count = len(differences)
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    error = spread / math.sqrt(count) if np.ptp(differences) > ROUNDING else 0.0
    without_spread = math.copysign(math.inf, mean) if abs(mean) > ROUNDING else math.nan
    t = mean / error if error else without_spread
    critical = float(stats.t.ppf(1 - alpha / 2, count - 1))
    return PairedTTest(
        difference=mean,
        low=mean - critical * error,
        high=mean + critical * error,
        t=t,
        p=1.0 if math.isnan(t) else float(2 * stats.t.sf(abs(t), count - 1)),
        observed_power=alpha if math.isnan(t) else t_test_power(t, seeds=count, alpha=alpha),
        detectable_difference=error * _detectable_shift(count, alpha, wanted_power),
        seeds=count,
        alpha=alpha,
        wanted_power=wanted_power,
    )


def t_test_power(shift: float, *, seeds: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t-test whose true difference is ``shift`` standard errors.

    The statistic then follows the noncentral t distribution with n - 1 degrees of freedom.
    """
    freedom = seeds - 1
    critical = float(stats.t.ppf(1 - alpha / 2, freedom))
    shift = abs(shift)
    if shift > CERTAIN * critical:
        return 1.0  # where SciPy returns NaN
    power = float(stats.nct.sf(critical, freedom, shift))
    # Significant with the wrong sign: below 3e-7 from here on (a normal tail), where SciPy returns NaN at times.
    return power if shift > 5.0 else power + float(stats.nct.cdf(-critical, freedom, shift))


def _detectable_shift(seeds: int, alpha: float, power: float) -> float:
    """Standard errors by which the truth must differ from zero to be found with the wanted power."""
    if not alpha < power < 1.0:
        raise UserError(f"wanted power must lie between alpha ({alpha}) and 1, got {power}")
    upper = 100.0 * float(stats.t.ppf(1 - alpha / 2, seeds - 1))  # power 1 to many digits, for two seeds too

    def excess(shift: float) -> float:
        return t_test_power(shift, seeds=seeds, alpha=alpha) - power

    return float(optimize.brentq(excess, 0.0, upper))  # pyright: ignore[reportArgumentType]  # scipy's stub is loose


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, comparison -> p, in the order given.

    Rejecting where the adjusted value is at most alpha keeps the chance of any false rejection among all
    comparisons at alpha or below, whatever their dependence (Holm, Scandinavian Journal of Statistics, 1979).

    Raises:
        UserError: a p-value outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0.0 <= p <= 1.0:
            raise UserError(f"p-value of {name!r} must lie in [0, 1], got {p}")
    ascending = sorted(p_values, key=lambda name: p_values[name])
    scaled = (min(1.0, (len(ascending) - rank) * p_values[name]) for rank, name in enumerate(ascending))
    adjusted = dict(zip(ascending, itertools.accumulate(scaled, max), strict=True))
    return {name: adjusted[name] for name in p_values}


def _scores(values: ArrayLike, *, what: str) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise UserError(f"{what} must be a list of one number per seed, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise UserError(f"{what} of seed number {int(np.argmin(np.isfinite(scores))) + 1} is not finite")
    return scores


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    a, b = _scores(first, what="first system's scores"), _scores(second, what="second system's scores")
    if len(a) != len(b):
        raise UserError(f"a paired test needs the same seeds for both systems, got {len(a)} and {len(b)} scores")
    if len(a) < 2:
        raise UserError("a paired test needs at least two seeds, got 1")
    return a - b
