"""Drawing clusters with replacement, and reading intervals and p-values off what was drawn.

Steps of one session share a learner, a camera and a mood, so they are no independent observations; sessions, or
speakers, are. A resample draws whole clusters.

Intervals are percentile intervals with their tails widened for few clusters (Hesterberg, "What Teachers Should
Know About the Bootstrap", The American Statistician, 2015): the levels are those at which a normal interval would
become Student's with n - 1 degrees of freedom. With hundreds of sessions that is the plain percentile interval;
with ten speakers the plain one is too narrow by a fifth. BCa is not used: differences of accuracy and macro-F1
have next to no skew at hundreds of sessions, with ten speakers its acceleration rests on ten numbers, and its
interval would no longer agree with the p-value, which here is read off the same distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from emolab.names import UserError

Floats = NDArray[np.float64]

FEWEST_CLUSTERS = 5
"""Of n clusters alone the interval is their whole span at most, which covers the truth with a chance of 1 - 2^(1-n):
0.5 with two, 0.94 with five. So with fewer there is no 95 % interval."""
_BLOCK = 4_000_000
"""Multiplicities held in memory at a time."""


def cluster_sums(values: Floats, speakers: Sequence[str] | None) -> Floats:
    """(sessions, ...) -> (clusters, ...) sums over each speaker's sessions; the values where no speakers are given.

    Raises:
        UserError: another number of speakers than of sessions, or fewer than FEWEST_CLUSTERS clusters.
    """
    if speakers is None:
        sums = values
    elif len(speakers) == len(values):
        names, cluster = np.unique(np.asarray(speakers), return_inverse=True)
        sums = np.zeros((len(names), *values.shape[1:]))
        np.add.at(sums, cluster, values)
    else:
        raise UserError(f"speakers must name one speaker per session, got {len(speakers)} for {len(values)} sessions")
    if len(sums) < FEWEST_CLUSTERS:
        unit = "sessions" if speakers is None else "speakers"
        raise UserError(f"a bootstrap needs at least {FEWEST_CLUSTERS} {unit}, got {len(sums)}")
    return sums


def multiplicities(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks of (some, clusters): how often each cluster is drawn in each resample; rows sum to ``clusters``."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // clusters)
    for first in range(0, resamples, rows):
        size = min(rows, resamples - first)
        drawn = generator.integers(0, clusters, (size, clusters), dtype=np.int32)
        drawn += clusters * np.arange(size, dtype=np.int32)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.float64)


def _widening(clusters: int) -> float:
    return float(np.sqrt(clusters / (clusters - 1)))


def percentile_ends(drawn: Floats, clusters: int, level: float) -> tuple[Floats, Floats]:
    """Lower and upper ends of the widened percentile interval over the first axis.

    Raises:
        UserError: the level is not a share.
    """
    if not 0.0 < level < 1.0:
        raise UserError(f"the level of an interval must lie between 0 and 1, got {level}")
    tail = special.ndtr(-_widening(clusters) * stats.t.ppf((1 + level) / 2, clusters - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return low, high


def two_sided_p(drawn: Floats, clusters: int) -> float:
    """Two-sided p-value of zero by turning the widened percentile interval around."""
    beyond = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    tail = min(0.5, beyond / (len(drawn) + 1))
    return float(2 * stats.t.cdf(special.ndtri(tail) / _widening(clusters), clusters - 1))
