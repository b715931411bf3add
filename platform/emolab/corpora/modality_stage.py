"""One modality of a recorded session, from its files to features on the step grid."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emolab.corpora.corpus import Arrays, SessionReference
from emolab.corpora.signal_noise import SessionNoise
from emolab.features.audio import AudioExtractor, AudioSettings
from emolab.features.decoding import Limits, UnusableMediaError
from emolab.features.grid import Word
from emolab.features.signals import Pictures, Sound
from emolab.features.text import TextExtractor, TextSettings
from emolab.features.transcripts import check_words, read_words
from emolab.features.visual import VisualExtractor, VisualSettings

if TYPE_CHECKING:
    from emolab.corpora.recordings import RecordedCorpus, Recording

Extractor = AudioExtractor | VisualExtractor | TextExtractor


class ModalityStage:
    """Decodes one modality of a session and makes its features; holds the modality's model.

    Returns ``<modality>.features`` (T, D) float32, ``<modality>.present`` (T,) bool and ``<modality>.seconds`` (1,)
    float64, the end of what was decoded. A modality that a session lacks has T = 0.
    """

    def __init__(self, corpus: RecordedCorpus, modality: str) -> None:
        self.corpus, self.modality = corpus, modality
        self.extract = _extractor({"audio": corpus.audio, "visual": corpus.visual, "text": corpus.text}[modality])

    def __call__(self, reference: SessionReference, arrays: Arrays) -> Arrays:
        recording = self.corpus.recording(reference)
        try:
            features, present, seconds = self._extracted(recording)
        except UnusableMediaError as error:
            raise recording.refused(f"{self.modality}: {error}") from None
        return {
            f"{self.modality}.features": features,
            f"{self.modality}.present": present,
            f"{self.modality}.seconds": np.array([seconds]),
        }

    def _extracted(self, recording: Recording) -> tuple[NDArray[np.float32], NDArray[np.bool_], float]:
        """(T, D) features, (T,) presence, and the second at which the modality ends."""
        corpus = self.corpus
        noise = SessionNoise(
            settings=corpus.corruption,
            session_id=recording.session_id,
            step_seconds=corpus.step_seconds,
            frame_rate=corpus.visual.frames_per_second,
        )
        if isinstance(self.extract, TextExtractor):
            words = _words(recording, corpus.limits)
            pooled = self.extract(noise.on_words(words), corpus.step_seconds)
            return *pooled, max((word.end for word in words), default=0.0)
        if isinstance(self.extract, VisualExtractor):
            pictures = Pictures(recording.video, corpus.visual.frames_per_second, corpus.limits)
            pooled = self.extract(noise.on_pictures(pictures), corpus.step_seconds)
            return *pooled, pictures.seconds
        sound = Sound(recording.audio, corpus.limits)
        pooled = self.extract(noise.on_sound(sound), corpus.step_seconds)
        return *pooled, sound.seconds


def _words(recording: Recording, limits: Limits) -> tuple[Word, ...]:
    words = recording.words or ()
    read = read_words(words) if isinstance(words, Path) else words
    check_words(read, limits)
    return tuple(read)


@lru_cache(maxsize=3)
def _extractor(settings: AudioSettings | VisualSettings | TextSettings) -> Extractor:
    """Models stay in memory while this process loads sessions with them."""
    return settings.build()
