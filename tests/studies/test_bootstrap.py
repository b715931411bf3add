"""The clustered bootstrap, mostly against simulations in which the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from emolab.names import UserError
from emolab.studies.bootstrap import (
    accuracy,
    class_f1,
    class_f1_intervals,
    curve_interval,
    macro_f1,
    metric_difference,
    metric_interval,
)
from emolab.studies.resampling import percentile_ends, two_sided_p


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_metrics_agree_with_counting_labels(steps):
    confusion = np.zeros((4, 4))
    for true, predicted in steps:
        confusion[true, predicted] += 1
    f1 = []
    for k in range(4):
        hits = sum(true == k == predicted for true, predicted in steps)
        wrong = sum((true == k) != (predicted == k) for true, predicted in steps)
        f1.append(2 * hits / (2 * hits + wrong) if hits + wrong else 0.0)
    assert class_f1(confusion).tolist() == pytest.approx(f1)
    assert float(macro_f1(confusion)) == pytest.approx(sum(f1) / 4)
    assert float(accuracy(confusion)) == pytest.approx(np.mean([true == predicted for true, predicted in steps]))


def simulated(generator: np.random.Generator, sessions: int, steps: int, *, gap: float) -> np.ndarray:
    """Confusion counts of two systems step by step, (2, sessions, steps, 4, 4), true accuracies 0.7 + gap and 0.7.

    Both the labels and the chance to be right differ from session to session, so that steps of a session are
    alike. Errors fall on the other classes evenly, hence accuracy and macro-F1 have the same true value.
    """
    mixture = generator.dirichlet(np.full(4, 0.5), sessions)
    labels = np.array([generator.choice(4, steps, p=row) for row in mixture])
    counts = np.zeros((2, sessions, steps, 4, 4))
    at = np.ix_(np.arange(sessions), np.arange(steps))
    for system, mean in enumerate((0.7 + gap, 0.7)):
        skill = generator.beta(3 * mean, 3 * (1 - mean), (sessions, 1))
        right = generator.random((sessions, steps)) < skill
        predicted = np.where(right, labels, (labels + generator.integers(1, 4, labels.shape)) % 4)
        counts[system, at[0], at[1], labels, predicted] = 1
    return counts


def covered(interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_session_intervals_cover_the_truth_and_step_wise_ones_do_not(metric):
    generator, sessions, steps, gap = np.random.default_rng(0), 60, 15, 0.05
    by_session, by_step, false_alarms = [], [], []
    for repetition in range(300):
        counts = simulated(generator, sessions, steps, gap=gap)
        clustered = metric_difference(*counts.sum(2), metric=metric, resamples=1000, seed=repetition)
        naive = metric_difference(*counts.reshape(2, -1, 4, 4), metric=metric, resamples=200, seed=repetition)
        by_session.append(covered(clustered, gap))
        by_step.append(covered(naive, gap))
        false_alarms.append(metric_difference(*simulated(generator, sessions, steps, gap=0.0).sum(2),
                                              metric=metric, resamples=1000).p < 0.05)  # fmt: skip
    assert 0.92 <= np.mean(by_session) <= 0.975
    assert np.mean(by_step) < 0.85
    assert np.mean(false_alarms) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_few_speakers_still_cover_the_truth():
    """Ten speakers, whose own level matters more than the session's: the widened tails make up for the small number."""
    generator, found = np.random.default_rng(3), {"speakers": [], "sessions": []}
    names = [f"speaker{i // 8}" for i in range(80)]
    for repetition in range(400):
        skills = np.repeat(generator.beta(6, 3, (10, 2)), 8, axis=0)  # mean 2/3 for both systems
        right = generator.binomial(30, skills)
        counts = np.zeros((2, 80, 2, 2))
        counts[:, :, 0, 0], counts[:, :, 0, 1] = right.T, 30 - right.T
        for unit, speakers in (("speakers", names), ("sessions", None)):
            interval = metric_difference(*counts, metric="accuracy", speakers=speakers, resamples=1000, seed=repetition)
            found[unit].append(covered(interval, 0.0))
    assert 0.92 <= np.mean(found["speakers"]) <= 0.975
    assert np.mean(found["sessions"]) < 0.7


@pytest.mark.parametrize("clusters", [5, 10, 200])
def test_widened_tails_turn_a_normal_interval_into_student_s(clusters):
    # Resampled means of n values spread by the divisor-n deviation: the interval must use n - 1 and Student's t.
    grid = (np.arange(400_000) + 0.5) / 400_000
    drawn = stats.norm.ppf(grid) * math.sqrt((clusters - 1) / clusters)
    low, high = percentile_ends(drawn, clusters, 0.95)
    assert -low == pytest.approx(high, rel=1e-6)
    assert high == pytest.approx(stats.t.ppf(0.975, clusters - 1), rel=2e-3)
    assert two_sided_p(drawn - high, clusters) == pytest.approx(0.05, abs=1e-3)


def test_one_system_and_its_classes_are_covered():
    generator, overall, classes = np.random.default_rng(5), [], []
    for repetition in range(300):
        counts = simulated(generator, 80, 15, gap=0.0).sum(2)[0]
        overall.append(covered(metric_interval(counts, resamples=1000, seed=repetition), 0.7))
        classes.append([covered(x, 0.7) for x in class_f1_intervals(counts, resamples=1000, seed=repetition)])
    assert 0.92 <= np.mean(overall) <= 0.975
    assert 0.92 <= np.mean(classes) <= 0.975


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["accuracy", "macro_f1"]))
def test_swapping_the_systems_swaps_the_sign(seed, metric):
    first, second = np.random.default_rng(seed).integers(0, 6, (2, 3, 12, 4, 4))  # three seeds each
    forward = metric_difference(first, second, metric=metric, resamples=200, seed=seed)
    backward = metric_difference(second, first, metric=metric, resamples=200, seed=seed)
    assert (forward.value, forward.low, forward.high) == pytest.approx((-backward.value, -backward.high, -backward.low))
    assert forward.p == pytest.approx(backward.p) and 0 < forward.p <= 1
    assert forward == metric_difference(first, second, metric=metric, resamples=200, seed=seed)


def test_the_interval_leaves_out_zero_where_the_p_value_is_small():
    generator = np.random.default_rng(11)
    for _ in range(200):
        first, second = generator.poisson(2, (2, 15, 3, 3)) + generator.uniform(0, 2, (2, 1, 1, 1)) * np.eye(3)
        result = metric_difference(first, second, metric="accuracy", resamples=1000)
        if abs(result.p - 0.05) > 0.01:  # beyond the interpolation between neighbouring resamples
            assert (result.p < 0.05) == (not result.low <= 0 <= result.high)


def test_a_system_does_not_differ_from_itself():
    counts = np.random.default_rng(0).integers(0, 9, (20, 4, 4))
    same = metric_difference(counts, counts)
    assert (same.value, same.low, same.high, same.p, same.clusters) == (0.0, 0.0, 0.0, 1.0, 20)


def test_seeds_are_averaged_after_the_metric():
    counts = np.random.default_rng(0).integers(0, 9, (3, 20, 4, 4)).astype(float)
    expected = np.mean([macro_f1(seed.sum(0)) for seed in counts])
    assert metric_interval(counts, resamples=100).value == pytest.approx(float(expected))
    one_seed = metric_difference(counts[:1], counts[0], resamples=100)
    assert one_seed.value == one_seed.low == one_seed.high == 0.0


def test_speakers_that_are_sessions_change_nothing_but_the_order():
    first, second = np.random.default_rng(0).integers(0, 9, (2, 20, 4, 4))
    names = [f"{i:02d}" for i in range(20)]
    assert metric_difference(first, second, speakers=names) == metric_difference(first, second)
    grouped = metric_difference(first, second, speakers=[name[0] + str(int(name) % 4) for name in names])
    assert grouped.clusters == 8
    assert grouped.value == pytest.approx(metric_difference(first, second).value)


def test_curves_are_means_over_the_sessions_that_last_so_long():
    generator = np.random.default_rng(2)
    lengths = np.repeat([5, 4, 3, 2, 1], [5, 3, 2, 1, 1])
    observed = np.arange(6) < lengths[:, None]
    values = generator.random((12, 6, 3))
    values[~observed] = np.nan  # never read
    curve = curve_interval(values, observed, resamples=500)
    assert curve.sessions.tolist() == [12, 11, 10, 8, 5, 0]
    for t in range(5):
        assert curve.mean[t] == pytest.approx(values[observed[:, t], t].mean(0))
        assert (curve.low[t] <= curve.mean[t]).all() and (curve.mean[t] <= curve.high[t]).all()
    assert np.isnan(curve.mean[5]).all() and np.isnan(curve.low[5]).all()
    four_speakers_left = curve_interval(values, observed, speakers=list("abcddeeeffgg"), resamples=500)
    assert np.isnan(four_speakers_left.low[4]).all() and np.isfinite(four_speakers_left.mean[4]).all()
    assert np.isfinite(four_speakers_left.low[3]).all()


def test_curve_bands_cover_the_true_mean():
    generator, found = np.random.default_rng(4), []
    for repetition in range(300):
        level = generator.normal(size=(40, 1))  # a session's own level, the same at all of its steps
        curve = curve_interval(
            level + 0.3 * generator.normal(size=(40, 4)), np.ones((40, 4)), resamples=500, seed=repetition
        )
        found.append((curve.low <= 0) & (curve.high >= 0))
    assert 0.92 <= np.mean(found) <= 0.975


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metric_difference(np.ones((5, 4, 4)), np.ones((6, 4, 4))), "must share sessions and classes"),
        (lambda: metric_difference(np.ones((5, 4, 4)), np.ones((5, 3, 3))), "must share sessions and classes"),
        (lambda: metric_interval(np.ones((5, 4, 3))), r"shape \(sessions, K, K\)"),
        (lambda: metric_interval(np.ones((1, 4, 4))), "at least 5 sessions, got 1"),
        (lambda: metric_interval(np.ones((6, 4, 4)), speakers=list("aabbcd")), "at least 5 speakers, got 4"),
        (lambda: metric_interval(np.ones((3, 4, 4)), speakers=["a"] * 4), "one speaker per session, got 4 for 3"),
        (lambda: metric_interval(-np.ones((3, 4, 4))), "finite and not negative"),
        (lambda: metric_interval(np.ones((5, 4, 4)), level=95), "level of an interval"),
        (lambda: metric_interval(np.ones((3, 4, 4)), metric="f2"), "one of accuracy, macro_f1, got 'f2'"),
        (lambda: curve_interval(np.ones((3, 4)), np.ones((3, 5))), "do not fit a mask"),
    ],
)
def test_mistakes_in_resampling_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
