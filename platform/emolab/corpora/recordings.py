"""Corpora made of recordings: video, sound and transcripts that still have to become features.

A corpus of this kind says which files make a session (``Recording``); decoding, features, the step grid, labels on
that grid and their provenance are the same for all of them and live here.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from edu_emotionnet.conventions import MODALITIES
from emolab.configuration import Settings
from emolab.corpora.corpus import Arrays, Corpus, RefusedSessionError, SessionReference, Split, Stage
from emolab.corpora.modality_stage import ModalityStage
from emolab.corpora.signal_noise import SignalNoise
from emolab.features.annotations import read_spans
from emolab.features.audio import AudioSettings
from emolab.features.decoding import Clip, Limits, UnusableMediaError
from emolab.features.grid import LabelledSpan, Word, fitted, step_labels, steps_covering
from emolab.features.text import TextSettings
from emolab.features.transcripts import read_words
from emolab.features.visual import VisualSettings
from emolab.names import UserError
from emolab.sessions.schema import Session

__all__ = ["Clip", "LabelledSpan", "RecordedCorpus", "Recording", "Word"]

_PLACES = ("source", "manifest")
"""Options that say where a corpus lies."""

_CODEC_PADDING = 0.05
"""Seconds of sound at the end that make no step of their own: a codec fills its last frame up (AAC: to 43 ms)."""

_LATE_WORDS = 1.0
"""Seconds after the end of what is heard and seen at which a transcript's word may still begin: recognisers and
people who write captions are not that exact."""

PAPER_CLASSES = ("confused", "curious", "bored", "frustrated")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The files of one session and where they lie on its clock, which starts at 0 s. No media is opened to make it."""

    session_id: str
    speaker_id: str
    video: tuple[Clip, ...] = ()
    """One file, or the consecutive files of a session (MELD: one per utterance of a dialogue). Empty: no picture."""
    audio: tuple[Clip, ...] = ()
    """As ``video``; the same files where the sound is their sound track. A file without sound is no error."""
    words: tuple[Word, ...] | Path | None = None
    """Words in order of their start; or the transcript to read them from when the session's turn comes."""
    spans: tuple[LabelledSpan, ...] | Path = ()
    """Annotations in the corpus's own names, see ``RecordedCorpus.class_of``; or the table to read them from."""
    published_split: Split | None = None
    listed: str = ""
    """Where the session is listed (``sessions.csv, row 3``), for messages."""

    def refused(self, reason: object) -> RefusedSessionError:
        """The error that sets this session aside."""
        where = f" ({self.listed})" if self.listed else ""
        return RefusedSessionError(f"session {self.session_id!r}{where}: {reason}")


@dataclass(frozen=True, kw_only=True)
class RecordedCorpus(Corpus):
    """Base of a corpus of recordings. A subclass adds its options (``source``), ``name`` and ``recordings``."""

    class_names: tuple[str, ...] = PAPER_CLASSES
    """The classes; their order gives the label values."""
    step_seconds: float = 1.0
    """Length of a step: what is heard, seen and said in it is pooled into one vector per modality."""
    max_hours: float = 4.0
    """A session that is longer is set aside."""
    audio: AudioSettings = field(default_factory=AudioSettings)
    visual: VisualSettings = field(default_factory=VisualSettings)
    text: TextSettings = field(default_factory=TextSettings)
    corruption: SignalNoise = field(default_factory=SignalNoise)
    """Noise put on the signals before any feature is computed, to make shards of corrupted media."""

    def __post_init__(self) -> None:
        if len(set(self.class_names)) != len(self.class_names) or len(self.class_names) < 2:
            raise UserError(f"class_names={list(self.class_names)}: give at least two different names")
        if not 0.01 <= self.step_seconds <= 3600 or not 0 < self.max_hours <= 1000:
            raise UserError(
                f"step_seconds={self.step_seconds:g}, max_hours={self.max_hours:g}: "
                "steps take 0.01 to 3600 s, sessions up to 1000 hours"
            )
        if not any(self._features(name).used for name in MODALITIES):
            raise UserError("audio.extractor, visual.extractor and text.extractor are all none: keep at least one")
        if self.visual.used and self.visual.frames_per_second * self.step_seconds < 1:
            raise UserError(
                f"visual.frames_per_second={self.visual.frames_per_second:g} leaves steps of {self.step_seconds:g} s "
                "without a picture: look at one per step or more"
            )
        for name in _PLACES:  # workers have another current folder than the job that built this
            if isinstance(place := getattr(self, name, None), str):
                object.__setattr__(self, name, str(Path(place).expanduser().resolve()))

    @abstractmethod
    def recordings(self) -> Sequence[Recording]:
        """Every session, in an order that never changes. Reads lists and annotations, opens no media.

        Raises:
            UserError: a list is missing or contradicts itself: the whole corpus is refused.
        """

    def class_of(self, recording: Recording, span: LabelledSpan) -> str | None:
        """The class that an annotation stands for, None for none of them; here its label, which must be a class.

        Raises:
            RefusedSessionError: the label is unknown.
        """
        if span.label not in self.classes:
            raise recording.refused(
                f"unknown label {span.label[:60]!r} at {span.start:g} s (classes: {', '.join(self.classes)})"
            )
        return span.label

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names

    @property
    def dimensions(self) -> Mapping[str, int]:
        return {name: self._features(name).width for name in MODALITIES if self._features(name).used}

    def references(self) -> Sequence[SessionReference]:
        return [
            SessionReference(
                session_id=each.session_id, speaker_id=each.speaker_id, published_split=each.published_split
            )
            for each in self.recordings()
        ]

    def stages(self) -> Sequence[Stage]:
        """One stage per modality; each decodes its own files and holds its own model."""
        return [
            Stage(name=name, build=partial(ModalityStage, self, name), uses_gpu=self._features(name).uses_gpu)
            for name in self.dimensions
        ]

    def load(self, reference: SessionReference) -> Session:
        arrays: dict[str, Any] = {}
        for stage in self.stages():
            arrays |= stage.build()(reference, arrays)
        return self.assemble(reference, arrays)

    def assemble(self, reference: SessionReference, arrays: Arrays) -> Session:
        """The modalities on one grid, as long as the longest of them, and the labels on the same grid.

        Raises:
            RefusedSessionError: nothing was heard, seen or said, or a transcript or an annotation does not fit the
                recording.
        """
        recording = self.recording(reference)
        ends = {name: float(arrays[f"{name}.seconds"][0]) for name in self.dimensions}
        _check_transcript(recording, ends)
        seconds = max(ends.values())
        steps = max(
            steps_covering(end - (_CODEC_PADDING if name == "audio" else 0.0), self.step_seconds)
            for name, end in ends.items()
        )
        if steps == 0:
            raise recording.refused("it is empty: no sound, no picture, no words")
        placed = {
            name: fitted(arrays[f"{name}.features"], arrays[f"{name}.present"], steps) for name in self.dimensions
        }
        return Session(
            session_id=recording.session_id,
            speaker_id=recording.speaker_id,
            corpus=self.name,
            step_seconds=self.step_seconds,
            features={name: features for name, (features, _) in placed.items()},
            present={name: present for name, (_, present) in placed.items()},
            labels=step_labels(
                self._class_spans(recording, seconds), steps=steps, seconds=seconds, step_seconds=self.step_seconds
            ),
        )

    def recording(self, reference: SessionReference) -> Recording:
        """The recording of a reference.

        Raises:
            UserError: the reference is not one of this corpus.
        """
        found = _recordings_by_id(_ByContent(self)).get(reference.session_id)
        if found is None:
            raise UserError(f"{self.name} has no session {reference.session_id!r}: take references from the corpus")
        return found

    def options(self) -> dict[str, Any]:
        """What decides the data. A model counts by the digest of its weights, not by the folder it lies in."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _PLACES}
        described = {name: self._features(name).identity() for name in MODALITIES}
        return {name: described.get(name, _plain(value)) for name, value in values.items()}

    def input_key(self, reference: SessionReference) -> str:
        """What is listed of the session, with the size and time of every file that it names."""
        recording = replace(self.recording(reference), listed="")
        paths = [clip.path for clip in (*recording.video, *recording.audio)]
        paths += [each for each in (recording.words, recording.spans) if isinstance(each, Path)]
        return hashlib.sha256(repr((recording, [_state(path) for path in paths])).encode()).hexdigest()

    def missing_files(self, reference: SessionReference) -> Sequence[Path]:
        """Those of the modalities in use, and the labels."""
        recording = self.recording(reference)
        clips = {"audio": recording.audio, "visual": recording.video}
        named: list[Any] = [clip.path for name in self.dimensions for clip in clips.get(name, ())]
        named += [recording.words if "text" in self.dimensions else None, recording.spans]
        paths = dict.fromkeys(each for each in named if isinstance(each, Path))
        return [path for path in paths if _state(path) is None]

    def provenance(self) -> Mapping[str, Any]:
        """Where the features come from: model, revision, digest, parameters and library versions per modality."""
        return {
            "features": {name: self._features(name).provenance() for name in self.dimensions},
            "step_seconds": self.step_seconds,
            "corruption": self.corruption.model_dump(mode="json"),
        }

    @property
    def limits(self) -> Limits:
        return Limits(seconds=3600 * self.max_hours)

    def _features(self, modality: str) -> AudioSettings | VisualSettings | TextSettings:
        return {"audio": self.audio, "visual": self.visual, "text": self.text}[modality]

    def _class_spans(self, recording: Recording, seconds: float) -> list[tuple[float, float, int]]:
        """(start, end, class) of what begins within the recording.

        Spans that a corpus lists itself may begin later, like its words: it may lack the files of the last utterances.
        """
        spans = []
        for span in _spans(recording):
            if not 0 <= span.start < span.end:
                raise recording.refused(f"label {span.label[:60]!r} runs from {span.start:g} to {span.end:g} s")
            late = span.start >= seconds
            if late and isinstance(recording.spans, Path):
                raise recording.refused(
                    f"label {span.label[:60]!r} begins at {span.start:g} s, after the recording's end at "
                    f"{seconds:g} s: are its times in seconds?"
                )
            name = self.class_of(recording, span)
            if name is not None and not late:
                spans.append((span.start, span.end, self.classes.index(name)))
        return spans


def _check_transcript(recording: Recording, ends: Mapping[str, float]) -> None:
    """Refuse a transcript on another clock than the recording's, where something else of that was read.

    Words that a corpus lists itself are left alone: it may lack the files of some utterances.
    """
    recorded = max((end for name, end in ends.items() if name != "text"), default=0.0)
    if "text" not in ends or not recorded or not isinstance(recording.words, Path):
        return
    late = next((word for word in read_words(recording.words) if word.start > recorded + _LATE_WORDS), None)
    if late is not None:
        raise recording.refused(
            f"transcript: {late.text[:30]!r} begins at {late.start:g} s, after the recording's end at {recorded:g} s: "
            "are its times in seconds?"
        )


def _spans(recording: Recording) -> Sequence[LabelledSpan]:
    try:
        return read_spans(recording.spans) if isinstance(recording.spans, Path) else recording.spans
    except UnusableMediaError as error:
        raise recording.refused(f"labels: {error}") from None


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of a file; None of one that is not there, or cannot be, such as one with an endless name."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class _ByContent:
    """A corpus as the key of a cache: equal options make equal keys, although some options cannot be hashed."""

    corpus: RecordedCorpus

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByContent) and self.corpus == other.corpus

    def __hash__(self) -> int:
        return hash(repr(self.corpus))


@lru_cache(maxsize=4)
def _recordings_by_id(key: _ByContent) -> Mapping[str, Recording]:
    """Read once per process: files that change later are not noticed."""
    return {each.session_id: each for each in key.corpus.recordings()}


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Settings):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
