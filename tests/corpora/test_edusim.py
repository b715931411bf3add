"""EduSim: reproducible sampling, the promised structure, mistakes refused in one line."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emolab.corpora.corpus import SessionReference
from emolab.corpora.edusim import EduSim
from emolab.names import UserError
from emolab.sessions.schema import Session


@lru_cache(maxsize=1)
def sample() -> tuple[EduSim, list[Session]]:
    """300 sessions at the default settings."""
    corpus = EduSim(sessions=300)
    return corpus, [corpus.load(reference) for reference in corpus.references()]


# ---- reproducibility -----------------------------------------------------------------------------------------


def digest(corpus: EduSim, order: list[int]) -> str:
    """SHA-256 over sessions by index, however they were ordered when generated."""
    references = corpus.references()
    parts = {}
    for index in order:
        session = corpus.load(references[index])
        arrays = [*session.features.values(), *session.present.values(), *session.quality.values()]
        parts[index] = b"".join(array.tobytes() for array in (*arrays, session.labels))
    return hashlib.sha256(b"".join(parts[index] for index in sorted(parts))).hexdigest()


def test_bytes_are_the_same_in_another_process_with_other_threads_and_order() -> None:
    here = digest(EduSim(sessions=60), list(range(0, 60, 7)))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_edusim import EduSim, digest;"
        "print(digest(EduSim(sessions=60), list(range(56, -1, -7))))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
        "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root / 'model'}",
        "PYTHONHASHSEED": "7",
    }
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert there.stdout.strip() == here


@given(index=st.integers(0, 59), sessions=st.integers(60, 5000))
@settings(max_examples=20, deadline=None)
def test_a_smaller_corpus_is_a_prefix_of_a_larger_one(index: int, sessions: int) -> None:
    small, large = EduSim(sessions=60), EduSim(sessions=sessions)
    assert small.references()[index] == large.references()[index]
    assert digest(small, [index]) == digest(large, [index])


def test_seeds_change_everything() -> None:
    first, second = EduSim(sessions=60), EduSim(sessions=60, seed=1)
    assert digest(first, [5]) != digest(second, [5])
    voices = [corpus.speaker_means("speaker-000", "audio") for corpus in (first, second)]
    assert not np.allclose(voices[0], voices[1])
    assert [each.published_split for each in first.references()] != [
        each.published_split for each in second.references()
    ]


def test_widths_and_step_length_leave_the_hidden_session_alone() -> None:
    narrow, wide = EduSim(sessions=60), EduSim(sessions=60, text_features=300, step_seconds=0.5)
    for reference in narrow.references():
        np.testing.assert_array_equal(narrow.labels(reference), wide.load(reference).labels)


# ---- structure -----------------------------------------------------------------------------------------------


def test_default_sizes_are_those_of_the_design() -> None:
    references = EduSim().references()
    assert len(references) == 5000
    speakers = Counter({each.speaker_id: each.published_split for each in references}.values())
    assert speakers == {"train": 35, "validation": 5, "test": 10}
    sessions = Counter(each.published_split for each in references)
    assert sessions == {"train": 3500, "validation": 500, "test": 1000}
    pairs = Counter((each.speaker_id, index % 4) for index, each in enumerate(references))
    assert set(pairs.values()) == {25}, "every speaker has every dominant class equally often"
    assert len(pairs) == 200


@given(speakers=st.integers(3, 80), surplus=st.integers(0, 200), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_size_gives_three_disjoint_splits(speakers: int, surplus: int, seed: int) -> None:
    references = EduSim(sessions=speakers + surplus, speakers=speakers, seed=seed).references()
    split_of = {each.speaker_id: each.published_split for each in references}
    assert len(split_of) == speakers
    assert all(split_of[each.speaker_id] == each.published_split for each in references)
    sizes = Counter(split_of.values())
    assert set(sizes) == {"train", "validation", "test"}
    assert abs(sizes["test"] - 0.2 * speakers) < 1
    assert abs(sizes["validation"] - 0.1 * speakers) < 1


def test_lengths_vary_around_the_mean() -> None:
    lengths = [session.num_steps for session in sample()[1]]
    assert (min(lengths), max(lengths)) == (18, 42)
    assert abs(np.mean(lengths) - 30) < 2


def test_the_dominant_class_prevails() -> None:
    _, sessions = sample()
    shares = np.array([(session.labels == index % 4).mean() for index, session in enumerate(sessions)])
    for dominant in range(4):
        assert shares[dominant::4].mean() > 0.5
    assert (shares < 0.5).any(), "a tendency, not a certainty"


# ---- scores -----------------------------------------------------------------------------------------------


def test_reference_scores_give_ceiling_and_prior() -> None:
    corpus = EduSim(sessions=600)
    references = [each for each in corpus.references() if each.published_split == "test"]
    scores = corpus.reference_scores("test", references)
    assert set(scores) == {"ceiling_accuracy", "ceiling_macro_f1", "ceiling_sessions", "class_prior_accuracy"}
    assert scores["ceiling_sessions"] == len(references)
    assert 0.8 < scores["ceiling_accuracy"] < 0.9
    assert abs(scores["ceiling_macro_f1"] - scores["ceiling_accuracy"]) < 0.05
    train = [corpus.labels(each) for each in corpus.references() if each.published_split == "train"]
    prior = Counter(np.concatenate(train).tolist()).most_common(1)[0][0]
    labels = np.concatenate([corpus.labels(each) for each in references])
    assert scores["class_prior_accuracy"] == pytest.approx((labels == prior).mean())


def test_the_ceiling_is_over_all_classes_as_every_other_score() -> None:
    corpus = EduSim(sessions=3, speakers=3, mean_steps=1, seed=1)
    scores = corpus.reference_scores("test", corpus.references()[:1])
    assert scores["ceiling_accuracy"] == 1.0
    assert scores["ceiling_macro_f1"] == 0.25, "one step, and so one of four classes"


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speakers": 2}, "speakers=2"),
        ({"sessions": 49}, "sessions=49"),
        ({"mean_steps": 0}, "mean_steps=0"),
        ({"step_seconds": 0.0}, "step_seconds"),
        ({"step_seconds": float("nan")}, "step_seconds"),
        ({"seed": -1}, "seed=-1"),
        ({"visual_features": 2}, "visual_features=2"),
    ],
)
def test_nonsense_is_refused_in_one_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        EduSim(**options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("session_id", "speaker_id"),
    [
        ("edusim-000060", "speaker-010"),
        ("edusim-000003", "speaker-004"),
        ("lesson-1", "speaker-001"),
        ("edusim-３３３３３３", "speaker-001"),
    ],
)
def test_foreign_references_are_refused(session_id: str, speaker_id: str) -> None:
    with pytest.raises(UserError, match="has no session"):
        EduSim(sessions=60).load(SessionReference(session_id=session_id, speaker_id=speaker_id))


@pytest.mark.parametrize("speakers", [3, 4, 5, 12, 50])
def test_speakers_meet_every_dominant_class_equally_often(speakers: int) -> None:
    references = EduSim(sessions=8 * speakers, speakers=speakers).references()
    pairs = Counter((each.speaker_id, index % 4) for index, each in enumerate(references))
    assert len(pairs) == 4 * speakers
    assert set(pairs.values()) == {2}
