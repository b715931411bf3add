"""Several annotators: majority, ties, and kappas checked against published worked examples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.corpora.annotators import (
    NOT_JUDGED,
    agreement,
    cohen_kappa,
    fleiss_kappa,
    judgement_matrix,
    judgements_per_step,
    majority,
)

DIAGNOSES = [
    (0, 0, 0, 6, 0), (0, 3, 0, 0, 3), (0, 1, 4, 0, 1), (0, 0, 0, 0, 6), (0, 3, 0, 3, 0), (2, 0, 4, 0, 0),
    (0, 0, 4, 0, 2), (2, 0, 3, 1, 0), (2, 0, 0, 4, 0), (0, 0, 0, 0, 6), (1, 0, 0, 5, 0), (1, 1, 0, 4, 0),
    (0, 3, 3, 0, 0), (1, 0, 0, 5, 0), (0, 2, 0, 3, 1), (0, 0, 5, 0, 1), (3, 0, 0, 1, 2), (5, 1, 0, 0, 0),
    (0, 2, 0, 4, 0), (1, 0, 2, 0, 3), (0, 0, 0, 0, 6), (0, 1, 0, 5, 0), (0, 2, 0, 1, 3), (2, 0, 0, 4, 0),
    (1, 0, 0, 4, 1), (0, 5, 0, 1, 0), (4, 0, 0, 0, 2), (0, 2, 0, 4, 0), (1, 0, 5, 0, 0), (0, 0, 0, 0, 6),
]  # fmt: skip
"""Fleiss 1971, table 1: 30 patients, six psychiatrists each, five diagnoses; kappa is .430 there."""

CLASSES = ("confused", "curious", "bored")
judgements = st.integers(1, 12).flatmap(
    lambda items: st.lists(
        st.lists(st.integers(NOT_JUDGED, 2), min_size=4, max_size=4), min_size=items, max_size=items
    ).map(lambda rows: np.array(rows, dtype=np.int64))
)


def from_counts(counts: list[tuple[int, ...]]) -> np.ndarray:
    return np.array([[place for place, count in enumerate(row) for _ in range(count)] for row in counts])


def test_fleiss_kappa_of_the_paper_that_defined_it() -> None:
    assert fleiss_kappa(from_counts(DIAGNOSES)) == pytest.approx(0.430, abs=5e-4)


def test_fleiss_kappa_per_class_of_the_paper_that_defined_it() -> None:
    """Its table 2: depression, personality disorder, schizophrenia, neurosis, other."""
    found = agreement(from_counts(DIAGNOSES), ("depression", "personality", "schizophrenia", "neurosis", "other"))
    assert found is not None
    expected = {"depression": 0.245, "personality": 0.245, "schizophrenia": 0.520, "neurosis": 0.471, "other": 0.566}
    assert found.per_class == pytest.approx(expected, abs=2e-3)
    assert (found.statistic, found.annotators, found.items, found.items_left_out) == ("fleiss_kappa", 6, 30, 0)


def test_cohen_kappa_of_a_two_by_two_table() -> None:
    """20 both yes, 15 both no, 5 and 10 apart: observed .7, expected .5."""
    table = [[1, 1]] * 20 + [[0, 0]] * 15 + [[1, 0]] * 5 + [[0, 1]] * 10
    assert cohen_kappa(np.array(table)) == pytest.approx(0.4)
    found = agreement(np.array(table), ("no", "yes"))
    assert found is not None
    assert (found.statistic, found.kappa, found.items) == ("cohen_kappa", pytest.approx(0.4), 50)


def test_items_judged_by_another_number_of_annotators_are_left_out() -> None:
    judged = np.array([[0, 0, 1], [1, 1, 1], [2, 2, -1], [0, -1, -1], [-1, -1, -1]])
    found = agreement(judged, CLASSES)
    assert found is not None
    assert (found.items, found.items_left_out) == (2, 3)
    assert found.kappa == fleiss_kappa(judged[:2])
    assert agreement(judged[3:], CLASSES) is None
    assert agreement(np.empty((0, 0), dtype=np.int64), CLASSES) is None


def test_kappa_is_undefined_where_one_class_is_all_there_is() -> None:
    assert cohen_kappa(np.zeros((5, 2), dtype=np.int64)) is None
    assert fleiss_kappa(np.zeros((5, 3), dtype=np.int64)) is None
    found = agreement(np.ones((5, 3), dtype=np.int64), CLASSES)
    assert found is not None
    assert found.kappa is None
    assert found.to_json()["per_class"] == dict.fromkeys(CLASSES)


def test_votes_become_a_matrix_by_name() -> None:
    votes = {"u1": {"mia": "bored", "ann": "curious"}, "u2": {"zoe": "confused"}}
    assert judgement_matrix(votes, CLASSES).tolist() == [[1, 2, -1], [-1, -1, 0]]


def test_majority_ties_and_silence() -> None:
    judged = np.array([[0, 0, 1], [0, 1, 2], [2, -1, -1], [-1, -1, -1], [0, 1, -1]])
    labels, ties = majority(judged, 3)
    assert labels.tolist() == [0, IGNORED_LABEL, 2, IGNORED_LABEL, IGNORED_LABEL]
    assert ties == 2


def test_spans_of_three_annotators_meet_on_the_grid() -> None:
    """Over four seconds: two agree on the first two steps, all differ on the third, nobody marked the last."""
    spans = {"c": [(0.0, 3.0, 2)], "a": [(0.0, 2.0, 0), (2.0, 3.0, 1)], "b": [(0.2, 2.0, 0), (2.0, 3.0, 0)]}
    judged = judgements_per_step(spans, steps=4, seconds=4.0, step_seconds=1.0)
    assert judged.tolist() == [[0, 0, 2], [0, 0, 2], [1, 0, 2], [-1, -1, -1]]
    labels, ties = majority(judged, 3)
    assert labels.tolist() == [0, 0, IGNORED_LABEL, IGNORED_LABEL]
    assert ties == 1
    assert judgements_per_step({}, steps=2, seconds=2.0, step_seconds=1.0).shape == (2, 0)


@given(judged=judgements)
@settings(max_examples=40, deadline=None)
def test_majority_is_what_counting_by_hand_gives(judged: np.ndarray) -> None:
    labels, ties = majority(judged, 3)
    expected, shared = [], 0
    for row in judged.tolist():
        common = Counter(each for each in row if each != NOT_JUDGED).most_common(2)
        tied = len(common) == 2 and common[0][1] == common[1][1]
        shared += tied
        expected.append(IGNORED_LABEL if tied or not common else common[0][0])
    assert labels.tolist() == expected
    assert ties == shared


@given(judged=judgements, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_agreement_knows_neither_the_order_of_items_nor_of_annotators(judged: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(generator.permutation(judged, axis=0), axis=1)
    first, second = agreement(judged, CLASSES), agreement(shuffled, CLASSES)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.kappa == pytest.approx(second.kappa)
        assert first.kappa is None or -1.0 - 1e-9 <= first.kappa <= 1.0 + 1e-9
        assert first.items + first.items_left_out == len(judged)
