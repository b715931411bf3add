"""The paper's corpus protocol: which sessions stay is decided by the sessions and the seed, and by nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emolab.names import UserError
from emolab.sessions.facts import SessionFacts, facts_of, longest_run
from emolab.sessions.protocol import Protocol, normalised, select
from emolab.sessions.schema import Session

CLASSES = ("low", "middle", "high")


def facts(index: int, *, gap: int = 0, absent: bool = False, labels: tuple[int, ...] = (1, 0, 0)) -> SessionFacts:
    return SessionFacts(
        session_id=f"s{index}",
        speaker_id=f"p{index % 7}",
        steps=20,
        step_seconds=0.5,
        label_counts=labels,
        present={"audio": 0 if absent else 20 - gap, "text": 20},
        longest_gap={"audio": 20 if absent else gap, "text": 0},
    )


@given(st.lists(st.booleans(), max_size=40))
def test_the_longest_run_is_found_by_counting(mask: list[bool]) -> None:
    runs = [len(run) for run in "".join("x" if value else " " for value in mask).split()]
    assert longest_run(np.array(mask, bool)) == max(runs, default=0)


def test_a_gap_counts_in_seconds_and_exactly_at_the_limit_a_session_stays() -> None:
    sessions = [facts(0, gap=4), facts(1, gap=5), facts(2, absent=True)]
    kept, dropped = select(sessions, Protocol(max_gap_seconds=2), CLASSES, seed=0)
    assert [each.session_id for each in kept] == ["s0"]
    assert [(each.session_id, each.rule) for each in dropped] == [("s1", "gap"), ("s2", "absent modality")]
    assert "2.5 s" in dropped[0].reason
    kept, _ = select(sessions, Protocol(max_gap_seconds=2, absent_modality="keep"), CLASSES, seed=0)
    assert [each.session_id for each in kept] == ["s0", "s2"]
    kept, dropped = select(sessions, Protocol(max_gap_seconds=2, gap_modalities=("text",)), CLASSES, seed=0)
    assert (len(kept), dropped) == (3, [])


LABELS = st.sampled_from([(3, 1, 1), (0, 9, 2), (1, 1, 5), (0, 0, 0), (2, 2, 0)])


@given(st.lists(LABELS, min_size=1, max_size=60), st.integers(0, 3), st.randoms())
def test_balancing_leaves_equally_many_of_every_class_whatever_the_order(
    labels: list[tuple[int, int, int]], seed: int, order: object
) -> None:
    sessions = [facts(index, labels=each) for index, each in enumerate(labels)]
    counts = Counter(each.dominant for each in sessions)
    fewest = min(counts[label] for label in range(3))
    protocol = Protocol(balance="classes")
    if not fewest:
        with pytest.raises(UserError, match="dominant class of no session"):
            select(sessions, protocol, CLASSES, seed=seed)
        return
    kept, dropped = select(sessions, protocol, CLASSES, seed=seed)
    assert Counter(each.dominant for each in kept) == dict.fromkeys(range(3), fewest)
    assert len(kept) + len(dropped) == len(sessions)
    assert [each.session_id for each in kept] == sorted((e.session_id for e in kept), key=lambda name: int(name[1:]))
    shuffled = list(sessions)
    order.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    again, _ = select(shuffled, protocol, CLASSES, seed=seed)
    assert {each.session_id for each in again} == {each.session_id for each in kept}


def test_another_seed_keeps_other_sessions_of_the_same_numbers() -> None:
    sessions = [facts(index, labels=((5, 0, 0), (0, 5, 0), (0, 0, 5), (0, 0, 5))[index % 4]) for index in range(80)]
    one, two = (
        {each.session_id for each in select(sessions, Protocol(balance="classes"), CLASSES, seed=seed)[0]}
        for seed in (0, 1)
    )
    assert len(one) == len(two) == 60
    assert one != two


def test_doing_nothing_keeps_everything_and_leaves_no_trace() -> None:
    sessions = [facts(0, absent=True), facts(1, labels=(0, 0, 0))]
    assert select(sessions, Protocol(), CLASSES, seed=0) == (sessions, [])
    assert Protocol().identity() == {}


def test_a_protocol_that_leaves_nothing_or_names_a_strange_modality_says_so(one_line: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        select([facts(0, gap=9)], Protocol(max_gap_seconds=2), CLASSES, seed=0)
    one_line(error, "none of 1 sessions", "audio is absent for 4.5 s")
    with pytest.raises(UserError) as error:
        select([facts(0)], Protocol(max_gap_seconds=2, gap_modalities=("sound",)), CLASSES, seed=0)
    one_line(error, "sound", "audio, text")


def test_normalising_uses_observed_steps_alone() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(100.0, 5.0, (12, 3)).astype(np.float32)
    values[:, 2] = 7.0
    present = np.arange(12) % 3 != 0
    values[~present] = np.nan
    session = Session(
        session_id="s",
        speaker_id="p",
        corpus="c",
        step_seconds=1.0,
        features={"audio": values},
        present={"audio": present},
        labels=np.zeros(12, np.int64),
    )
    scaled = normalised(session).features["audio"]
    assert scaled.dtype == np.float32
    expected = (values[present] - values[present].mean(0)) / np.where(
        values[present].std(0) > 0, values[present].std(0), 1
    )
    np.testing.assert_allclose(scaled[present], expected, atol=1e-4)
    assert (scaled[~present] == 0).all()
    silent = replace(session, present={"audio": np.zeros(12, bool)})
    assert (normalised(silent).features["audio"] == 0).all()
    found = facts_of(session, classes=2)
    assert (found.present, found.longest_gap, found.dominant) == ({"audio": 8}, {"audio": 1}, 0)
