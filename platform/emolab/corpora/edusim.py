"""EduSim, the embedded data set: simulated learning sessions with a known answer.

A fresh machine has no recordings of learners with all three modalities, so it needs a stand-in that is honest
about being one. ``edusim_process`` writes down the hidden process, ``edusim_sampling`` samples it,
``edusim_filter`` inverts it exactly, which gives the best reachable accuracy. Scores on EduSim say nothing
about real learners.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.catalog import register
from emolab.corpora.corpus import Corpus, SessionReference, Split
from emolab.corpora.edusim_filter import class_posteriors
from emolab.corpora.edusim_process import CLASSES, SIGNAL_WIDTH
from emolab.corpora.edusim_sampling import (
    HiddenSession,
    sample_features,
    sample_hidden,
    session_generator,
    speaker_means,
    speaker_splits,
)
from emolab.names import UserError
from emolab.scores import macro_f1
from emolab.sessions.schema import Session

GENERATOR_VERSION = 1
"""Raised whenever equal options give other sessions than before."""

CEILING_SESSIONS = 400
"""So many sessions of a split, the first ones, go through the exact filter: speakers and dominant classes take
turns, so any stretch of sessions is balanced."""

_SESSION_ID = re.compile(r"edusim-([0-9]{6,12})")
_SPEAKER_ID = re.compile(r"speaker-([0-9]{3,9})")


@register
@dataclass(frozen=True, kw_only=True)
class EduSim(Corpus):
    """Simulated sessions; each is a function of the options and its own index alone.

    Session i has the hidden dominant class i mod 4: its class chain starts there more often, stays there
    longer and returns there more often. That is a tendency, not a promise about the most frequent label of
    every session.
    """

    name = "edusim"
    generated = True

    sessions: int = 5000
    """Number of sessions. Session 17 of 100 is session 17 of 5,000, all else being equal."""
    speakers: int = 50
    """Number of speakers, split 70/10/20 % into train, validation and test."""
    mean_steps: int = 30
    """Mean length of a session; lengths are uniform between 60 % and 140 % of it."""
    step_seconds: float = 1.0
    """Seconds that a step stands for: a label, since the dynamics are per step."""
    seed: int = 0
    """Seed of sessions, speakers, projections and the split."""
    audio_features: int = 40
    """Width of the audio features."""
    visual_features: int = 64
    """Width of the visual features."""
    text_features: int = 48
    """Width of the text features."""

    def __post_init__(self) -> None:
        _require(self.speakers >= 3, f"speakers={self.speakers}: must be 3 or more, one for each split")
        _require(
            self.sessions >= self.speakers,
            f"sessions={self.sessions}: must be {self.speakers} or more, one for each speaker",
        )
        _require(self.mean_steps >= 1, f"mean_steps={self.mean_steps}: must be 1 or more")
        _require(
            math.isfinite(self.step_seconds) and self.step_seconds > 0,
            f"step_seconds={self.step_seconds}: must be a positive number of seconds",
        )
        _require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        for modality, width in self.dimensions.items():
            _require(width >= SIGNAL_WIDTH, f"{modality}_features={width}: must be {SIGNAL_WIDTH} or more")

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

    @property
    def dimensions(self) -> Mapping[str, int]:
        return {"audio": self.audio_features, "visual": self.visual_features, "text": self.text_features}

    @property
    def has_quality(self) -> bool:
        return True

    def references(self) -> Sequence[SessionReference]:
        splits = speaker_splits(self.seed, self.speakers)
        return [
            SessionReference(
                session_id=f"edusim-{index:06d}",
                speaker_id=f"speaker-{speaker:03d}",
                published_split=splits[speaker],
            )
            for index, speaker in enumerate(map(self._speaker, range(self.sessions)))
        ]

    def load(self, reference: SessionReference) -> Session:
        """Generate one session.

        ``quality`` is 1 where a modality was observed in its clean condition, else 0: degraded, or not
        observed at all. Restrict it by ``present`` to score confidence only where there was something to
        judge.

        Raises:
            UserError: the reference does not belong to a corpus with these options.
        """
        generator, hidden = self._hidden(reference)
        features = {
            name: sample_features(generator, name, hidden, self.speaker_means(reference.speaker_id, name))
            for name in MODALITIES
        }
        quality = {name: (hidden.conditions[name] == 0) & hidden.present[name] for name in MODALITIES}
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.speaker_id,
            corpus=self.name,
            step_seconds=self.step_seconds,
            features=features,
            present=hidden.present,
            labels=hidden.classes,
            quality={name: values.astype(np.float32) for name, values in quality.items()},
        )

    def labels(self, reference: SessionReference) -> NDArray[np.int64]:
        """(T,) labels of a session, without the cost of its features."""
        return self._hidden(reference)[1].classes

    def speaker_means(self, speaker_id: str, modality: str) -> NDArray[np.float64]:
        """(C, K, D) what a speaker shows without noise, by class and condition of the modality."""
        match = _SPEAKER_ID.fullmatch(speaker_id)
        _require(match is not None, f"EduSim has no speaker {speaker_id!r}: ids look like speaker-007")
        assert match is not None
        return speaker_means(self.seed, int(match[1]), modality, self.dimensions[modality])

    def provenance(self) -> Mapping[str, Any]:
        return {
            "source": "EduSim, simulated: no recording of a learner is involved",
            "generator_version": GENERATOR_VERSION,
            "options": asdict(self),
            "dynamics": "after D'Mello and Graesser, Dynamics of affective states during complex learning, "
            "Learning and Instruction, 2012",
            "caveat": "compare scores with EduSim's own ceiling and class prior, never with other corpora",
        }

    def reference_scores(self, split: Split, references: Sequence[SessionReference]) -> Mapping[str, float]:
        """Accuracy and macro-F1 of the exact filter, and accuracy of the class prior.

        The filter knows the generator and every speaker's offset and gain, so on average no causal model is
        more accurate; a model that looks ahead in the session is not bounded by it. Macro-F1 is that of the
        most accurate answers. It runs over the first ``ceiling_sessions`` sessions. The prior always answers
        the most frequent class of the training speakers' sessions and is scored on every session given.
        """
        if not references:
            return {}
        sessions = [self.load(reference) for reference in references[:CEILING_SESSIONS]]
        posteriors = class_posteriors(sessions, self.speaker_means)
        predicted = np.concatenate([posterior.argmax(axis=1) for posterior in posteriors])
        truth = np.concatenate([session.labels for session in sessions])
        confusion = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
        np.add.at(confusion, (truth, predicted), 1)
        labels = np.concatenate([self.labels(reference) for reference in references])
        return {
            "ceiling_accuracy": float((predicted == truth).mean()),
            "ceiling_macro_f1": float(macro_f1(confusion)),
            "ceiling_sessions": float(len(sessions)),
            "class_prior_accuracy": float((labels == self._most_frequent_training_class()).mean()),
        }

    def _hidden(self, reference: SessionReference) -> tuple[np.random.Generator, HiddenSession]:
        """The hidden part of a session, and its generator standing where the features begin."""
        match = _SESSION_ID.fullmatch(reference.session_id)
        index = int(match[1]) if match else self.sessions
        _require(
            index < self.sessions and reference.speaker_id == f"speaker-{self._speaker(index):03d}",
            f"EduSim with {self.sessions} sessions and {self.speakers} speakers has no session "
            f"{reference.session_id!r} of {reference.speaker_id!r}: take references from the corpus itself",
        )
        generator = session_generator(self.seed, index)
        hidden = sample_hidden(generator, dominant=index % len(CLASSES), mean_steps=self.mean_steps)
        return generator, hidden

    def _most_frequent_training_class(self) -> int:
        counts = np.zeros(len(CLASSES), dtype=np.int64)
        for reference in self.references():
            if reference.published_split == "train":
                counts += np.bincount(self.labels(reference), minlength=len(CLASSES))
        return int(np.argmax(counts))

    def _speaker(self, index: int) -> int:
        """Speakers take turns; the turn shifts by one before it repeats itself against the dominant classes.

        Without the shift 50 speakers and 4 classes would meet only in pairs of equal parity. With it every
        speaker has every dominant class equally often once sessions is a multiple of 4 times speakers.
        """
        return (index + index // math.lcm(len(CLASSES), self.speakers)) % self.speakers


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
