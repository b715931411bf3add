"""Tests over seeds and corrections, against known answers, SciPy and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from emolab.names import UserError
from emolab.studies.statistics import (
    holm,
    mean_and_deviation,
    paired_t_test,
    t_test_power,
)

SCORES = st.floats(0.0, 1.0, allow_nan=False)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=12)


# Over seeds


@given(PAIRS)
def test_paired_t_test_agrees_with_scipy(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    differences = np.subtract(first, second)
    if differences.std() < 1e-6:
        return  # no spread: covered below
    ours, theirs = paired_t_test(first, second), stats.ttest_rel(first, second)
    assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert (ours.p < 0.05) == (not ours.low <= 0 <= ours.high)


def test_paired_t_test_without_any_spread():
    same = paired_t_test([0.5, 0.75, 0.5], [0.5, 0.75, 0.5])
    assert math.isnan(same.t) and same.p == 1.0 and same.observed_power == pytest.approx(0.05)
    shifted = paired_t_test([0.5, 0.75, 0.5], [0.25, 0.5, 0.25])
    assert shifted.t == math.inf and shifted.p == 0.0 and shifted.observed_power == 1.0
    assert shifted.detectable_difference == 0.0
    rounded = paired_t_test([0.7, 0.8, 0.9], [0.6, 0.7, 0.8])  # differences of 0.1 that differ by rounding
    assert (rounded.t, rounded.p, rounded.observed_power) == (math.inf, 0.0, 1.0)
    nothing = paired_t_test([0.1 + 0.2, 0.5, 0.7], [0.3, 0.5, 0.7])
    assert math.isnan(nothing.t) and nothing.p == 1.0


@pytest.mark.parametrize(
    ("seeds", "effect", "power"),
    # Published sample-size tables for the one-sample t-test, two-sided 5 %: effect in standard deviations.
    [(34, 0.5, 0.808), (10, 1.0, 0.803), (199, 0.2, 0.802), (15, 0.8, 0.821)],
)
def test_power_matches_published_tables(seeds, effect, power):
    assert t_test_power(effect * math.sqrt(seeds), seeds=seeds) == pytest.approx(power, abs=0.002)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_power_matches_simulation(seeds):
    draws = np.random.default_rng(0).normal(1.5, 1.0, (200_000, seeds))
    rejected = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert t_test_power(1.5 * math.sqrt(seeds), seeds=seeds) == pytest.approx(rejected.mean(), abs=0.004)


def test_power_is_the_noncentral_t_and_stays_defined_far_out():
    critical = stats.t.ppf(0.975, 2)
    expected = stats.nct.sf(critical, 2, 3.0) + stats.nct.cdf(-critical, 2, 3.0)
    assert t_test_power(3.0, seeds=3) == pytest.approx(expected)
    assert t_test_power(0.0, seeds=3) == pytest.approx(0.05)
    powers = [t_test_power(shift, seeds=n) for n in (2, 3, 6, 50) for shift in np.linspace(0, 500, 2001)]
    assert np.isfinite(powers).all()
    rising = np.diff(np.array(powers).reshape(4, -1), axis=1)
    assert (rising > -3e-7).all()
    assert {t_test_power(shift, seeds=n) for n in (2, 50) for shift in (1e6, 1e10, 1e15, -math.inf)} == {1.0}


def test_detectable_difference_is_found_with_the_wanted_power():
    first, second = [0.88, 0.87, 0.91, 0.85], [0.84, 0.86, 0.84, 0.83]
    result = paired_t_test(first, second)
    error = np.subtract(first, second).std(ddof=1) / 2
    assert t_test_power(result.detectable_difference / error, seeds=4) == pytest.approx(0.8)
    # Three seeds need 5.65 standard errors, that is 3.26 standard deviations of the differences (here 1).
    assert paired_t_test([1.0, 2.0, 3.0], [0.0] * 3).detectable_difference == pytest.approx(3.264, abs=0.001)


def test_mean_and_deviation_use_the_sample_divisor():
    summary = mean_and_deviation([0.87, 0.88, 0.89])
    assert (summary.mean, summary.deviation, summary.count) == (pytest.approx(0.88), pytest.approx(0.01), 3)
    assert math.isnan(mean_and_deviation([0.5]).deviation)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_t_test([0.1, 0.2], [0.1]), "same seeds for both systems, got 2 and 1"),
        (lambda: paired_t_test([0.1], [0.1]), "at least two seeds"),
        (lambda: paired_t_test([0.1, math.nan], [0.1, 0.2]), "first system's scores of seed number 2 is not finite"),
        (lambda: paired_t_test([0.1, 0.2], [0.1, 0.3], wanted_power=0.01), "wanted power must lie between"),
        (lambda: mean_and_deviation([]), "one number per seed"),
        (lambda: holm({"MulT": 1.5}), "p-value of 'MulT' must lie in"),
        (lambda: holm({"MulT": math.nan}), "p-value of 'MulT' must lie in"),
    ],
)
def test_mistakes_over_seeds_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Several comparisons


def test_holm_by_hand():
    # Ascending .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, and no value may fall below an earlier one.
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.lists(SCORES, min_size=1, max_size=8))
def test_holm_lies_between_the_raw_value_and_bonferroni_and_keeps_the_order(values):
    p = {str(i): value for i, value in enumerate(values)}
    adjusted = holm(p)
    for name, value in p.items():
        assert value <= adjusted[name] <= min(1.0, len(p) * value)
    ascending = sorted(p, key=lambda name: p[name])
    assert [adjusted[name] for name in ascending] == sorted(adjusted.values())


def test_holm_keeps_the_family_wise_error_rate():
    generator, repetitions = np.random.default_rng(1), 4000
    shared = generator.normal(size=(repetitions, 1, 6))  # five baselines against one model: dependent comparisons
    differences = (shared + 2 * generator.normal(size=(repetitions, 5, 6))) / math.sqrt(5)
    p = stats.ttest_1samp(differences, 0.0, axis=-1).pvalue
    corrected = np.mean([min(holm(dict(zip("abcde", row, strict=True))).values()) <= 0.05 for row in p])
    assert corrected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
    assert np.mean(p.min(axis=1) <= 0.05) > 0.15  # what happens without it
