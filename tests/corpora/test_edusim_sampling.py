"""EduSim's sampler draws what ``edusim_process`` writes down."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.edusim import EduSim
from emolab.corpora.edusim_process import CLASSES, LACKING_PROBABILITY, PROCESSES, class_start, class_steps
from emolab.corpora.edusim_sampling import HiddenSession, sample_hidden, session_generator
from emolab.sessions.schema import Session


@lru_cache(maxsize=1)
def sample() -> tuple[EduSim, list[Session]]:
    """300 sessions at the default settings."""
    corpus = EduSim(sessions=300)
    return corpus, [corpus.load(reference) for reference in corpus.references()]


@lru_cache(maxsize=1)
def hidden_sample() -> list[HiddenSession]:
    """3,000 hidden sessions; the dominant class of the i-th is i mod 4."""
    return [
        sample_hidden(session_generator(0, index), dominant=index % len(CLASSES), mean_steps=30)
        for index in range(3000)
    ]


def agrees(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts along the last axis are within 4.5 standard deviations of a multinomial's, impossible ones 0."""
    total = counts.sum(axis=-1, keepdims=True)
    deviation = np.sqrt(total * probabilities * (1 - probabilities))
    return bool((np.abs(counts - total * probabilities) <= 4.5 * deviation + 1e-9).all())


def test_classes_follow_the_chain_of_their_dominant_class() -> None:
    first, moves = np.zeros((4, 4)), np.zeros((4, 4, 4))
    for index, hidden in enumerate(hidden_sample()):
        first[index % 4, hidden.classes[0]] += 1
        np.add.at(moves[index % 4], (hidden.classes[:-1], hidden.classes[1:]), 1)
    assert agrees(first, class_start())
    assert agrees(moves, class_steps())


@pytest.mark.parametrize("modality", MODALITIES)
def test_conditions_follow_their_bursts(modality: str) -> None:
    process = PROCESSES[modality]
    first, moves = np.zeros(process.start.shape), np.zeros(process.step.shape)
    for hidden in hidden_sample():
        conditions = hidden.conditions[modality]
        first[hidden.classes[0], conditions[0]] += 1
        np.add.at(moves, (hidden.classes[1:], conditions[:-1], conditions[1:]), 1)
    assert agrees(first, process.start)
    assert agrees(moves, process.step)


def test_text_noise_starts_anew_after_an_absence() -> None:
    corpus, sessions = sample()
    neighbours, across = [], []
    for session in sessions:
        rest = session.features["text"] - corpus.speaker_means(session.speaker_id, "text")[session.labels, 0]
        clean, present = session.quality["text"] == 1, session.present["text"]
        neighbours.append((rest[1:] * rest[:-1])[clean[1:] & clean[:-1]])
        across.append((rest[2:] * rest[:-2])[clean[2:] & ~present[1:-1] & clean[:-2]])
    assert np.concatenate(neighbours).mean() == pytest.approx(PROCESSES["text"].correlation, abs=0.02)
    assert np.concatenate(across).mean() == pytest.approx(0, abs=0.02)


def test_laws_are_distributions() -> None:
    np.testing.assert_allclose(class_start().sum(axis=-1), 1)
    np.testing.assert_allclose(class_steps().sum(axis=-1), 1)
    assert (class_steps() > 0).all()
    for process in PROCESSES.values():
        np.testing.assert_allclose(process.start.sum(axis=-1), 1)
        np.testing.assert_allclose(process.step.sum(axis=-1), 1)
        assert (process.start >= 0).all()
        assert (process.step >= 0).all()


def test_a_stale_picture_never_starts_with_the_true_class() -> None:
    visual = PROCESSES["visual"]
    for label in range(len(CLASSES)):
        assert visual.start[label, 1 + label] == 0
        assert visual.step[label, 0, 1 + label] == 0
        assert visual.step[label, 1 + label, 1 + label] > 0.5, "but it may become the true one while it lasts"


def test_absence_and_quality() -> None:
    corpus, sessions = sample()
    for session in sessions:
        for modality in MODALITIES:
            gone = ~session.present[modality]
            assert not session.features[modality][gone].any()
            assert not session.quality[modality][gone].any()
            assert set(np.unique(session.quality[modality])) <= {0.0, 1.0}
    many = EduSim(sessions=1500)
    masks = [many.load(each).present for each in many.references()]
    lacking = np.mean([not all(mask.any() for mask in present.values()) for present in masks])
    assert abs(lacking - LACKING_PROBABILITY) < 4 * np.sqrt(LACKING_PROBABILITY / 1500)
    assert all(any(mask.any() for mask in present.values()) for present in masks)
    text = np.concatenate([present["text"] for present in masks])
    assert 0.5 < text.mean() < 0.7, "text is often absent"
    assert corpus.has_quality


@pytest.mark.parametrize(("modality", "clean", "degraded"), [("audio", 1.0, 2.5), ("visual", 1.0, 1.0)])
def test_noise_has_the_written_scale_and_smoothness(modality: str, clean: float, degraded: float) -> None:
    corpus, sessions = sample()
    noise: dict[float, list[np.ndarray]] = {0.0: [], 1.0: []}
    products: list[np.ndarray] = []
    for session in sessions:
        means = corpus.speaker_means(session.speaker_id, modality)[session.labels, 0]
        rest = session.features[modality] - means
        quality = session.quality[modality]
        noise[1.0].append(rest[session.present[modality] & (quality == 1)])
        noise[0.0].append(rest[session.present[modality] & (quality == 0)])
        both = (quality[1:] == 1) & (quality[:-1] == 1)
        products.append((rest[1:] * rest[:-1])[both])
    assert np.concatenate(noise[1.0]).std() == pytest.approx(clean, abs=0.02)
    assert np.concatenate(products).mean() == pytest.approx(PROCESSES[modality].correlation, abs=0.02)
    if degraded != clean:
        assert np.concatenate(noise[0.0]).std() == pytest.approx(degraded, abs=0.1)
