"""EduSim's filter is exact, which is checked twice.

Against enumeration of every hidden path with joint Gaussian densities: it is the posterior of the process as
written. By calibration on sampled sessions: that process is what is sampled.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.edusim import EduSim
from emolab.corpora.edusim_filter import class_posteriors
from emolab.corpora.edusim_process import CLASSES, LACKING_PROBABILITY, PROCESSES, class_start, class_steps
from emolab.sessions.schema import Session

TINY = EduSim(sessions=400, speakers=3, mean_steps=2, audio_features=3, visual_features=4, text_features=5, seed=3)


@lru_cache(maxsize=1)
def sample() -> tuple[EduSim, list[Session]]:
    """400 sessions at the default settings: two full turns of speakers and dominant classes."""
    corpus = EduSim(sessions=400)
    return corpus, [corpus.load(reference) for reference in corpus.references()]


def path_log_likelihoods(session: Session, modality: str, steps: int) -> tuple[np.ndarray, float]:
    """(Q^steps,) log likelihood of every path of (class, condition), and that of a session without the modality.

    Unlike the filter, which goes from step to step, this takes each run of observed steps as one joint Gaussian.
    """
    process = PROCESSES[modality]
    count = len(process.scales)
    paths = np.indices((len(CLASSES) * count,) * steps).reshape(steps, -1).T  # (paths, steps)
    conditions = paths % count
    means = TINY.speaker_means(session.speaker_id, modality).reshape(len(CLASSES) * count, -1)
    present = session.present[modality][:steps]
    observed = process.observed[conditions]
    total = np.log(np.where(present, observed, np.maximum(1 - observed, 1e-300))).sum(axis=1)
    run: list[int] = []
    for step in range(steps + 1):
        if step < steps and present[step]:
            run.append(step)
        elif run:
            shown, scales = means[paths[:, run]], process.scales[conditions[:, run]]
            noise = (session.features[modality][run] - shown) / scales[..., None]
            covariance = process.correlation ** np.abs(np.subtract.outer(run, run))
            quadratic = np.einsum("psd,st,ptd->p", noise, np.linalg.inv(covariance), noise)
            volume = np.linalg.slogdet(covariance)[1] / 2 + np.log(scales).sum(axis=1)
            total += -quadratic / 2 - means.shape[1] * volume
            run = []
    return total, -np.inf if present.any() else 0.0


def enumerated_posterior(session: Session, steps: int, modalities: tuple[str, ...]) -> np.ndarray:
    """(C,) probabilities of the class at the last of ``steps``, by summing over every hidden path."""
    counts = [len(CLASSES), *(len(PROCESSES[name].scales) for name in modalities)]
    joint = np.indices((int(np.prod(counts)),) * steps).reshape(steps, -1)  # (steps, paths)
    classes, *conditions = np.unravel_index(joint, counts)
    log_prior = np.zeros(joint.shape[1])
    likelihoods, missing = [], []
    for name, condition in zip(modalities, conditions, strict=True):
        process, count = PROCESSES[name], len(PROCESSES[name].scales)
        with np.errstate(divide="ignore"):
            log_prior += np.log(process.start[classes[0], condition[0]])
            for step in range(1, steps):
                log_prior += np.log(process.step[classes[step], condition[step - 1], condition[step]])
        table, unrecorded = path_log_likelihoods(session, name, steps)
        place = np.ravel_multi_index(tuple(classes * count + condition), (len(CLASSES) * count,) * steps)
        likelihoods.append(table[place])
        missing.append(np.full(joint.shape[1], unrecorded))
    # which modality the session lacks, if any, is one more hidden variable
    recorded = np.log(1 - LACKING_PROBABILITY * len(modalities) / 3) + sum(likelihoods)
    lacking = [
        np.log(LACKING_PROBABILITY / 3) + missing[lacked] + sum(likelihoods[:lacked] + likelihoods[lacked + 1 :])
        for lacked in range(len(modalities))
    ]
    log_weight = log_prior + np.logaddexp.reduce([recorded, *lacking])
    chain = np.zeros(joint.shape[1])
    for dominant in range(len(CLASSES)):
        probability = class_start()[dominant, classes[0]] / len(CLASSES)
        for step in range(1, steps):
            probability = probability * class_steps()[dominant, classes[step - 1], classes[step]]
        chain += probability
    weight = np.exp(log_weight - log_weight.max()) * chain
    by_class = np.bincount(classes[-1], weights=weight, minlength=len(CLASSES))
    return by_class / by_class.sum()


@pytest.mark.parametrize(
    ("modalities", "longest", "examples"),
    [
        (MODALITIES, 2, 12),
        (MODALITIES, 3, 2),
        (("audio", "text"), 3, 30),
        (("visual", "text"), 3, 6),
        (("text",), 3, 30),
    ],
)
def test_filter_equals_enumeration(modalities: tuple[str, ...], longest: int, examples: int) -> None:
    sessions = [TINY.load(each) for each in TINY.references()]
    fitting = [session for session in sessions if session.num_steps == longest]
    lacking = [s for s in fitting if not all(s.present[name].any() for name in modalities)]
    gaps = [s for s in fitting if 0 < s.present["text"].sum() < longest]
    assert lacking
    assert gaps
    chosen = lacking[:2] + gaps[: examples // 2] + fitting[: examples // 2]
    posteriors = class_posteriors(chosen, TINY.speaker_means, modalities=modalities)
    for session, posterior in zip(chosen, posteriors, strict=True):
        for step in range(longest):
            expected = enumerated_posterior(session, step + 1, modalities)
            np.testing.assert_allclose(posterior[step], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("modalities", [MODALITIES, ("audio",), ("visual",), ("text",), ()])
def test_filter_is_calibrated_on_what_is_sampled(modalities: tuple[str, ...]) -> None:
    """Were the simulator to sample anything but the process inverted, expected and actual hits would part."""
    corpus, sessions = sample()
    posteriors = class_posteriors(sessions, corpus.speaker_means, modalities=modalities)
    surprises = []
    for session, posterior in zip(sessions, posteriors, strict=True):
        np.testing.assert_allclose(posterior.sum(axis=1), 1)
        hits = posterior.argmax(axis=1) == session.labels
        each_class = np.eye(len(CLASSES))[session.labels] - posterior
        squares = each_class[np.arange(len(hits)), session.labels] - (1 - np.square(posterior).sum(axis=1))
        surprises.append([(hits - posterior.max(axis=1)).mean(), squares.mean(), *each_class.mean(axis=0)])
    scores = np.mean(surprises, axis=0) / (np.std(surprises, axis=0) / np.sqrt(len(sessions)))
    assert np.abs(scores).max() < 3.5


def test_filter_is_causal_and_ignores_the_batch() -> None:
    corpus, sessions = sample()
    together = class_posteriors(sessions[:40], corpus.speaker_means)
    for session, posterior in list(zip(sessions, together, strict=False))[::13]:
        (alone,) = class_posteriors([session], corpus.speaker_means)
        np.testing.assert_allclose(alone, posterior, rtol=1e-9)
        cut = Session(
            session_id=session.session_id,
            speaker_id=session.speaker_id,
            corpus=session.corpus,
            step_seconds=session.step_seconds,
            features={name: values[:9] for name, values in session.features.items()},
            present={name: values[:9] for name, values in session.present.items()},
            labels=session.labels[:9],
        )
        np.testing.assert_allclose(class_posteriors([cut], corpus.speaker_means)[0], posterior[:9], rtol=1e-9)


def accuracy(modalities: tuple[str, ...]) -> float:
    corpus, sessions = sample()
    posteriors = class_posteriors(sessions, corpus.speaker_means, modalities=modalities)
    truth = np.concatenate([session.labels for session in sessions])
    return float((np.concatenate(posteriors).argmax(axis=1) == truth).mean())


def test_modalities_rank_as_designed_and_complement_each_other() -> None:
    visual, audio, text = accuracy(("visual",)), accuracy(("audio",)), accuracy(("text",))
    assert visual > audio > text > accuracy(())
    assert accuracy(MODALITIES) > visual + 0.1
