from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from emolab import scores
from emolab.robustness import metrics


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_scores_are_those_of_scikit_learn(pairs):
    """Which leaves out a class that never occurs, unless it is told of all classes."""
    true, predicted = zip(*pairs, strict=True)
    counts = confusion_matrix(true, predicted, labels=range(4))
    occurring = f1_score(true, predicted, average="macro")
    assert metrics.macro_f1_of_occurring_classes(counts) == pytest.approx(occurring)
    per_class = f1_score(true, predicted, average=None, labels=range(4), zero_division=0.0)
    assert scores.macro_f1(counts) == pytest.approx(np.mean(per_class))
    assert scores.accuracy(counts) == pytest.approx(accuracy_score(true, predicted))
    if len({*true, *predicted}) == 4:
        assert scores.macro_f1(counts) == pytest.approx(occurring)


def test_scores_of_many_tables_at_once_and_of_nothing():
    score, tables = metrics.macro_f1_of_occurring_classes, np.arange(2 * 3 * 16).reshape(2, 3, 4, 4)
    assert score(tables).shape == (2, 3)
    assert score(tables)[1, 2] == score(tables[1, 2])
    assert np.isnan(score(np.zeros((4, 4))))


def test_area_is_the_trapezoid_mean():
    assert metrics.area_under_curve([0, 0.5, 1], [1.0, 0.5, 0.4]) == pytest.approx(0.6)
    assert metrics.area_under_curve([0, 0.1, 0.9], [0.7, 0.7, 0.7]) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="increasing"):
        metrics.area_under_curve([0, 0], [1, 1])


def test_effective_robustness_by_hand():
    # model 0.9 0.8 0.6, late fusion 0.8 0.6 0.5 lifted by 0.1 to 0.9 0.7 0.6: 0 + 0.1 + 0
    assert metrics.effective_robustness([0.9, 0.8, 0.6], [0.8, 0.6, 0.5]) == pytest.approx(0.1)
    curve = [0.6007, 0.5713, 0.5421, 0.4852]
    assert metrics.effective_robustness(curve, curve) == 0.0  # and not what rounding leaves
    with pytest.raises(ValueError, match="equal length"):
        metrics.effective_robustness([0.8], [0.8, 0.6])


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.80, 0.79, 0.75, 0.70], 0.2),
        ([0.8, 0.7, 0.8, 0.8], 0.0),
        ([0.8, 0.8, 0.8, 0.8], 0.3),
        ([0.8, 0.9, 0.76, 0.7], 0.2),
    ],
)
def test_largest_tolerated_rate(curve, expected):
    assert metrics.largest_tolerated_rate([0.0, 0.1, 0.2, 0.3], curve) == expected


def test_corruption_errors_by_hand():
    ours, theirs = [[0.2, 0.4], [0.3, 0.3]], [[0.4, 0.8], [0.2, 0.4]]
    assert metrics.mean_corruption_error(ours, theirs) == pytest.approx((0.5 + 1.0) / 2)
    relative = metrics.relative_mean_corruption_error(ours, theirs, clean=0.1, reference_clean=0.2)
    assert relative == pytest.approx((0.4 / 0.8 + 0.4 / 0.2) / 2)
    assert metrics.mean_corruption_error(theirs, theirs) == 1.0
    assert np.isnan(metrics.relative_mean_corruption_error(ours, ours, clean=0.1, reference_clean=0.3))
    with pytest.raises(ValueError, match="corruption x severity"):
        metrics.mean_corruption_error([0.1], [0.1])


def test_worst_corruption_and_speaker():
    assert metrics.worst({"b": 0.2, "a": 0.2, "c": 0.9}) == ("a", 0.2)
    counts = np.zeros((3, 2, 2), int)
    counts[0], counts[1] = [[3, 0], [0, 3]], [[0, 2], [2, 0]]
    assert metrics.scores_by_group(counts, ["x", "y", "z"]) == {"x": 1.0, "y": 0.0}
    assert metrics.scores_by_group(counts, ["x", "x", "z"]) == {"x": pytest.approx(0.6)}
    with pytest.raises(ValueError, match="no score"):
        metrics.worst({})


def test_calibration_error_by_hand():
    table = np.zeros((15, 3))
    table[13], table[8], table[10] = [2, 1, 1.8], [1, 1, 0.6], [1, 1, 0.7]  # count, right, summed top probability
    assert metrics.expected_calibration_error(table) == pytest.approx((0.8 + 0.4 + 0.3) / 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
def test_spearman_is_the_correlation_of_ranks(pairs):
    weights, quality = np.array(pairs, dtype=float).T
    measured = metrics.weight_quality_correlation(weights, quality)
    if np.ptp(weights) == 0 or np.ptp(quality) == 0:
        assert np.isnan(measured)
    else:
        assert measured == pytest.approx(np.corrcoef(rankdata(weights), rankdata(quality))[0, 1])
