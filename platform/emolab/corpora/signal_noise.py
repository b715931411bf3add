"""Corrupted media: the signal noise of the robustness suites, put on recordings before any feature is computed.

The robustness package builds on corpora, so it is imported only where a preparation asks for noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from emolab.configuration import Settings
from emolab.features.decoding import UnusableMediaError
from emolab.features.grid import Word
from emolab.features.signals import SAMPLE_RATE, Picture, SoundChunk
from emolab.names import UserError

_MOST_BYTES = 2 * 2**30
"""Of one signal of one session: noise is a function of the whole signal, so the signal must fit into memory."""


class SignalNoise(Settings):
    """Corruptions of raw signals, each name with its severity; several of one signal in the order given."""

    audio: dict[str, int] = Field(default={}, description="on the sound, as {audio_babble: 3}")
    frames: dict[str, int] = Field(default={}, description="on the pictures, as {frame_jpeg: 2}")
    transcript: dict[str, int] = Field(default={}, description="on the words, as {text_word_errors: 1}")
    seed: int = Field(default=0, ge=0, description="of the noise")

    @model_validator(mode="after")
    def _of_known_corruptions(self) -> SignalNoise:
        for stage in ("audio", "frames", "transcript"):
            for name, severity in getattr(self, stage).items():
                _check(name, severity, stage)
        return self


@dataclass(frozen=True, kw_only=True)
class SessionNoise:
    """The noise of one session: a function of its id, corruption, severity and seed. Without any, signals pass through.

    Sound and pictures are collected whole where a corruption is chosen for them, and only then.
    """

    settings: SignalNoise
    session_id: str
    step_seconds: float
    frame_rate: float
    """Pictures per second that are looked at."""

    def on_sound(self, sound: Iterable[SoundChunk]) -> Iterator[SoundChunk]:
        """The chunks with corrupted samples; silence stands in the gaps while the noise is put on.

        Raises:
            UnusableMediaError: the sound does not fit into memory.
        """
        if not self.settings.audio:
            yield from sound
            return
        chunks = []
        for chunk in sound:
            chunks.append(chunk)
            self._refuse_large(4 * SAMPLE_RATE * (chunk.seconds - chunks[0].seconds), "sound")
        starts = [round((chunk.seconds - chunks[0].seconds) * SAMPLE_RATE) for chunk in chunks]
        length = max((start + len(chunk.samples) for start, chunk in zip(starts, chunks, strict=True)), default=0)
        waveform = np.zeros(length, dtype=np.float32)
        for start, chunk in zip(starts, chunks, strict=True):
            waveform[start : start + len(chunk.samples)] = chunk.samples
        waveform = self._corrupted("audio", waveform=waveform, sample_rate=SAMPLE_RATE).waveform
        for start, chunk in zip(starts, chunks, strict=True):
            yield chunk._replace(samples=waveform[start : start + len(chunk.samples)])

    def on_pictures(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The pictures, corrupted as they are seen by the encoder: scaled and cropped.

        Raises:
            UnusableMediaError: they do not fit into memory.
        """
        if not self.settings.frames:
            yield from pictures
            return
        kept = []
        for picture in pictures:
            kept.append(picture)
            self._refuse_large(len(kept) * picture.pixels.nbytes, "pictures")
        if kept:
            frames = np.stack([picture.pixels for picture in kept])
            after = self._corrupted("frames", frames=frames, frame_rate=self.frame_rate).frames
            yield from (picture._replace(pixels=pixels) for picture, pixels in zip(kept, after, strict=True))

    def on_words(self, words: Sequence[Word]) -> Sequence[Word]:
        """The words with the errors of a recogniser or a typist."""
        if not self.settings.transcript:
            return words
        from emolab.robustness.corruptions.recording import Word as TimedWord

        timed = tuple(TimedWord(text=word.text, start=word.start, end=word.end) for word in words)
        after = self._corrupted("transcript", words=timed).words
        return [Word(word.start, word.end, word.text) for word in after]

    def _corrupted(self, stage: str, **signal: Any) -> Any:
        from emolab.robustness.corruptions.recording import Recording, corrupt_recording

        recording = Recording(session_id=self.session_id, step_seconds=self.step_seconds, **signal)
        for name, severity in getattr(self.settings, stage).items():
            recording = corrupt_recording(recording, name, severity, seed=self.settings.seed)
        return recording

    def _refuse_large(self, size: float, what: str) -> None:
        if size > _MOST_BYTES:
            raise UnusableMediaError(
                f"its {what} take more than {_MOST_BYTES >> 30} GiB, too much to put noise on: "
                "lower visual.frames_per_second or cut the recording"
            )


def _check(name: str, severity: int, stage: str) -> None:
    from emolab.robustness.corruptions.catalog import corruption

    known = corruption(name)
    if known.stage != stage:
        raise UserError(f"corruption {name!r} works on {known.stage}, not on {stage}")
    known.check_level(severity)
