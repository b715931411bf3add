"""Where seconds become steps."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.features.grid import StepMeans, fitted, step_labels, steps_covering, steps_of

step_lengths = st.sampled_from([0.1, 0.25, 0.5, 1.0, 3.0])


@given(st.integers(0, 100_000), step_lengths)
@settings(deadline=None)
def test_a_step_begins_at_its_own_start_and_ends_before_the_next(step: int, step_seconds: float) -> None:
    start = step * step_seconds
    times = [start, start + 0.4 * step_seconds, start + 0.99 * step_seconds]
    assert steps_of(times, step_seconds).tolist() == [step] * 3
    assert steps_covering(start, step_seconds) == step
    assert steps_covering(start + 0.01, step_seconds) == step + 1


@given(
    st.lists(st.tuples(st.floats(0, 30, width=32), st.integers(-50, 50)), max_size=60),
    step_lengths,
    st.integers(1, 7),
)
@settings(max_examples=50, deadline=None)
def test_means_are_those_of_each_steps_vectors_however_they_arrive(
    arrivals: list[tuple[float, int]], step_seconds: float, group: int
) -> None:
    means = StepMeans(2, step_seconds)
    for first in range(0, len(arrivals), group):
        some = arrivals[first : first + group]
        means.add([time for time, _ in some], np.array([[value, -value] for _, value in some], dtype=np.float32))
    features, present = means.result()
    steps = steps_of([time for time, _ in arrivals], step_seconds)
    assert len(features) == len(present) == (steps.max() + 1 if arrivals else 0)
    for step in range(len(features)):
        values = [value for (_, value), at in zip(arrivals, steps, strict=True) if at == step]
        assert present[step] == bool(values)
        expected = np.mean(values) if values else 0.0
        np.testing.assert_allclose(features[step], [expected, -expected], atol=1e-5)


def test_what_lies_before_the_start_is_left_out() -> None:
    means = StepMeans(1, 1.0)
    means.add([-0.5, 0.5], np.array([[100.0], [1.0]]))
    assert means.result()[0].tolist() == [[1.0]]


def test_absent_steps_hold_zeros_also_after_scaling() -> None:
    means = StepMeans(1, 1.0)
    means.add([2.0], np.array([[5.0]]))
    features, present = means.result(shift=np.array([1.0]), scale=np.array([2.0]))
    assert features.tolist() == [[0.0], [0.0], [2.0]]
    assert present.tolist() == [False, False, True]


def test_fitting_cuts_the_end_or_fills_it_up_as_absent() -> None:
    features, present = np.ones((3, 2), np.float32), np.array([True, False, True])
    assert fitted(features, present, 2)[1].tolist() == [True, False]
    longer, mask = fitted(features, present, 5)
    assert mask.tolist() == [True, False, True, False, False]
    assert longer[:, 0].tolist() == [1, 0, 1, 0, 0]


def labels(*spans: tuple[float, float, int], seconds: float = 4.0, step_seconds: float = 1.0) -> list[int]:
    steps = steps_covering(seconds, step_seconds)
    return step_labels(spans, steps=steps, seconds=seconds, step_seconds=step_seconds).tolist()


def test_the_class_that_covers_most_of_a_step_is_its_label() -> None:
    assert labels((0, 2.2, 1), (2.2, 4, 3)) == [1, 1, 3, 3]
    assert labels((0, 0.3, 0), (0.3, 0.9, 2)) == [2, *[IGNORED_LABEL] * 3]
    assert labels((0.0, 0.3, 0), (0.5, 0.8, 0)) == [0, *[IGNORED_LABEL] * 3], "pieces of one class add up"
    twice = [(0.0, 0.3, 0), (0.1, 0.2, 0), (0.2, 0.35, 0), (0.35, 0.85, 1)]
    assert labels(*twice) == [1, *[IGNORED_LABEL] * 3], "what they share counts once"


def test_less_than_half_a_step_is_no_label() -> None:
    assert labels((0.0, 0.45, 1), (1.5, 2.0, 2)) == [IGNORED_LABEL, 2, IGNORED_LABEL, IGNORED_LABEL]
    assert labels((3.0, 3.2, 1), seconds=3.3)[3] == 1, "only the part inside the recording counts"


def test_what_lies_after_the_recordings_end_counts_for_no_class() -> None:
    assert labels((18, 22, 2), (22, 60, 1), seconds=23, step_seconds=10) == [IGNORED_LABEL, IGNORED_LABEL, 2]
    assert labels((0.28, 1.0, 1), seconds=0.3) == [IGNORED_LABEL]
    assert labels((0.14, 1.0, 1), seconds=0.3) == [1]


def test_equal_shares_go_to_the_lower_class_and_no_class_is_no_label() -> None:
    assert labels((0.5, 1.0, 0), (0.0, 0.5, 2), seconds=1.0) == [0]
    assert labels((0.0, 1.0, -1), seconds=1.0) == [IGNORED_LABEL]


def test_labels_far_beyond_the_recording_cost_nothing() -> None:
    assert labels((1.0, 1e300, 2)) == [IGNORED_LABEL, 2, 2, 2]


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 10), st.integers(0, 3)), max_size=8),
    step_lengths,
    st.floats(0.5, 25),
)
@settings(deadline=None)
def test_a_label_covers_half_its_step_and_no_class_covers_more(
    raw: list[tuple[float, float, int]], step_seconds: float, seconds: float
) -> None:
    spans = [(start, start + length, index) for start, length, index in raw]
    steps = steps_covering(seconds, step_seconds)
    for step, label in enumerate(step_labels(spans, steps=steps, seconds=seconds, step_seconds=step_seconds)):
        low, high = step * step_seconds, min((step + 1) * step_seconds, seconds)
        bounds = sorted({low, high, *(time for s, e, _ in spans for time in (s, e) if low < time < high)})
        pieces = [((start + end) / 2, end - start) for start, end in itertools.pairwise(bounds)]
        covered = [
            sum(length for middle, length in pieces if any(s <= middle <= e and i == index for s, e, i in spans))
            for index in range(4)
        ]
        half = (high - low) / 2
        if label == IGNORED_LABEL:
            assert max(covered) <= half + 1e-5
        else:
            assert covered[label] >= max(half, max(covered)) - 1e-5
            assert covered[label] == pytest.approx(max(covered), abs=1e-5)
